"""DELLA's ranks and probabilities; test_dare.py has what random drops promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge
from jaxarith.merge.della import centered_ranks

KEY = jax.random.key(3)


def magprune_probabilities(tau, drop_rate, epsilon):
    """The probability `[row, entry]` with which MAGPRUNE keeps an entry."""
    ranks = np.argsort(np.argsort(np.abs(tau), axis=1), axis=1)
    return 1 - drop_rate - epsilon + 2 * epsilon * ranks / (tau.shape[1] - 1)


def dropped(tau, **options):
    zeros = jax.tree.map(jnp.zeros_like, tau)
    return merge.task_arithmetic(zeros, merge.magprune([tau], key=KEY, **options))


@pytest.mark.parametrize("shape", [(3, 40), (1, 2), (5, 257), (40, 64)])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ranks_are_those_of_sorting_twice(shape, axis, dtype):
    with jax.enable_x64(True):
        x = normal(shape, *shape).astype(dtype)
        x = x if axis == -1 else x.T
        ranks = np.argsort(np.argsort(np.abs(x), axis=axis), axis=axis)
        expected = 2 * ranks / (shape[1] - 1) - 1
        found = centered_ranks(jnp.asarray(x), axis)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_equal_magnitudes_share_their_ranks():
    x = jnp.array([[0.0, 2, -2, 2, 5], [1, -1, 1, -1, 1]])
    expected = [[-1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(centered_ranks(x, -1), expected)


def test_entries_are_kept_with_the_probability_of_their_rank():
    rows, tau = 20_000, np.array([[0.1, -3.0, 0.5, 1.0, -0.2]], np.float32)
    shares = magprune_probabilities(tau, 0.4, 0.25)[0]
    np.testing.assert_allclose(sorted(shares), [0.35, 0.475, 0.6, 0.725, 0.85])
    assert shares[1] == max(shares)  # the largest entry
    rows_of = {"weight": np.tile(tau, (rows, 1))}
    left = np.asarray(dropped(rows_of, drop_rate=0.4, epsilon=0.25)["weight"])
    found = np.mean(left != 0, axis=0)
    assert (np.abs(found - shares) < 4 * np.sqrt(shares * (1 - shares) / rows)).all()
    for entry, share, column in zip(tau[0], shares, left.T, strict=True):
        np.testing.assert_allclose(column[column != 0], entry / share, rtol=1e-5)


@pytest.mark.parametrize("name", ["embedding", "kernel"])
def test_rows_run_over_the_inputs_of_a_layer(name):
    weight = np.abs(normal(0, 500, 30)) + 0.1  # in PyTorch's layout
    tau = {"layer": {name: jnp.asarray(weight.T if name == "kernel" else weight)}}
    left = dropped(tau, drop_rate=0.5, epsilon=0.45)["layer"][name]
    kept = np.asarray(left.T if name == "kernel" else left) != 0
    shares = magprune_probabilities(weight, 0.5, 0.45)
    expected = weight[kept] / shares[kept]
    left = np.asarray(left.T if name == "kernel" else left)
    np.testing.assert_allclose(left[kept], expected, rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 0.02


def test_rows_of_one_entry_have_the_mean_probability():
    tau = {"column": jnp.ones((5000, 1)), "scalars": jnp.array(1.0)}
    left = dropped(tau, drop_rate=0.5, epsilon=0.3)
    found = np.asarray(left["column"])
    assert set(np.unique(found)) == {0, 2}
    assert abs(np.mean(found != 0) - 0.5) < 4 * math.sqrt(0.25 / 5000)
    assert left["scalars"] in (0, 2)


def test_long_rows_of_float16_are_ranked():
    tau = {"w": jnp.asarray(normal(0, 70_000), jnp.float16)}
    left = np.asarray(dropped(tau, drop_rate=0.5, epsilon=0.2)["w"], np.float32)
    assert np.isfinite(left).all()
    assert abs(np.mean(left != 0) - 0.5) < 0.01


def test_the_default_elects_signs_and_averages_what_agrees():
    params_0 = {"w": jnp.zeros(400)}
    taus = [{"w": jnp.asarray(tau, jnp.float32)} for tau in normal(0, 3, 400)]
    pruned = merge.magprune(taus, key=KEY)
    parts = [merge.task_arithmetic(params_0, pruned, coef=one) for one in np.eye(3)]
    left = np.stack([part["w"] for part in parts])
    sign = np.sign(left.sum(axis=0))
    agree = (left * sign > 0).astype(float)
    expected = np.sum(left * agree, axis=0) / np.maximum(agree.sum(axis=0), 1)
    assert 0 < np.mean(agree) < np.mean(left != 0) < 1
    merged = merge.della(params_0, taus, key=KEY)
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("drop_rate", "epsilon"), [(0.05, 0.1), (0.9, 0.1), (0.5, -0.1), (0.5, math.nan)]
)
def test_a_window_out_of_range_is_an_error(drop_rate, epsilon):
    tau = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match="both ends of the window"):
        merge.della(tau, [tau], drop_rate=drop_rate, epsilon=epsilon, key=KEY)


def test_an_unknown_option_is_an_error():
    tau = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match="known are inverse, l1, none"):
        merge.della(tau, [tau], rescale="l2", key=KEY)
