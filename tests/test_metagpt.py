"""MetaGPT's coefficients against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import normal

from jaxarith import merge


def vectors(scales=(1.0, 0.5, 3.0)):
    return [
        {"a": jnp.asarray(s * normal(i, 4, 3)), "b": jnp.asarray(s * normal((i, 1), 5))}
        for i, s in enumerate(scales)
    ]


def test_they_are_the_shares_of_the_squared_norms(x64):
    taus = vectors()
    taus[1].pop("b")  # counts as zero
    squares = [sum(np.sum(np.square(x)) for x in tau.values()) for tau in taus]
    found = merge.metagpt_coefs(taus)
    np.testing.assert_allclose(found, squares / np.sum(squares), rtol=1e-12)
    np.testing.assert_allclose(np.sum(found), 1, rtol=1e-12)
    params_0 = {"a": np.zeros((4, 3)), "b": np.zeros(5)}
    merged = merge.task_arithmetic(params_0, taus, coef=found)
    a = sum(c * tau["a"] for c, tau in zip(found, taus, strict=True))
    np.testing.assert_allclose(merged["a"], a, rtol=1e-12)


def test_twice_as_long_counts_four_times():
    tau = vectors()[0]
    double = jax.tree.map(lambda x: 2 * x, tau)
    np.testing.assert_allclose(merge.metagpt_coefs([tau, double]), [0.2, 0.8])
    np.testing.assert_array_equal(merge.metagpt_coefs([tau]), [1.0])


def test_zero_vectors_have_no_weight_and_finite_gradients():
    first, *_ = vectors()
    zero = jax.tree.map(jnp.zeros_like, first)
    found = merge.metagpt_coefs([first, zero])
    np.testing.assert_allclose(found, [1.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(merge.metagpt_coefs([zero, zero]), [0.0, 0.0])

    def weighted(taus):
        return merge.metagpt_coefs(taus) @ jnp.array([1.0, 2.0])

    assert_close(jax.grad(weighted)([zero, zero]), [zero, zero], 0)


def test_jit_changes_nothing():
    taus = vectors()
    expected = merge.metagpt_coefs(taus)
    np.testing.assert_allclose(jax.jit(merge.metagpt_coefs)(taus), expected, rtol=1e-6)


def test_what_has_no_coefficients_is_an_error():
    with pytest.raises(ValueError, match="found an empty list"):
        merge.metagpt_coefs([])
    with pytest.raises(ValueError, match="task vector 1 has NaN"):
        merge.metagpt_coefs([{"w": jnp.ones(2)}, {"w": jnp.array([jnp.nan, 1])}])
