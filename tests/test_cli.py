"""The command line: what it writes, and one line for every mistake."""

import json
import re

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxarith import cli, merge

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
        ({"b.bias": None}, r"lacks 1 tensors .* b\.bias"),
        ({"b.bias": np.full(3, np.nan, np.float16)}, r"NaN .* b\.bias"),
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
