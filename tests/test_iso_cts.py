"""Iso-CTS against a NumPy transcription of the authors' code."""

import jax
import numpy as np
import oracles
import pytest

from jaxarith import merge


def authors_iso_cts(taus, share):
    """On weights [output, input]."""
    tasks, size = len(taus), min(taus.shape[1:])
    common = int(size * share)
    common = size - round((size - common) / tasks) * tasks
    each = (size - common) // tasks
    u, s, vt = np.linalg.svd(taus.sum(axis=0), full_matrices=False)
    u, s, vt = u[:, :common], s[:common], vt[:common]
    parts = [np.linalg.svd(tau - u @ u.T @ tau, full_matrices=False) for tau in taus]
    u = np.concatenate([p[0][:, :each] for p in parts] + [u], axis=1)
    s = np.concatenate([p[1][:each] for p in parts] + [s])
    vt = np.concatenate([p[2][:each] for p in parts] + [vt])
    (pu, _, qu), (pv, _, qv) = (np.linalg.svd(x, full_matrices=False) for x in (u, vt))
    return s.mean() * (pu @ qu) @ (pv @ qv)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
def test_iso_cts_is_the_authors_algorithm(shape, share):
    with jax.enable_x64(True):
        taus = oracles.normal(0, 3, *shape) + oracles.normal(1, *shape)
        params_0 = oracles.normal(2, *shape)
        update = authors_iso_cts(taus, share)
        merged = merge.iso_cts(
            {"weight": params_0, "kernel": params_0.T},
            [{"weight": tau, "kernel": tau.T} for tau in taus],
            **dict(common=share, coef=1.3),
        )
        expected = params_0 + 1.3 * update
        np.testing.assert_allclose(merged["weight"], expected, rtol=1e-9, atol=1e-9)
        # A kernel is stored [input, output]: the transpose of a weight of PyTorch.
        np.testing.assert_allclose(merged["kernel"].T, expected, rtol=1e-9, atol=1e-9)


def test_the_side_of_the_outputs_matters():
    taus = [{"weight": oracles.normal(i, 12, 12)} for i in range(3)]
    params_0 = {"weight": np.zeros((12, 12))}
    as_weight = merge.iso_cts(params_0, taus, common=0.5)
    as_kernel = merge.iso_cts(params_0, taus, common=0.5, in_out="weight")
    assert np.abs(as_weight["weight"] - as_kernel["weight"]).max() > 0.01


def test_spectrum_is_flat():
    with jax.enable_x64(True):
        taus = [{"weight": oracles.normal(i, 12, 15)} for i in range(3)]
        merged = merge.iso_cts({"weight": np.zeros((12, 15))}, taus, common=0.5)
        spectrum = np.linalg.svd(merged["weight"], compute_uv=False)
        np.testing.assert_allclose(spectrum, spectrum.mean(), rtol=1e-10)


@pytest.mark.parametrize(("shape", "common"), [((12, 15), 1.0), ((1, 5), 0.8)])
def test_without_room_for_the_tasks_it_is_iso_c(shape, common):
    taus = [{"weight": oracles.normal(i, *shape)} for i in range(3)]
    params_0 = {"weight": np.zeros(shape)}
    merged = merge.iso_cts(params_0, taus, common=common)
    np.testing.assert_array_equal(
        merged["weight"], merge.iso_c(params_0, taus)["weight"]
    )


def test_more_task_vectors_than_fit_leave_no_negative_common_space():
    taus = [{"weight": oracles.normal(i, 5, 5)} for i in range(3)]
    merged = merge.iso_cts({"weight": np.zeros((5, 5))}, taus, common=0.0)
    spectrum = np.linalg.svd(merged["weight"], compute_uv=False)
    np.testing.assert_allclose(spectrum, spectrum.mean(), rtol=1e-4)


@pytest.mark.parametrize("common", [-0.1, 1.1, float("nan")])
def test_share_out_of_range_is_an_error(common):
    tau = {"weight": np.ones((2, 2))}
    with pytest.raises(ValueError, match=r"common is .*; it must be in \[0, 1\]"):
        merge.iso_cts(tau, [tau], common=common)
