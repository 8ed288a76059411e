"""Scripts on cosines take the bank's vectors by name, without models and data."""

import jax
import numpy as np
import pytest

from experiments.awd import figure4_cosines
from experiments.common import bank
from experiments.common.vision import raw_tasks
from experiments.editing import figure5_cosine
from experiments.linear_layers import figure5_cosine as three_ways
from experiments.tau_jp import figure6_matrices

MODEL, TASKS = "some/clip", ("dtd", "own=nowhere/images", "svhn")
LAYER = "vision_model/encoder/layers/0/mlp/fc1/kernel"


@pytest.fixture
def no_data(monkeypatch):
    def fail(*_):
        raise AssertionError("a data set was asked for")

    monkeypatch.setattr(raw_tasks, "named", fail)


def filled(folder, methods, params_0=7):
    """A bank of random vectors of three tasks; `[T, N]` by method."""
    found = {}
    for number, method in enumerate(methods):
        rows = np.random.default_rng(number).normal(size=(3, 4, 5)).astype(np.float32)
        for task, row in zip(("dtd", "own", "svhn"), rows, strict=True):
            file = bank.vector_file(folder, MODEL, method, task)
            bank.write(file, {LAYER: row}, {"params_0": params_0}, {})
        found[method] = rows.reshape(3, -1).astype(float)
    return found


def cosines(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def options(tmp_path):
    given = {"tasks": TASKS, "bank": tmp_path / "bank", "out": tmp_path / "out"}
    return given | {"bank_only": True}


def test_cosines_are_those_of_the_vectors_in_the_bank(tmp_path, no_data):
    [rows] = filled(tmp_path / "bank", ["nonlinear"]).values()
    config = figure5_cosine.Config(model=MODEL, **options(tmp_path))
    found = figure5_cosine.main(config)
    np.testing.assert_allclose(found["cosines"], cosines(rows), atol=1e-6)
    assert found["tasks"] == ["dtd", "own", "svhn"]
    assert found["rows"][0]["pair"].count(" – ") == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "their data and their recipes were not compared" in text
    assert (tmp_path / "out" / "figure5.png").stat().st_size > 1000


def test_all_scripts_on_cosines_can_do_without_data(tmp_path, no_data):
    methods = ["nonlinear", "linear", "linear_layers_1", "tau_jp_cyclic"]
    rows = filled(tmp_path / "bank", methods)
    given = options(tmp_path)
    found = three_ways.main(three_ways.Config(model=MODEL, **given))
    expected = cosines(rows["linear_layers_1"])
    np.testing.assert_allclose(found["cosines"]["Ours"], expected, atol=1e-6)

    given["out"] = tmp_path / "tau_jp"
    found = figure6_matrices.main(figure6_matrices.Config(models=(MODEL,), **given))
    expected = cosines(rows["tau_jp_cyclic"])
    [ours] = [m for m in found["matrices"] if m["method"] == "Ours"]
    np.testing.assert_allclose(ours["cosines"], expected, atol=1e-6)
    off = expected[~np.eye(3, dtype=bool)]
    np.testing.assert_allclose(found["rows"][0]["mean cosine"], off.mean(), atol=1e-6)
    assert not any("τJp" in key or "tau" in key for key in found["rows"][0])

    given["out"] = tmp_path / "awd"
    config = figure4_cosines.Config(models=(MODEL,), awd_steps=3, **given)
    found = figure4_cosines.main(config)
    [matrices] = found["matrices"]
    expected = cosines(rows["nonlinear"])
    np.testing.assert_allclose(matrices["task vectors"], expected, atol=1e-6)
    assert np.abs(np.subtract(matrices["disentangled"], expected)).max() > 1e-6


def test_what_the_bank_lacks_is_named(tmp_path, no_data):
    filled(tmp_path / "bank", ["nonlinear"])
    given = options(tmp_path) | {"tasks": ("dtd", "gtsrb", "mnist")}
    with pytest.raises(ValueError, match=r"lacks .*gtsrb.*mnist.*finetune"):
        figure5_cosine.main(figure5_cosine.Config(model=MODEL, **given))


def test_vectors_of_different_models_are_refused(tmp_path, no_data):
    filled(tmp_path / "bank", ["nonlinear"])
    file = bank.vector_file(tmp_path / "bank", MODEL, "nonlinear", "svhn")
    bank.write(file, {LAYER: jax.numpy.ones((4, 5))}, {"params_0": 8}, {})
    with pytest.raises(ValueError, match="2 different pre-trained models"):
        figure5_cosine.main(figure5_cosine.Config(model=MODEL, **options(tmp_path)))


def test_a_plan_of_what_trains_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--bank-only trains nothing"):
        figure5_cosine.Config(model=MODEL, plan=8, **options(tmp_path))
