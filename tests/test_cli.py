"""The command line: what it writes, and one clear error for every mistake."""

import json
import os
import re
import shlex

import jax
import numpy as np
import pytest
import yaml
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxarith import cli, merge, stream
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.request import MergeRequest, Model
from jaxarith.hub import safetensors

CONFIG = {"model_type": "anything"}


def checkpoint(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)

    def tensors():
        return {
            "a.weight": rng.normal(size=(4, 3)).astype(np.float32),
            "b.bias": rng.normal(size=3).astype(np.float16),
            "position_ids": np.arange(5, dtype=np.int64),
        }

    return [checkpoint(tmp_path / name, tensors()) for name in ("base", "m1", "m2")]


def run(models, out, *options):
    base, *rest = models
    named = [part for model in rest for part in ("--model", model)]
    return cli.main(["merge", "--base", base, *named, "--out", str(out), *options])


def test_merge_writes_what_the_operator_returns(models, tmp_path):
    out = tmp_path / "merged"
    assert (
        run(models, out, "--method", "ties", "--density", "0.5", "--coef", "0.7") == 0
    )
    base, *rest = (load_file(f"{model}/model.safetensors") for model in models)
    floats = [name for name in base if name != "position_ids"]
    taus = [
        {n: m[n].astype(np.float32) - base[n].astype(np.float32) for n in floats}
        for m in rest
    ]
    expected = merge.ties(base, taus, density=0.5, coef=0.7)
    actual = load_file(out / "model.safetensors")
    assert actual.keys() == base.keys()
    for name in base:
        np.testing.assert_array_equal(actual[name], expected[name])
        assert actual[name].dtype == base[name].dtype
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "tokenizer.json").exists()


def test_msgpack_checkpoints_merge_under_pytorchs_names(tmp_path):
    models = []
    for i in range(3):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        leaf = np.full((4, 3), i, np.float32) + np.arange(3, dtype=np.float32)
        content = serialization.msgpack_serialize({"a": {"kernel": leaf}})
        (folder / "flax_model.msgpack").write_bytes(content)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        models.append(str(folder))
    out = tmp_path / "merged"
    assert run(models, out, "--method", "average") == 0
    merged = load_file(out / "model.safetensors")
    expected = np.full((3, 4), 1.5) + np.arange(3)[:, None]
    np.testing.assert_allclose(merged["a.weight"], expected, rtol=1e-6)


def test_double_precision_stays_double(tmp_path):
    models = [
        checkpoint(tmp_path / f"m{i}", {"w": np.full(2, i, np.float64)})
        for i in range(3)
    ]
    out = tmp_path / "merged"
    assert run(models, out, "--method", "average") == 0
    assert load_file(out / "model.safetensors")["w"].dtype == np.float64


def failure(capsys, *args):
    assert run(*args) == 1
    return capsys.readouterr().err


def fails(capsys, *arguments):
    assert cli.main(["merge", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_mistakes_are_told_and_nothing_is_written(models, tmp_path, capsys):
    out = tmp_path / "merged"
    before = sorted(tmp_path.rglob("*"))
    missing = [models[0], str(tmp_path / "nowhere")]
    assert "nowhere" in failure(capsys, missing, out, "--method", "ties")
    options = ("--method", "average", "--density", "0.5")
    assert "average has no option --density" in failure(capsys, models, out, *options)
    options = ("--method", "ties", "--density", "2")
    assert "must be in (0, 1]" in failure(capsys, models, out, *options)
    assert "at least two" in failure(capsys, models[:2], out, "--method", "awd")
    exists = tmp_path / "base"
    assert "exists" in failure(capsys, models, exists, "--method", "ties")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": np.zeros((4, 4), np.float32)}, r"a\.weight: \[4, 4\]"),
        ({"c.weight": np.zeros(2, np.float32)}, r"\+ c\.weight"),
        ({"b.bias": None}, r"- b\.bias .*not in it"),
        ({"b.bias": np.full(3, np.nan, np.float16)}, r"b\.bias .*NaN"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    models, tmp_path, capsys, change, message
):
    tensors = load_file(f"{models[1]}/model.safetensors") | change
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save_file(tensors, f"{models[1]}/model.safetensors")
    error = failure(capsys, models, tmp_path / "merged", "--method", "average")
    assert re.search(message, error)
    assert not (tmp_path / "merged").exists()


def test_unknown_methods_are_refused(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(models, tmp_path / "merged", "--method", "magic")
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_the_help_names_every_method_and_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    text = capsys.readouterr().out
    assert "jaxarith merge CONFIG.yaml OUT" in text and "examples:" in text
    for preset, table in merge_recipe.PRESETS.items():
        rows = text.split(f"\n  --preset {preset}\n")[1]
        for name, method in table.items():
            row = re.search(rf"^    {name} .*$|^    {name}$", rows, re.MULTILINE)[0]
            assert all(f"--{key.replace('_', '-')}" in row for key in method.options)


def write(path, text):
    path.write_text(text)
    return str(path)


def load(folder):
    return load_file(f"{folder}/model.safetensors")


def test_a_file_and_flags_write_the_same_model(models, tmp_path):
    base, one, two = models
    config = write(
        tmp_path / "ties.yaml",
        f"""
merge_method: ties
preset: paper
base_model: {base}
models: [{{model: {one}}}, {{model: {two}}}]
parameters: {{density: 0.5, coef: 0.7}}
""",
    )
    assert cli.main(["merge", config, str(tmp_path / "a")]) == 0
    flags = ("--method", "ties", "--density", "0.5", "--coef", "0.7")
    assert run(models, tmp_path / "b", *flags) == 0
    assert cli.main(["merge", config, "--out", str(tmp_path / "c"), "--quiet"]) == 0
    content = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abc"]
    assert content[0] == content[1] == content[2]


def test_a_coefficient_for_each_model(models, tmp_path):
    out = tmp_path / "merged"
    assert run(models, out, "--method", "task_arithmetic", "--coef", "0.5", "-2") == 0
    base, one, two = map(load, models)
    expected = base["a.weight"] + 0.5 * (one["a.weight"] - base["a.weight"])
    expected = expected - 2 * (two["a.weight"] - base["a.weight"])
    np.testing.assert_allclose(load(out)["a.weight"], expected, rtol=1e-5, atol=1e-6)


def test_models_are_averaged_without_a_base(models, tmp_path, capsys):
    _, one, two = models
    out = tmp_path / "merged"
    named = ["--model", one, "--model", two, "--out", str(out)]
    assert cli.main(["merge", "--method", "average", "--weight", "3", "1", *named]) == 0
    one, two = load(one), load(two)
    expected = 0.75 * one["a.weight"] + 0.25 * two["a.weight"]
    np.testing.assert_allclose(load(out)["a.weight"], expected, rtol=1e-6)
    assert (out / "tokenizer.json").exists()
    capsys.readouterr()
    named[-1] = str(tmp_path / "other")
    error = fails(capsys, "--method", "ties", *named)
    assert "ties merges task vectors, so it needs a base model" in error


def test_the_preset_of_mergekit_has_its_options(models, tmp_path, capsys):
    out = tmp_path / "merged"
    flags = ("--preset", "mergekit", "--method", "ties", "--density", "0.5", "0.25")
    assert run(models, out, *flags, "--weight", "0.5") == 0
    assert "trims every tensor by itself" in capsys.readouterr().err
    base, *rest = map(load, models)
    wide = [{k: m[k].astype("f4") - base[k].astype("f4") for k in m} for m in rest]
    for tau in wide:
        del tau["position_ids"]
    expected = merge.mergekit.generalized_task_arithmetic(
        base, wide, method="ties", weight=0.5, density=[0.5, 0.25]
    )
    np.testing.assert_array_equal(load(out)["a.weight"], expected["a.weight"])
    error = failure(capsys, models, tmp_path / "x", *flags[:4], "--trim", "tensor")
    assert "ties has no option --trim; it has --weight, --density" in error


def test_a_random_merge_depends_on_its_seed_alone(models, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ("--method", "dare", "--drop-rate", "0.5", "--seed", seed, "--quiet")
        assert run(models, tmp_path / name, *flags) == 0
    a, b, c = (load(tmp_path / name)["a.weight"] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_dtype_is_that_of_the_weights_and_of_the_configuration(models, tmp_path):
    out = tmp_path / "merged"
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "x": 1}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert run(models, out, "--method", "average", "--dtype", "float16") == 0
    types = {name: str(leaf.dtype) for name, leaf in load(out).items()}
    assert types == {
        "a.weight": "float16",
        "b.bias": "float16",
        "position_ids": "int64",
    }
    assert json.loads((out / "config.json").read_text()) == {
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16", "x": 1},
    }


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "merged"
    assert run(models, out, "--method", "ties", "--dry-run", "--shard-size", "40") == 0
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    # 12 numbers of four bytes and 3 of two, of three models; positions are copied.
    for part in ("ties", "m2", "3, the largest of 48 B", "162 B", "in 3 files"):
        assert part in printed
    assert re.search(r"memory +about \d", printed)


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "awd", "karcher"])
def test_the_plan_tells_the_passes(models, tmp_path, name):
    base, *rest = models
    asked = MergeRequest(name, tuple(Model(model, {}) for model in rest), base=base)
    recipe = merge_recipe.build(asked)
    opened = stream.open_models(recipe.base, recipe.models)
    planned = stream.plan(opened)
    report = stream.merge(recipe.merge, opened, tmp_path / "merged", quiet=True)
    assert report.bytes_read == recipe.function.passes * planned.bytes_in


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "old.txt").write_text("old")
    nowhere = write(tmp_path / "config.yaml", "no: yaml")
    error = fails(capsys, nowhere, out)
    assert "exists" in error and "--overwrite" in error
    assert (out / "old.txt").read_text() == "old"


def test_overwrite_replaces_the_folder_once_the_new_one_is_complete(
    models, tmp_path, capsys
):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "old.txt").write_text("old")
    flags = ("--overwrite", "--method", "ties", "--density")
    error = failure(capsys, models, out, *flags, "0.5")
    assert "no model that could be replaced" in error
    (out / "config.json").write_text("{}")
    failure(capsys, models, out, *flags, "2")
    assert (out / "old.txt").read_text() == "old"
    assert run(models, out, *flags, "0.5") == 0
    assert (out / "model.safetensors").exists() and not (out / "old.txt").exists()
    for place in (models[0], models[2]):
        error = failure(capsys, models, place, *flags, "0.5")
        assert "holds one of the models" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("base", "m1", "m2", "merged")
    ]


def test_the_card_and_its_data_say_what_was_done(models, tmp_path):
    out = tmp_path / "merged"
    flags = ("--method", "task_arithmetic", "--coef", "0.5", "0.25")
    assert run(models, out, *flags) == 0
    facts = json.loads((out / "jaxarith_merge.json").read_text())
    assert [model["model"] for model in facts["inputs"]] == models
    assert [model["role"] for model in facts["inputs"]] == ["base", "model", "model"]
    assert all(
        re.fullmatch(r"[0-9a-f]{64}", model["sha256"]["model.safetensors"])
        for model in facts["inputs"]
    )
    assert len({model["sha256"]["model.safetensors"] for model in facts["inputs"]}) == 3
    card = (out / "README.md").read_text()
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == facts["recipe"]
    again = write(tmp_path / "again.yaml", recipe)
    assert cli.main(["merge", again, str(tmp_path / "again")]) == 0
    for name, leaf in load(out).items():
        np.testing.assert_array_equal(load(tmp_path / "again")[name], leaf)
    command = shlex.split(facts["command"])
    assert command[:2] == ["jaxarith", "merge"] and command[-3:] == list(flags[-3:])


def test_tokenizer_files_are_those_of_the_source(models, tmp_path):
    base, one, two = models
    for folder, text in ((base, "base"), (one, "one")):
        for name in ("tokenizer.json", "chat_template.jinja", "spiece.model"):
            write(tmp_path / folder / name, text)
        write(tmp_path / folder / "generation_config.json", text)
        write(tmp_path / folder / "pytorch_model.bin", text)
        write(tmp_path / folder / "model.safetensors.index.json.txt", text)
    (tmp_path / base / "merges.txt").write_text("of the base")
    config = f"""
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {one}}}, {{model: {two}}}]
parameters: {{weight: 0.5}}
tokenizer_source: {{}}
"""
    for source, expected in (("base", "base"), (one, "one")):
        out = tmp_path / f"from_{expected}"
        path = write(tmp_path / "config.yaml", config.replace("{}", source))
        assert cli.main(["merge", path, str(out)]) == 0
        for name in ("tokenizer.json", "chat_template.jinja", "spiece.model"):
            assert (out / name).read_text() == expected
        assert (out / "generation_config.json").read_text() == "base"
        assert (out / "merges.txt").exists() == (expected == "base")
        assert not (out / "pytorch_model.bin").exists()


def test_a_truncated_vocabulary_is_that_of_the_configuration(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for name, rows in (("base", 8), ("m1", 6), ("m2", 7)):
        weight = rng.normal(size=(rows, 3)).astype("f4")
        folder = checkpoint(tmp_path / name, {"model.embed_tokens.weight": weight})
        config = {"vocab_size": rows, "text_config": {"vocab_size": rows, "n": rows}}
        write(tmp_path / name / "config.json", json.dumps(config))
        folders.append(folder)
    out = tmp_path / "merged"
    assert run(folders, out, "--method", "average", "--vocabulary", "truncate") == 0
    assert load(out)["model.embed_tokens.weight"].shape == (6, 3)
    assert json.loads((out / "config.json").read_text()) == {
        "vocab_size": 6,
        "text_config": {"vocab_size": 6, "n": 8},
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "ties", "--coef", "x"), "--coef of ties is 'x'; .* a number"),
        (("--method", "ties", "--density", "1", "1"), "--density of ties is one value"),
        (
            ("--method", "average", "--weight", "1", "2", "3"),
            "3 values for 2 of",
        ),
        (("--method", "awd", "--steps", "1.5"), "--steps of awd is '1.5'; .* whole"),
        (("--method", "awd", "--scope", "leaf"), "--scope of awd .* global, layer"),
        (("--method", "wise_ft"), "WiSE-FT moves the base to one model; found 2"),
        (("--method", "iso_c", "--matrices", "x"), "no 2-D leaf matches"),
        (("--method", "slerp", "--density", "1"), "slerp has no option --density"),
        (("--density", "1"), "a --method"),
    ],
)
def test_mistakes_in_options_are_told(models, tmp_path, capsys, flags, message):
    error = failure(capsys, models, tmp_path / "merged", *flags)
    assert re.search(message, error)
    assert not (tmp_path / "merged").exists()


def test_a_dry_run_finds_options_out_of_range(models, tmp_path, capsys):
    options = ("--method", "ties", "--density", "2", "--dry-run")
    error = failure(capsys, models, tmp_path / "merged", *options)
    assert "density is 2.0; it must be in (0, 1]" in error


def test_mistakes_around_files_are_told(models, tmp_path, capsys):
    config = write(tmp_path / "config.yaml", "merge_method: magic\nmodels: []\n")
    out = tmp_path / "merged"
    assert "config.yaml, line 1: there is no method" in fails(capsys, config, out)
    assert "nowhere.yaml" in fails(capsys, tmp_path / "nowhere.yaml", out)
    assert "Is a directory" in fails(capsys, tmp_path, out)
    assert "name the new folder" in fails(capsys, config)
    assert "two new folders" in fails(capsys, config, out, "--out", out)
    assert "--base belongs in" in fails(capsys, config, out, "--base", "b")
    assert "--coef belongs in" in fails(capsys, config, out, "--coef", "1")
    assert "needs models" in fails(capsys, "--method", "ties", "--out", out)
    error = failure(capsys, models, out, "--method", "average", "--device", "tpu")
    assert "JAX finds no tpu here; it finds cpu" in error
    (tmp_path / "base" / "config.json").unlink()
    assert "config.json" in failure(capsys, models, out, "--method", "average")
    assert not out.exists()


def test_a_device_is_chosen_and_given_back(models, tmp_path, monkeypatch):
    seen = []
    merge_in_stream = stream.merge
    monkeypatch.setattr(
        stream,
        "merge",
        lambda *args, **options: (
            seen.append(jax.config.jax_default_device)
            or merge_in_stream(*args, **options)
        ),
    )
    flags = ("--method", "average", "--device", "cpu")
    assert run(models, tmp_path / "merged", *flags) == 0
    assert seen == [jax.devices("cpu")[0]]
    assert jax.config.jax_default_device is None


def test_a_full_disk_and_ctrl_c_leave_nothing(models, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    for error, status, told in (
        (OSError(28, os.strerror(28)), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ImportError("no module named yaml"), 1, "no module named yaml"),
    ):

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr(safetensors, "_write", broken)
        assert run(models, tmp_path / "merged", "--method", "average") == status
        assert told in capsys.readouterr().err.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_read_with_their_units(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(models, tmp_path / "x", "--method", "average", "--shard-size", "many")
    assert "'many' is no size" in capsys.readouterr().err
    out = tmp_path / "merged"
    assert run(models, out, "--method", "average", "--shard-size", "0.04kB") == 0
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    assert (out / "model.safetensors.index.json").exists()
