"""AWD: the iterates in Gram space are those of gradient descent on whole vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge
from jaxarith.merge.awd import redundant_coefs


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def correlated(tasks, size=50):
    """Task vectors with a common component and unequal norms."""
    taus = oracles.normal(tasks, tasks, size) + oracles.normal(99, size)
    return jnp.asarray(taus * np.linspace(0.5, 2, tasks)[:, None])


def learning_rate(taus, step_size):
    return step_size * jnp.mean(jnp.sum(taus**2, axis=1))


def mean_abs_cosine(taus):
    return oracles.awd_loss(jnp.zeros_like(taus[0]), taus, 0.0)


@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("alpha", "step_size", "steps"),
    [(0.0, 0.01, 50), (1e-2, 0.05, 1), (0.03, 0.02, 100)],
)
def test_gram_space_iterates_are_those_of_the_full_space(
    tasks, alpha, step_size, steps
):
    taus = correlated(tasks)
    expected = oracles.awd_descent(taus, alpha, learning_rate(taus, step_size), steps)
    c = redundant_coefs(taus @ taus.T, alpha, step_size, steps)
    assert jnp.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-10, atol=1e-10)


def test_one_step_is_the_finite_difference_gradient_of_the_loss():
    taus = correlated(4, size=6)
    delta = jnp.zeros(6)  # α‖δ‖ has no gradient there, so α plays no part
    gradient = [
        oracles.central_difference(
            lambda delta: oracles.awd_loss(delta, taus, 0.0), delta, direction
        )
        for direction in np.eye(6)
    ]
    c = redundant_coefs(taus @ taus.T, 0.1, 1.0, steps=1)
    expected = -learning_rate(taus, 1.0) * jnp.array(gradient)
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-9, atol=1e-9)


def test_merged_model_is_task_arithmetic_of_the_disentangled_vectors():
    taus, params_0, coefs = (
        correlated(3),
        oracles.normal(7, 50),
        jnp.array([0.3, 1, -2]),
    )
    delta = oracles.awd_descent(taus, 0.01, learning_rate(taus, 0.02), 30)
    merged = merge.awd(
        {"a": params_0[:20].reshape(4, 5), "b": params_0[20:]},
        [{"a": tau[:20].reshape(4, 5), "b": tau[20:]} for tau in taus],
        **dict(coef=coefs, alpha=0.01, step_size=0.02, steps=30),
    )
    expected = params_0 + coefs @ (taus - delta[None])
    actual = np.concatenate([merged["a"].ravel(), merged["b"]])
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_disentangled_vectors_have_smaller_cosines():
    taus = correlated(5)
    cosines = [
        mean_abs_cosine(
            taus - (redundant_coefs(taus @ taus.T, 1e-4, 0.02, n) @ taus)[None]
        )
        for n in (0, 10, 100, 1000)
    ]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.5 and cosines[-1] < 0.2


@pytest.mark.parametrize("tasks", [2, 5])
def test_delta_stays_zero_when_the_vectors_are_orthogonal(tasks):
    taus = jnp.linalg.qr(oracles.normal(0, 20, tasks))[0].T * 3
    gram = jnp.diag(jnp.diagonal(taus @ taus.T))
    np.testing.assert_array_equal(redundant_coefs(gram, 0.1, 0.01, 100), 0)


def test_delta_stays_near_zero_when_alpha_outweighs_the_cosines():
    taus = correlated(3)
    gradient = oracles.awd_gradient(jnp.zeros(50), taus, 0.0)
    rate = learning_rate(taus, 0.01)
    alpha = 1.5 * jnp.linalg.norm(gradient)
    delta = redundant_coefs(taus @ taus.T, alpha, 0.01, 200) @ taus
    # Descent on a norm ends in steps of its own length about the minimum.
    assert jnp.linalg.norm(delta) <= 2 * rate * alpha


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_delta_scales_with_the_vectors_and_alpha_against_them(scale):
    taus = correlated(4)
    c = redundant_coefs(taus @ taus.T, 0.01, 0.02, 100)
    gram = scale**2 * (taus @ taus.T)
    scaled = redundant_coefs(gram, 0.01 / scale, 0.02, 100)
    np.testing.assert_allclose(scaled, c, rtol=1e-9)


def test_one_task_vector_is_an_error():
    with pytest.raises(ValueError, match="at least two task vectors"):
        merge.awd({"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}])
