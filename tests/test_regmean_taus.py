"""RegMean on task vectors, which is LOT, against NumPy's pseudo-inverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import normal

from jaxarith import merge

IN, OUT, ROWS, TASKS = 6, 3, 9, 3
lot = functools.partial(merge.regmean, on="taus", off_diagonal=1.0, ridge=0.0)


def problem(seed, rows=ROWS):
    """Gram matrices of inputs of unequal scale, weights and task vectors."""
    x = [normal((seed, 0, i), rows, IN) * (1 + i) + 0.5 for i in range(TASKS)]
    grams = [a.T @ a / rows for a in x]
    return grams, normal((seed, 1), IN, OUT), list(normal((seed, 2), TASKS, IN, OUT))


def merged(method, grams, w_0, taus, **options):
    by_path = [{"kernel": jnp.asarray(gram)} for gram in grams]
    vectors = [{"kernel": jnp.asarray(tau)} for tau in taus]
    return method({"kernel": jnp.asarray(w_0)}, vectors, by_path, **options)["kernel"]


def pseudo_inverse(grams, taus, rcond=1e-10):
    right = sum(gram @ tau for gram, tau in zip(grams, taus, strict=True))
    return np.linalg.pinv(sum(grams), rcond=rcond, hermitian=True) @ right


@pytest.mark.parametrize("rows", [ROWS, 1])
def test_it_is_the_pseudo_inverse(x64, rows):
    """One row each is a sum of rank 3 of 6."""
    grams, w_0, taus = problem(0, rows)
    expected = pseudo_inverse(grams, taus)
    found = merged(lot, grams, w_0, taus, coef=1.2)
    np.testing.assert_allclose(found, w_0 + 1.2 * expected, rtol=1e-10, atol=1e-10)
    assert np.abs(expected - np.mean(taus, axis=0)).max() > 0.1


@pytest.mark.parametrize("rows", [ROWS, 1])
def test_in_float32_too(rows):
    grams, w_0, taus = problem(1, rows)
    found = merged(lot, *jax.tree.map(np.float32, (grams, w_0, taus)))
    expected = w_0 + pseudo_inverse(grams, taus)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_of_full_rank_it_is_the_regression_on_models(x64):
    problem_2 = problem(2)
    on_models = merged(merge.regmean, *problem_2, off_diagonal=1.0, ridge=0.0)
    np.testing.assert_allclose(merged(lot, *problem_2), on_models, rtol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_inputs_that_never_occur_stay_pre_trained(ridge):
    grams, w_0, taus = jax.tree.map(np.float32, problem(3))
    for gram in grams:
        gram[2] = gram[:, 2] = 0
    found = merged(lot, grams, w_0, taus, ridge=ridge)
    np.testing.assert_allclose(found[2], w_0[2], atol=1e-6)
    others = np.arange(IN) != 2
    assert np.abs(found - w_0)[others].min() > 1e-3
    nothing = np.zeros_like(grams)
    np.testing.assert_array_equal(merged(lot, nothing, w_0, taus, ridge=ridge), w_0)


def test_one_task_moves_where_it_has_inputs(x64):
    grams, w_0, taus = problem(4, rows=2)
    values, vectors = np.linalg.eigh(grams[0])
    seen = vectors[:, values > 1e-9]
    assert seen.shape[1] == 2
    expected = w_0 + seen @ seen.T @ taus[0]
    found = merged(lot, grams[:1], w_0, taus[:1])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_the_ridge_pulls_to_the_pre_trained_weights(x64):
    grams, w_0, taus = problem(5)
    total = sum(grams)
    damped = total + 0.1 * np.trace(total) / IN * np.eye(IN)
    right = sum(gram @ tau for gram, tau in zip(grams, taus, strict=True))
    expected = w_0 + np.linalg.solve(damped, right)
    found = merged(lot, grams, w_0, taus, ridge=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    far = merged(lot, grams, w_0, taus, ridge=1e12)
    np.testing.assert_allclose(far, w_0, rtol=1e-9)


def test_off_diagonal_entries_are_scaled_as_on_models(x64):
    grams, w_0, taus = problem(6)
    scaled = [0.7 * gram + 0.3 * np.diag(np.diag(gram)) for gram in grams]
    expected = merged(lot, scaled, w_0, taus)
    found = merged(lot, grams, w_0, taus, off_diagonal=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("on", ["models", "taus"])
def test_the_coefficient_scales_all_of_the_merged_vector(x64, on):
    grams, w_0, taus = problem(7)
    params_0 = {"a": {"kernel": w_0, "scale": np.ones(OUT)}}
    vectors = [{"a": {"kernel": tau, "scale": tau[0]}} for tau in taus]
    by_path = [{"a/kernel": jnp.asarray(gram)} for gram in grams]
    method = functools.partial(merge.regmean, params_0, vectors, by_path, on=on)
    whole, half = method()["a"], method(coef=0.5)["a"]
    mean = np.mean([tau[0] for tau in taus], axis=0)
    np.testing.assert_allclose(whole["scale"], 1 + mean, rtol=1e-12)
    for name, start in params_0["a"].items():
        expected = start + 0.5 * (whole[name] - start)
        np.testing.assert_allclose(half[name], expected, rtol=1e-12)
    named = method(coef={"a/kernel": 0.5, "a/scale": 1.0})["a"]
    assert_close(named, {"kernel": half["kernel"], "scale": whole["scale"]}, 1e-12)


def test_gradients_are_finite_where_inputs_never_occur(x64):
    """The merged vector is linear in the task vectors, whatever the eigenvalues."""
    grams, w_0, taus = problem(8)
    grams = [np.diag([1.0, 1, 0, 0, 2, 2])] * TASKS

    def summed(taus):
        return jnp.sum(merged(lot, grams, w_0, taus))

    found = jax.grad(summed)(jnp.asarray(taus))
    seen = np.array([1.0, 1, 0, 0, 1, 1])[:, None]
    expected = np.broadcast_to(seen / TASKS, found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_what_on_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="unknown on 'tau'; known are models, taus"):
        merged(merge.regmean, *problem(9), on="tau")
    with pytest.raises(ValueError, match="coef has shape"):
        merged(lot, *problem(9), coef=[1.0, 2.0, 3.0])
