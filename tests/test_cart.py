"""CART against a NumPy transcription of its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def authors_cart(taus, rank, coef):
    mean = taus.mean(axis=0)
    return mean + coef * sum(truncated(tau - mean, rank) for tau in taus)


def vectors(leaves):
    return [{"w": leaf} for leaf in leaves]


@pytest.mark.parametrize("shape", [(9, 13), (13, 9)])
@pytest.mark.parametrize(("share", "rank"), [(0.01, 1), (0.16, 1), (0.34, 3), (0.9, 8)])
def test_cart_is_its_equation(shape, share, rank):
    taus = oracles.normal(0, 3, *shape) + oracles.normal(1, *shape)
    params_0, biases = oracles.normal(2, *shape), oracles.normal(3, 3, 5)
    expected = params_0 + authors_cart(taus, rank, 1.7)
    assert np.abs(expected - params_0 - taus.mean(axis=0)).max() > 0.1
    start = {"w": params_0, "b": np.zeros(5)}
    pairs = [{"w": tau, "b": b} for tau, b in zip(taus, biases, strict=True)]
    with jax.enable_x64(True):
        merged = merge.cart(start, pairs, coef=1.7, rank=share)
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(merged["b"], biases.mean(axis=0), rtol=1e-12)
    merged = merge.cart(
        *jax.tree.map(lambda x: np.float32(x), (start, pairs)), coef=1.7, rank=share
    )
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-4, atol=1e-5)


def assert_average(params_0, taus, **options):
    """Asserts that the merge with these options is the plain average."""
    with jax.enable_x64(True):
        merged = merge.cart({"w": params_0}, vectors(taus), **options)
    np.testing.assert_allclose(
        merged["w"], params_0 + taus.mean(axis=0), rtol=1e-10, atol=1e-12
    )


def test_with_all_singular_values_it_is_the_average():
    taus, params_0 = oracles.normal(0, 4, 6, 9), oracles.normal(1, 6, 9)
    assert_average(params_0, taus, rank=1.0)
    np.testing.assert_allclose(authors_cart(taus, 6, 2.3), taus.mean(axis=0))
    assert np.abs(authors_cart(taus, 1, 2.3) - taus.mean(axis=0)).max() > 0.1


def test_with_coefficient_zero_it_is_the_average():
    assert_average(
        oracles.normal(1, 6, 9), oracles.normal(0, 4, 6, 9), coef=0.0, rank=0.2
    )


@pytest.mark.parametrize("rank", [0.2, 0.5])
def test_of_two_tasks_it_is_the_average(rank):
    assert_average(oracles.normal(1, 6, 9), oracles.normal(0, 2, 6, 9), rank=rank)


def test_of_one_task_it_is_its_model():
    assert_average(oracles.normal(1, 6, 9), oracles.normal(0, 1, 6, 9), rank=0.2)


def test_equal_tasks_do_not_depend_on_the_coefficient():
    assert_average(
        oracles.normal(1, 6, 9), np.stack([oracles.normal(0, 6, 9)] * 3), coef=9.0
    )


def test_differences_of_a_lower_rank_are_kept_whole_and_cancel():
    """Parts of rank one around a common matrix: their differences have rank three."""
    left, right = oracles.normal(1, 3, 6, 1), oracles.normal(2, 3, 1, 9)
    taus = oracles.normal(0, 6, 9) + left * right
    assert_average(oracles.normal(3, 6, 9), taus, rank=3 / 6)
    assert np.abs(authors_cart(taus, 2, 2.3) - taus.mean(axis=0)).max() > 0.1


@pytest.mark.parametrize("factor", [-2.0, 1e-6])
def test_scaled_tasks_give_the_scaled_merge(factor):
    with jax.enable_x64(True):
        taus = oracles.normal(0, 3, 6, 9)
        params_0 = {"w": np.zeros((6, 9))}
        merged = merge.cart(params_0, vectors(taus))["w"]
        scaled = merge.cart(params_0, vectors(factor * taus))["w"]
        np.testing.assert_allclose(scaled, factor * merged, rtol=1e-9)


def test_other_matrices_than_those_chosen_are_averaged():
    params_0 = {"a": jnp.zeros((4, 6)), "kernel": jnp.zeros((4, 6))}
    taus = [
        {path: oracles.normal((i, j), 4, 6) for j, path in enumerate(params_0)}
        for i in range(3)
    ]
    merged = merge.cart(params_0, taus, matrices="kernel")
    mean = merge.average(params_0, taus)
    np.testing.assert_allclose(merged["a"], mean["a"], rtol=1e-6, atol=1e-7)
    assert np.abs(merged["kernel"] - mean["kernel"]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0.0}, r"rank is 0.0; it must be in \(0, 1\]"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": float("nan")}, "rank is nan"),
        ({"matrices": "kernel"}, "no 2-D leaf matches matrices='kernel'"),
        ({"coef": [1.0, 2.0]}, "coef has shape"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    tau = {"w": np.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        merge.cart(tau, [tau, tau], **options)
