"""ACE-Merging against a NumPy transcription of the authors' procedure."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from checks import assert_close

from jaxarith import merge

TASKS = 3
SIZES = {"alike": (1.0, 1.1, 0.9), "unlike": (1.0, 0.1, 0.03)}


def gamma(taus):
    logs = np.log([np.sum(tau**2) for tau in taus])
    return np.var(logs, ddof=1) / np.mean(logs) ** 2 if len(taus) > 1 else 0.0


def ace_merged(taus, eps=0.01, switch=0.3, share=0.3):
    """The procedure step by step, of matrices [output, input]."""
    inputs = taus[0].shape[1]
    normalised = gamma(taus) > switch
    mean_square = np.mean([np.sum(tau**2) for tau in taus])
    left, right, plain = 0.0, 0.0, []
    for tau in taus:
        centred = tau - tau.mean(axis=0)
        sigma, ridge = centred.T @ centred, eps
        if normalised:
            sigma, ridge = sigma / np.trace(sigma), eps / np.trace(sigma)
        plain.append(sigma)
        regular = sigma + ridge * np.eye(inputs)
        left, right = left + centred @ regular, right + regular
    c = np.mean(np.sum(plain, axis=0), axis=0) / (mean_square if normalised else 1)
    merged = left @ np.linalg.inv(right + np.ones((inputs, 1)) * c)
    if not normalised:
        return merged
    residual = sum(
        tau @ (sigma - right / len(taus))
        for tau, sigma in zip(taus, plain, strict=True)
    )
    u, s, vt = np.linalg.svd(merged + residual, full_matrices=False)
    k = int(len(s) * share)
    return merged + s[:k].mean() * (u[:, :k] @ vt[:k])


def normal_taus(shape, sizes, seed=0):
    taus = oracles.normal(seed, len(sizes), *shape)
    return [size * tau for size, tau in zip(sizes, taus, strict=True)]


def merged_leaf(taus, name="weight", **options):
    params_0 = {name: jnp.zeros(taus[0].shape)}
    return merge.ace(params_0, [{name: jnp.asarray(tau)} for tau in taus], **options)[
        name
    ]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("kind", SIZES)
def test_ace_is_its_procedure(x64, shape, kind):
    taus = normal_taus(shape, SIZES[kind])
    assert (gamma(taus) > 0.3) == (kind == "unlike")
    for eps, share in ((0.01, 0.3), (2.0, 0.5)):
        expected = ace_merged(taus, eps=eps, share=share)
        found = merged_leaf(taus, eps=eps, share=share)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
        assert np.abs(expected - np.mean(taus, axis=0)).max() > 0.05
    kernel = merged_leaf([tau.T for tau in taus], "kernel")
    np.testing.assert_allclose(kernel.T, ace_merged(taus), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SIZES)
def test_in_float32_too(kind):
    taus = normal_taus((9, 6), SIZES[kind], seed=1)
    expected = ace_merged(taus)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(merged_leaf(taus), expected, rtol=1e-5, atol=atol)


def test_the_switch_chooses_the_branch(x64):
    taus = normal_taus((7, 5), SIZES["unlike"])
    between = merged_leaf(taus, switch=gamma(taus) * 0.99)
    np.testing.assert_allclose(between, ace_merged(taus, switch=0), rtol=1e-9)
    never = merged_leaf(taus, switch=math.inf)
    np.testing.assert_allclose(never, ace_merged(taus, switch=1e9), rtol=1e-9)
    assert np.abs(between - never).max() > 0.05


def test_gamma_depends_on_the_unit_of_the_weights():
    """A trap that the docstring names."""
    taus = normal_taus((9, 6), SIZES["unlike"])
    assert gamma([100 * tau for tau in taus]) < 0.3 < gamma(taus)


def test_one_task_loses_the_means_of_its_columns(x64):
    (tau,) = taus = normal_taus((8, 5), [1.0])
    expected = ace_merged(taus)
    np.testing.assert_allclose(merged_leaf(taus), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(expected.mean(axis=0), 0, atol=1e-12)
    large = merged_leaf(taus, eps=1e9)
    np.testing.assert_allclose(large, tau - tau.mean(axis=0), rtol=1e-6, atol=1e-7)


def test_a_large_eps_is_the_average_of_the_centred_vectors(x64):
    taus = normal_taus((8, 5), SIZES["alike"])
    mean = np.mean(taus, axis=0)
    found = merged_leaf(taus, eps=1e9)
    np.testing.assert_allclose(found, mean - mean.mean(axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SIZES)
def test_a_task_without_a_matrix_takes_no_part_in_it(x64, kind):
    taus = normal_taus((6, 4), SIZES[kind])
    found = merged_leaf([taus[0], np.zeros((6, 4)), *taus[1:]])
    np.testing.assert_allclose(found, ace_merged(taus), rtol=1e-10, atol=1e-10)


def test_zero_vectors_give_params_0_and_finite_gradients():
    zeros = [np.zeros((5, 4), np.float32)] * TASKS
    np.testing.assert_array_equal(merged_leaf(zeros), 0)
    some = [np.float32(tau) for tau in normal_taus((5, 4), SIZES["unlike"])]
    for taus in (zeros, [zeros[0], *some]):
        slopes = jax.grad(lambda taus: jnp.sum(merged_leaf(taus) ** 2))(taus)
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_gradients_are_those_of_finite_differences(x64):
    """Without directions, of which the gradient has the vectors as constants."""
    taus = jnp.asarray(normal_taus((5, 4), SIZES["alike"]))
    target = oracles.normal(3, 5, 4)

    def along(taus):
        return jnp.sum(merged_leaf(list(taus)) * target)

    slopes = jax.grad(along)(taus)
    for direction in oracles.normal(4, 2, *taus.shape):
        expected = oracles.central_difference(along, taus, direction)
        np.testing.assert_allclose(jnp.sum(slopes * direction), expected, rtol=1e-6)


def test_other_leaves_are_averaged(x64):
    def parameters(seed):
        shapes = {"weight": (5, 4), "bias": (5,), "scale": (), "embed": (3, 4)}
        return {
            name: jnp.asarray(oracles.normal((seed, i), *shape))
            for i, (name, shape) in enumerate(shapes.items())
        }

    params_0, *taus = (parameters(seed) for seed in range(TASKS + 1))
    merged = merge.ace(params_0, taus, coef=0.5)
    average = merge.average(params_0, taus, coef=0.5)
    expected = ace_merged([np.asarray(tau["weight"]) for tau in taus])
    average["weight"] = params_0["weight"] + 0.5 * expected
    assert_close(merged, average, 1e-10)


ERRORS = {
    "eps": (dict(eps=0.0), "eps is 0.0; it must be above 0"),
    "switch": (dict(switch=-1.0), "switch is -1.0; it must not be negative"),
    "not a switch": (dict(switch=math.nan), "switch is nan"),
    "share": (dict(share=1.5), r"share is 1.5; it must be in \(0, 1\]"),
    "matrices": (dict(matrices="nothing"), "no 2-D leaf matches"),
    "coefficients": (dict(coef=[0.1, 0.2, 0.3]), r"coef has shape \[3\]"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_merged_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        merged_leaf(normal_taus((3, 2), SIZES["alike"]), **options)


def test_names_that_do_not_say_where_inputs_are_get_a_warning():
    taus = normal_taus((6, 4), SIZES["alike"])
    with pytest.warns(UserWarning, match="ace merges x as .output, input"):
        found = merged_leaf(taus, "x")
    assert_close({"x": found}, {"x": merged_leaf(taus)}, 0)
