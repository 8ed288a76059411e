"""Proposition 1 of the linear-layers paper: moves of outputs from Gram matrices."""

import jax
import numpy as np
from oracles import normal

from experiments.linear_layers import proposition1
from jaxarith.models import clip

PATHS = [f"layers/{i}/kernel" for i in range(2)]


def test_the_ratios_are_those_of_the_inputs_themselves():
    inputs = [
        {p: normal((9, t, i), 50, 6) for i, p in enumerate(PATHS)} for t in (0, 1, 2)
    ]
    taus = [{p: normal((t, i), 6, 4) for i, p in enumerate(PATHS)} for t in (1, 2, 3)]
    kernels = {p: normal((7, i), 6, 4) for i, p in enumerate(PATHS)}
    with jax.enable_x64(True):
        grams = [
            {p: x.T @ x / len(x) for p, x in of_task.items()} for of_task in inputs
        ]
        found = proposition1.ratios(grams, kernels, taus)
    for i, of_task in enumerate(inputs):
        for layer, path in enumerate(PATHS):
            x = of_task[path]
            others = sum(x @ tau[path] for t, tau in enumerate(taus) if t != i)
            size = np.linalg.norm(others)
            own = size / np.linalg.norm(x @ taus[i][path])
            before = size / np.linalg.norm(x @ kernels[path])
            np.testing.assert_allclose(found["own"][i, layer], own, rtol=1e-10)
            np.testing.assert_allclose(found["layer"][i, layer], before, rtol=1e-10)


def test_vectors_that_are_orthogonal_to_other_tasks_inputs_move_nothing():
    # Task t lives in coordinate t alone, with its inputs and its vector.
    eye = np.eye(3)
    grams = [{PATHS[0]: np.outer(eye[t], eye[t])} for t in range(3)]
    taus = [{PATHS[0]: np.outer(eye[t], np.ones(2))} for t in range(3)]
    found = proposition1.ratios(grams, {PATHS[0]: np.ones((3, 2))}, taus)
    np.testing.assert_array_equal(found["own"], 0)


def test_a_smoke_run_has_a_row_of_every_method(tmp_path):
    config = proposition1.Config(
        models=(str(clip.TINY_CLIP),), smoke=True, out=tmp_path / "out", bank=tmp_path
    )
    found = proposition1.main(config)
    assert [row["method"] for row in found["rows"]] == list(proposition1.METHODS)
    for row in found["rows"]:
        assert row["others over own"] > 0
        assert 0 < row["others over the layer's outputs"] < 1
    assert all("self_attn" in path for path in found["layers"])
    assert list((tmp_path / "out").glob("proposition1_*.png"))
