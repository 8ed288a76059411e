"""Every script of the vision papers runs, and its rows are those of the paper."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import smoke

from experiments import finetune
from experiments.common import bank
from experiments.common.vision import options as vision
from experiments.common.vision import setups, vectors
from jaxarith import hub, tree
from jaxarith.models import clip

pytestmark = pytest.mark.usefixtures("shallow_clip")

FOLDER = Path(finetune.__file__).parent
LANGUAGE = ("glue", "detoxification")
SCRIPTS = [
    f"{folder}.{file.stem}"
    for folder in ("tau_jp", "linear_layers")
    for file in sorted((FOLDER / folder).glob("*.py"))
    if file.stem.startswith(("table", "figure"))
    and not any(word in file.stem for word in LANGUAGE)
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_smoke_run_has_the_rows_that_the_paper_prints(
    name, shared_bank, tmp_path, monkeypatch
):
    script = importlib.import_module(f"experiments.{name}")
    out = tmp_path / "out"
    # As one of the papers' models, so that their figures stand beside.
    monkeypatch.setitem(vision.TITLES, str(clip.TINY_CLIP), "ViT-B-32")
    found = smoke.run(name, out, bank=shared_bank)
    if not name.split(".")[1].startswith("figure"):
        text = (out / "report.md").read_text()
        published = getattr(script, "PUBLISHED", None) or script.ACCURACIES
        rows = [key[1:] for key in published if key[0] == "ViT-B-32"]
        printed = [row_key(row, len(rows[0])) for row in found["rows"]]
        assert rows == [row for row in printed if row in rows]
        for row in rows:
            for value in published["ViT-B-32", *row]:
                assert value is None or f" {value} " in text or f" {value:.2f} " in text


CHECKLIST = {  # the numbers of the papers' tables, and of the figures that have data
    "tau_jp": (range(1, 10), range(1, 9)),
    "linear_layers": (range(1, 3), range(3, 8)),
    "bases": (range(2, 17), range(3, 12)),
    "awd": (range(1, 12), range(2, 8)),
    "editing": (range(1, 13), range(2, 19)),
}


def numbers(text: str, word: str) -> set[int]:
    """Those after "Table", "Tables 1 to 3 and 5", and so on."""
    found = set()
    for listed in re.findall(rf"\b{word}s? ((?:\d+(?:, | and | to )?)+)", text):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
            found.update(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("folder", CHECKLIST)
def test_every_table_and_figure_has_a_script_whose_help_says_so(folder):
    files = sorted((FOLDER / folder).glob("*.py"))
    scripts = [f.stem for f in files if f.stem.startswith(("table", "figure"))]
    modules = [importlib.import_module(f"experiments.{folder}.{s}") for s in scripts]
    # `--help` prints the docstring of the module; its first line is the title.
    text = " ".join(module.__doc__.splitlines()[0] for module in modules)
    for word, expected in zip(("Table", "Figure"), CHECKLIST[folder], strict=True):
        assert numbers(text, word) == set(expected), word


def row_key(row, length):
    """What names a row below its model."""
    method = row["paradigm"] if "paradigm" in row else row["method"]
    return (method, row.get("coefficient"))[:length]


# The other methods are those of the tables.
@pytest.mark.parametrize("method", ["gradient_ascent", "multi_task", "random"])
def test_fine_tuning_adds_a_vector_with_its_accuracies(method, shared_bank, tmp_path):
    config = finetune.Config(
        task="mnist", method=method, smoke=True, bank=shared_bank, out=tmp_path / "out"
    )
    found = finetune.main(config)
    assert set(found) >= {"mnist, validation", "mnist, test"}
    assert all(0 <= x <= 1 for x in smoke.plain_numbers(found))
    name = "joint" if method == "multi_task" else "mnist"
    file = bank.vector_file(shared_bank, str(clip.TINY_CLIP), method, name)
    tau, metadata = hub.load_tree(file)
    assert metadata == {"task": name, "method": method}
    assert bank.record(file)["metrics"]["accuracy"] == found
    trained = vectors.LINEAR_LAYERS.get(method, ".*")
    assert tau and tree.select(tau, trained).keys() == tau.keys()
    assert all(np.abs(leaf).max() > 0 for leaf in tree.flatten(tau).values())


def test_a_vector_is_continued_from_a_file(shared_bank, tmp_path):
    options = {"task": "mnist", "smoke": True, "bank": shared_bank}
    finetune.main(finetune.Config(method="linear", out=tmp_path / "a", **options))
    model = str(clip.TINY_CLIP)
    start = bank.vector_file(shared_bank, model, "linear", "mnist")
    method = "tau_jp_continued"
    config = finetune.Config(
        method=method,
        start=start,
        others=("uci_digits",),
        out=tmp_path / "b",
        **options,
    )
    finetune.main(config)
    file = bank.vector_file(shared_bank, model, method, "mnist")
    record = bank.record(file)["configuration"]
    assert list(record["others"]) == ["uci_digits"] and "start" in record
    first, second = (tree.flatten(hub.load_tree(f)[0]) for f in (start, file))
    assert any(np.abs(first[path] - second[path]).max() > 0 for path in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("mnist", "cats")}, r"(?s)no data of mnist.*no task 'cats'"),
        ({"tasks": ("mnist", "mnist")}, "once"),
        ({}, r"(?s)no data of mnist.*to prepare.*no data of imagenet.*to prepare"),
        ({"control": "letters=/nowhere/at/all"}, "(?s)no folder.*--control none"),
        ({"control": "mnist=/nowhere/at/all"}, "control included, may be given once"),
    ],
)
def test_what_is_missing_is_found_before_anything_is_written(
    options, message, tmp_path, monkeypatch
):
    script = importlib.import_module("experiments.tau_jp.table1_addition")
    monkeypatch.setattr(clip, "load", lambda *_: pytest.fail("weights before data"))
    given = {"tasks": ("mnist",), "data_dir": tmp_path / "data", "source": "folder"}
    config = script.Config(
        out=tmp_path / "out", bank=tmp_path / "bank", **(given | options)
    )
    with pytest.raises(ValueError, match=message):
        script.main(config)
    assert not list(tmp_path.iterdir())


CONTROLLED = (
    "tau_jp.table2_negation",
    "curvature.table2_negation",
    "curvature.table_delta",
    "bases.table6_negation",
    "editing.table1_forgetting",
    "editing.table8_class_overlap",
    "editing.figure9_forgetting_curves",
    "editing.figure12_more_tasks",
    "editing.figure17_imagenet",
    "editing.table11_kings_and_queens",
)


@pytest.mark.parametrize("name", CONTROLLED)
def test_scripts_that_measure_a_control_refuse_none(name, tmp_path):
    script = importlib.import_module(f"experiments.{name}")
    config = script.Config(control="none", out=tmp_path / "out", bank=tmp_path / "bank")
    with pytest.raises(ValueError, match="--control none: this script needs"):
        script.main(config)
    assert not list(tmp_path.iterdir())


def test_without_a_control_the_other_tasks_are_kept_alone(folders, tmp_path):
    tasks = {"a": "dots", "b": "lines"}
    config = vision.OneModel(
        model=str(clip.TINY_CLIP),
        tasks=tuple(f"{name}={folders / path}" for name, path in tasks.items()),
        control="none",
        workers=0,
        mesh="data=1",
        bank=tmp_path / "bank",
        out=tmp_path / "out",
    )
    setup = setups.load(config, config.model)
    assert setup.control is None
    known = vectors.others_of(setup, "tau_jp_cyclic", setup.tasks[0])
    assert [task.name for task in known] == ["b"]
    with pytest.raises(ValueError, match="--control none: this script needs"):
        vectors.others_of(setup, "delta", setup.tasks[0])
    alone = setup._replace(tasks=setup.tasks[:1])
    with pytest.raises(ValueError, match="a has no others. Name more --tasks"):
        vectors.others_of(alone, "tau_jp_cyclic", alone.tasks[0])
    assert not vectors.others_of(alone, "tau_jp_incremental", alone.tasks[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two image folders of the same size."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for name, counts in (("dots", (12, 8)), ("lines", (10, 10))):
        for split in ("train", "test"):
            for label, count in enumerate(counts):
                folder = root / name / split / f"class_{label}"
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (30, 28), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def figure6(folders, tmp_path, out, tasks, **options):
    """τJp and cosines of two vectors trained for two steps; not a smoke run."""
    script = importlib.import_module("experiments.tau_jp.figure6_matrices")
    given = dict(steps=2, batch_size=4, workers=0, save_every=0, mesh="data=1")
    return script.main(
        script.Config(
            models=(str(clip.TINY_CLIP),),
            tasks=tuple(f"{name}={folders / path}" for name, path in tasks.items()),
            control=f"control={folders / 'dots'}",
            bank=tmp_path / "bank",
            out=tmp_path / out,
            **(given | options),
        )
    )


def test_the_bank_gives_a_vector_again_and_never_one_of_other_data_or_options(
    folders, tmp_path, monkeypatch
):
    tasks = {"a": "dots", "b": "lines"}
    first = figure6(folders, tmp_path, "first", tasks)
    with monkeypatch.context() as patch:
        patch.setattr(vectors.train, "fine_tune", lambda *_, **__: pytest.fail())
        assert figure6(folders, tmp_path, "again", tasks) == first
        with pytest.raises(ValueError, match="tasks/a/labels"):
            figure6(folders, tmp_path, "swapped", {"a": "lines", "b": "dots"})
        with pytest.raises(ValueError, match="recipe/learning_rate"):
            figure6(folders, tmp_path, "rate", tasks, learning_rate=1e-4)
        with pytest.raises(
            ValueError, match="every task, control included, may be given once"
        ):
            figure6(folders, tmp_path, "twice", {"a": "dots", "control": "lines"})
        with pytest.raises(ValueError, match="9 micro-batches of 4 samples"):
            figure6(folders, tmp_path, "parts", tasks, micro_batches=9)
    for out in ("swapped", "rate", "twice", "parts"):
        assert not (tmp_path / out).exists()
    other = importlib.import_module("experiments.tau_jp.figure4_per_task")
    with pytest.raises(ValueError, match="script: .*figure6_matrices there, .*figure4"):
        other.main(other.Config(out=tmp_path / "first"))
    # Without a penalty its weight changes nothing, and the vector is taken.
    with pytest.raises(ValueError, match="tau_jp_cyclic.*(?s:.)*penalty_coef"):
        figure6(folders, tmp_path, "weight", tasks, penalty_coef=0.5)
