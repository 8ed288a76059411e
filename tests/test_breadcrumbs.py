"""Breadcrumbs against sorting, on leaves large and small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge
from jaxarith.merge import input_axis


def band(tau, beta, gamma):
    """`[row, entry]` without the ⌊βn⌋ smallest and ⌊(1-γ)n⌋ largest of every row."""
    width = tau.shape[1]
    low, high = int(beta * width + 1e-9), width - int((1 - gamma) * width + 1e-9)
    kept = np.zeros_like(tau)
    for row, out in zip(tau, kept, strict=True):
        middle = np.argsort(np.abs(row))[low:high]
        out[middle] = row[middle]
    return kept


@pytest.mark.parametrize(
    ("beta", "gamma"), [(0.85, 0.993), (0.5, 0.9), (0.29, 0.71), (0, 0.5), (0.9, 1)]
)
def test_every_leaf_keeps_the_band_between_two_quantiles(beta, gamma):
    with jax.enable_x64(True):
        shapes = {"a": (20, 50), "b": (100,), "c": (7,)}
        theta_0 = {path: normal(0, *shape) for path, shape in shapes.items()}
        taus = [{p: normal((i, *s), *s) for p, s in shapes.items()} for i in range(3)]
        coefs = [0.3, 1.0, -0.5]
        merged = merge.breadcrumbs(theta_0, taus, beta=beta, gamma=gamma, coef=coefs)
        for path, shape in shapes.items():
            kept = [band(tau[path].reshape(1, -1), beta, gamma) for tau in taus]
            assert all(0 < np.count_nonzero(x) < x.size for x in kept)
            moved = sum(c * x.reshape(shape) for c, x in zip(coefs, kept, strict=True))
            np.testing.assert_allclose(merged[path], theta_0[path] + moved, rtol=1e-12)


def test_rows_of_pytorch_weights_are_columns_of_flax_kernels():
    with jax.enable_x64(True):
        weight = normal(0, 6, 40)
        tau = {"weight": weight, "dense": {"kernel": weight.T}, "bias": weight[0]}
        params_0 = jax.tree.map(np.zeros_like, tau)
        merged = merge.breadcrumbs(
            params_0, [tau], beta=0.6, gamma=0.9, coef=1.0, axis=input_axis
        )
        expected = band(weight, 0.6, 0.9)
        np.testing.assert_array_equal(merged["weight"], expected)
        np.testing.assert_array_equal(merged["dense"]["kernel"], expected.T)
        np.testing.assert_array_equal(merged["bias"], expected[0])


@pytest.mark.parametrize("size", [1, 2, 3, 30, 99])
def test_a_small_leaf_loses_no_outlier_and_is_never_dropped_whole(size):
    tau = {"w": jnp.arange(1.0, size + 1)}
    merged = merge.breadcrumbs({"w": jnp.zeros(size)}, [tau], coef=1.0)
    kept = size - int(0.85 * size)
    np.testing.assert_array_equal(merged["w"][-kept:], tau["w"][-kept:])
    assert np.count_nonzero(merged["w"]) == kept


def test_equal_entries_are_all_kept():
    tau = {"w": jnp.where(jnp.arange(50) % 2 == 0, 3.0, -3.0)}
    merged = merge.breadcrumbs({"w": jnp.zeros(50)}, [tau], coef=1.0)
    np.testing.assert_array_equal(merged["w"], tau["w"])


@pytest.mark.parametrize(
    ("beta", "gamma"), [(0.9, 0.1), (0.5, 0.5), (-0.1, 0.9), (0.1, 1.1), (85, 99.3)]
)
def test_quantiles_out_of_range_are_an_error(beta, gamma):
    with pytest.raises(ValueError, match="0 <= beta < gamma <= 1"):
        tau = {"w": jnp.ones(2)}
        merge.breadcrumbs({"w": jnp.zeros(2)}, [tau], beta=beta, gamma=gamma)
