"""The command line: what `jaxarith merge` writes and prints."""

import json
import re
import shlex

import jax
import merge_command
import numpy as np
import pytest
import yaml
from flax import serialization
from merge_command import CONFIG, checkpoint, fails, failure, load, run, write
from safetensors.numpy import load_file

from jaxarith import cli, merge, stream
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.request import MergeRequest, Model

models = merge_command.models  # a fixture


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


def test_an_option_may_be_a_number_or_a_word(models, tmp_path, capsys):
    base, *rest = map(load, models)
    taus = [{"a.weight": m["a.weight"] - base["a.weight"]} for m in rest]
    closed = ("--method", "wudi", "--solver", "closed", "--matrices", ".*")
    for text, rank in (("participation", "participation"), ("2", 2)):
        assert run(models, tmp_path / text, *closed, "--rank", text) == 0
        expected = merge.wudi(
            {"a.weight": base["a.weight"]}, taus, solver="closed", rank=rank
        )
        found = load(tmp_path / text)["a.weight"]
        np.testing.assert_array_equal(found, expected["a.weight"])
    error = failure(capsys, models, tmp_path / "none", *closed, "--rank", "few")
    assert "'few'; it must be a whole number or participation" in error


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


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (["-1e-1"], [-0.1, -0.1]),
        (["-1E-1", "2.5e0"], [-0.1, 2.5]),
        (["-.5", "-1.e-2"], [-0.5, -0.01]),
        (["2e-1", "-3"], [0.2, -3.0]),
    ],
)
def test_coefficients_may_be_negative_with_an_exponent(
    models, tmp_path, given, numbers
):
    out = tmp_path / "merged"
    options = ("--method", "task_arithmetic", "--coef", *given, "--quiet")
    assert run(models, out, *options) == 0
    base, *rest = (load(model)["a.weight"] for model in models)
    expected = base + sum(c * (x - base) for c, x in zip(numbers, rest, strict=True))
    np.testing.assert_allclose(load(out)["a.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", ["-inf", "-nan", "-1e-1x", "-1e"])
def test_what_only_looks_like_a_number_is_refused(models, tmp_path, capsys, word):
    options = ("--method", "task_arithmetic", "--coef", word)
    try:
        status = run(models, tmp_path / "merged", *options)
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    assert "--coef" in capsys.readouterr().err


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
    assert "trims every tensor separately" in capsys.readouterr().err
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


def test_sizes_are_read_with_their_units(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(models, tmp_path / "x", "--method", "average", "--shard-size", "many")
    assert "'many' is not a size" in capsys.readouterr().err
    out = tmp_path / "merged"
    assert run(models, out, "--method", "average", "--shard-size", "0.04kB") == 0
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    assert (out / "model.safetensors.index.json").exists()
