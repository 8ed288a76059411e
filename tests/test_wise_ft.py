"""WiSE-FT is the straight line between two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge, task_vectors


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
def test_it_interpolates_between_the_two_models(coef):
    with jax.enable_x64(True):
        theta_0, theta = normal(0, 3, 4), normal(1, 3, 4)
        tau = task_vectors.difference({"w": theta}, {"w": theta_0})
        merged = merge.wise_ft({"w": theta_0}, [tau], coef=coef)
        expected = (1 - coef) * theta_0 + coef * theta
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-12, atol=1e-12)


def test_the_default_is_the_middle_and_untrained_leaves_stay():
    params_0 = {"w": jnp.zeros(2), "frozen": jnp.ones(3), "ids": jnp.arange(2)}
    merged = merge.wise_ft(params_0, [{"w": jnp.array([2.0, -4.0])}])
    np.testing.assert_array_equal(merged["w"], [1, -2])
    np.testing.assert_array_equal(merged["frozen"], params_0["frozen"])
    np.testing.assert_array_equal(merged["ids"], params_0["ids"])


def test_a_vector_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"w: \[3\]"):
        merge.wise_ft({"w": jnp.zeros(2)}, [{"w": jnp.ones(3)}])


def test_anything_but_one_task_vector_is_an_error():
    tau = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="exactly one task vector; found 2"):
        merge.wise_ft({"w": jnp.zeros(2)}, [tau, tau])
    with pytest.raises(ValueError, match="found one tree, a dict"):
        merge.wise_ft({"w": jnp.zeros(2)}, tau)
