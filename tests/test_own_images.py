"""Image folders of one's own: how they are named, and what errors say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from checks import assert_close
from PIL import Image

from experiments import finetune
from experiments.common.vision import merged, options, raw_tasks, scores
from experiments.curvature import choose_coef
from experiments.linear_layers import table1_addition as linear_layers
from jaxarith import hub, merge
from jaxarith.data import images, vision
from jaxarith.models import clip

pytestmark = pytest.mark.usefixtures("shallow_clip")

NAMES = ("dots", "lines")


def write_folders(place):
    """Two image folders of two classes each; by name NAME=FOLDER."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        for split, count in (("train", 20), ("test", 8)):
            for label in ("dark", "light"):
                folder = place / name / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    shade = rng.integers(100, size=(28, 28)) + 150 * (label == "light")
                    image = Image.fromarray(shade.astype("u1"))
                    image.save(folder / f"{number}.png")
    return {name: f"{name}={place / name}" for name in NAMES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"))


def config_of(tmp_path, **changes):
    given = {"model": str(clip.TINY_CLIP), "out": tmp_path / "out", "workers": 0}
    given |= {"bank": tmp_path / "bank", "mesh": "data=1", "save_every": 0}
    given |= {"steps": 2, "batch_size": 4, "control": "none"}
    return finetune.Config(**given | changes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"task": "dtd"}, ("dtd",)),
        ({"task": "cats=c"}, ("cats=c",)),
        ({"task": "cats", "tasks": ("dogs=d", "cats=c")}, ("cats=c",)),
        ({"task": "cats=c", "tasks": ("cats=c", "dogs=d")}, ("cats=c",)),
        (
            {"task": "cats=c", "tasks": ("dogs=d", "dtd"), "method": "tau_jp_cyclic"},
            ("dogs=d", "dtd", "cats=c"),
        ),
        (
            {"task": "cats", "tasks": ("cats=c", "dtd"), "method": "curvature"},
            ("cats=c", "dtd"),
        ),
        ({"task": "cats=c", "others": ("dtd", "dogs=d")}, ("cats=c", "dtd", "dogs=d")),
    ],
)
def test_a_folder_need_not_be_among_the_tasks(given, expected):
    config, _ = finetune.needed(finetune.Config(**given))
    assert config.tasks == expected
    assert config.out.name.endswith(f"_{raw_tasks.name_of(given['task'])}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "cats"}, "--task cats is not among .* --task cats=FOLDER"),
        ({"task": "dtd", "others": ("cats",)}, "--others cats is not among"),
        ({"task": "cats=a", "tasks": ("cats=b",)}, "two tasks with the same name"),
    ],
)
def test_a_task_without_a_place_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        finetune.needed(finetune.Config(**given))


def test_finetune_takes_a_folder_and_keeps_others_without_a_control(folders, tmp_path):
    config = config_of(
        tmp_path,
        task=folders["dots"],
        tasks=(folders["lines"],),
        method="tau_jp_cyclic",
    )
    found = finetune.main(config)
    assert set(found) == {"dots, validation", "dots, test"}
    file = tmp_path / "bank/tiny_clip/tau_jp_cyclic/dots.safetensors"
    assert file.exists()


def test_an_error_on_the_control_says_how_to_do_without(folders, tmp_path):
    config = config_of(
        tmp_path,
        task=folders["dots"],
        tasks=(folders["lines"],),
        method="tau_jp_cyclic",
        control="imagenet",
        source="folder",
    )
    with pytest.raises(ValueError, match="(?s)imagenet.*--control none"):
        finetune.main(config)


def test_a_text_file_names_the_tasks(tmp_path):
    file = tmp_path / "tasks.txt"
    file.write_text("# mine\ndtd\n\n cats=images/cats  # from home\n")
    config = options.OneModel(tasks_file=file)
    assert config.tasks == ("dtd", "cats=images/cats")
    smoke = options.smoke(options.OneModel(tasks_file=file, smoke=True))
    assert smoke.tasks == options.SMOKE[:-1]
    with pytest.raises(ValueError, match="give only one"):
        options.OneModel(tasks_file=file, tasks=("dtd",))
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no task; write one per line"):
        options.OneModel(tasks_file=file)
    with pytest.raises(FileNotFoundError):
        options.OneModel(tasks_file=tmp_path / "other.txt")


def test_a_chosen_task_may_be_given_with_its_folder():
    config = choose_coef.Config(tasks=("cats=c", "dtd"), choose_on="cats=c")
    choose_coef.check(config)
    with pytest.raises(ValueError, match="--choose-on dogs"):
        choose_coef.check(choose_coef.Config(choose_on="dogs"))


def table_config(folders, tmp_path, **changes):
    given = {"models": (str(clip.TINY_CLIP),), "tasks": tuple(folders.values())}
    given |= {"out": tmp_path / "out", "bank": tmp_path / "bank", "control": "none"}
    given |= {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "workers": 0}
    given |= {"mesh": "data=1", "save_every": 0, "save_merged": True}
    return linear_layers.Config(**given | changes)


def test_the_table_saves_the_best_network_with_its_heads(folders, tmp_path):
    config = table_config(folders, tmp_path)
    found = linear_layers.main(config)
    saved = found["rows"][-1]
    assert saved["method"].startswith("Saved: ")
    assert merged.NOTE in (config.out / "report.md").read_text()
    # The folder holds the network of that row, and nothing else of it has changed.
    model, base = clip.load(config.out / "merged"), clip.load(clip.TINY_CLIP)
    method = linear_layers.METHODS[saved["method"].removeprefix("Saved: ")]
    paths = [tmp_path / "bank/tiny_clip" / method / f"{name}" for name in NAMES]
    taus = [hub.load_tree(path.with_suffix(".safetensors"))[0] for path in paths]
    expected = merge.task_arithmetic(base.params, taus, coef=saved["found"])
    assert_close(model.params, expected, rtol=0, atol=1e-7)
    assert (config.out / "merged" / "tokenizer.json").exists()
    assert (config.out / "merged" / "preprocessor_config.json").exists()
    # With the heads, it has the accuracy that the row says.
    heads, classes = hub.load_tree(config.out / "heads.safetensors")
    assert {name: json.loads(of) for name, of in classes.items()} == dict.fromkeys(
        NAMES, ["dark", "light"]
    )
    encode = clip.image_encoder(model.config)
    preprocess = images.Preprocessing.from_folder(model.folder)
    for name, head in heads.items():
        test = vision.load_folder(name, folders[name].partition("=")[2]).test
        x = np.stack([preprocess(sample["image"]) for sample in test])
        right = (encode(model.params, x) @ head.T).argmax(-1) == test.labels
        assert 100 * right.mean() == pytest.approx(saved["per_task"][name])
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    transformers.CLIPModel.from_pretrained(config.out / "merged")


def test_the_best_network_is_the_best_on_validation_data(monkeypatch):
    curves = {"a": [0.1, 0.5, 0.3], "b": [0.2, 0.4, 0.6]}

    def on_all(setup, taus, split, rows, **_):
        assert split == "validation" and len(rows) == 6
        number, at = np.argmax(rows, axis=1), np.max(rows, axis=1)
        both = [
            list(curves.values())[n][int(2 * c)]
            for n, c in zip(number, at, strict=True)
        ]
        return np.array([both, both]).T

    monkeypatch.setattr(scores, "on_all", on_all)
    setup = SimpleNamespace(options=options.Addition(smoke=True))
    assert list(scores.coefs_of(setup.options, scores.COEFS)) == [0, 0.5, 1]
    assert merged.best(setup, dict.fromkeys(curves)) == ("b", 1.0)


def test_one_network_of_several_seeds_is_refused():
    with pytest.raises(ValueError, match="Run it again with --seeds 1"):
        options.Addition(save_merged=True, seeds=2)
