"""PCA and autoencoder bases against NumPy on the task vectors side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles import normal

from jaxarith import merge
from jaxarith.merge import linear_bases

TASKS, SIZE = 5, 40
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64(x64):
    yield


def vectors(seed=0):
    """Task vectors `[T, size]` of unequal norms around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return np.linspace(1, 2, TASKS)[:, None] * rng.normal(size=(TASKS, SIZE)) + 0.5


def trees(taus):
    return [{"a": {"w": tau[:24].reshape(4, 6)}, "b": tau[24:]} for tau in taus]


def flat(found):
    return np.array([np.concatenate([np.ravel(x["a"]["w"]), x["b"]]) for x in found])


def recovered(bases):
    return flat(merge.recover(bases, range(TASKS)))


@pytest.mark.parametrize("count", range(1, TASKS + 1))
def test_pca_is_the_svd_of_the_centred_vectors(count):
    taus = vectors()
    found = merge.pca(trees(taus), count)
    centred = taus - taus.mean(axis=0)
    left, values, right = np.linalg.svd(centred.T, full_matrices=False)
    expected = (left[:, :count] * values[:count]) @ right[:count]
    np.testing.assert_allclose(flat([found.mean])[0], taus.mean(axis=0), atol=1e-12)
    rebuilt = recovered(found)
    np.testing.assert_allclose(rebuilt, expected.T + taus.mean(axis=0), atol=1e-10)
    # U S, up to the sign of every direction.
    products = flat(found.basis) @ flat(found.basis).T
    np.testing.assert_allclose(products, np.diag(values[:count] ** 2), atol=1e-10)
    assert found.coefficients.shape == (count, TASKS)
    if count >= TASKS - 1:
        np.testing.assert_allclose(rebuilt, taus, atol=1e-10)


@pytest.mark.parametrize("count", range(1, TASKS + 1))
def test_vectors_recovered_by_pca_have_the_sum_of_the_task_vectors(count):
    taus = vectors(1)
    total = recovered(merge.pca(trees(taus), count)).sum(axis=0)
    np.testing.assert_allclose(total, taus.sum(axis=0), atol=1e-10)


def transcribed(gram, start, steps, lr=1e-2, decay=1e-6, temperature=5.0):
    """PyTorch's Adam on the gradient by hand, in NumPy: encoder and decoder."""
    tasks = len(gram)

    def encoder(a):
        powers = np.exp(a / temperature)
        return powers / powers.sum(axis=0)

    params = [start, np.zeros(start.shape[::-1])]
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    for step in range(1, steps + 1):
        b, w = encoder(params[0]), params[1]
        rest = 2 * gram @ (b @ w - np.eye(tasks)) / tasks**2
        of_b = rest @ w.T
        of_a = b * (of_b - (b * of_b).sum(axis=0)) / temperature
        for i, gradient in enumerate((of_a, b.T @ rest)):
            gradient = gradient + decay * params[i]
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            params[i] = params[i] - lr * mean / (np.sqrt(square) + 1e-8)
    return encoder(params[0]), params[1]


@pytest.mark.parametrize("count", [1, 3, TASKS])
def test_the_autoencoder_is_its_transcription(count):
    gram = vectors() @ vectors().T
    start = np.asarray(jax.random.normal(KEY, (TASKS, count)))
    expected = transcribed(gram, start, 300)
    found = linear_bases.autoencoder_factors(gram, count, key=KEY, steps=300)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    np.testing.assert_allclose(found.encoder.sum(axis=0), 1, atol=1e-12)


def test_the_error_is_that_of_the_vectors_and_its_gradient_that_of_differences():
    taus, weights = vectors(), normal(3, TASKS, TASKS)
    gram = jnp.asarray(taus @ taus.T)
    expected = ((weights.T @ taus - taus) ** 2).sum()
    assert linear_bases.squared_error(gram, weights) == pytest.approx(expected, 1e-10)
    check_grads(
        lambda w: linear_bases.squared_error(gram, w) / TASKS**2,
        (jnp.asarray(weights),),
        order=1,
        rtol=1e-6,
    )


@pytest.mark.parametrize("count", range(1, TASKS))
def test_no_basis_has_less_error_than_the_truncated_svd(count):
    """Eckart and Young; and training comes near to it."""
    taus = vectors(2)
    gram = jnp.asarray(taus @ taus.T)
    best = np.linalg.eigvalsh(gram)[: TASKS - count].sum()
    found = linear_bases.autoencoder_factors(gram, count, key=KEY)
    error = linear_bases.squared_error(gram, found.encoder @ found.decoder)
    assert best * (1 - 1e-10) <= error
    assert error < 1.15 * best
    if count > 1:  # the mean is one of as many vectors
        rebuilt = recovered(merge.pca(trees(taus), count - 1))
        assert best * (1 - 1e-10) <= ((rebuilt - taus) ** 2).sum()


def test_an_autoencoder_recovers_by_its_basis_and_coefficients():
    taus = vectors()
    found = merge.autoencoder(trees(taus), key=KEY, steps=50)
    factors = linear_bases.autoencoder_factors(taus @ taus.T, key=KEY, steps=50)
    assert found.mean is None and len(found.basis) == TASKS // 2
    expected = np.asarray(factors.encoder @ factors.decoder).T @ taus
    np.testing.assert_allclose(recovered(found), expected, atol=1e-10)
    np.testing.assert_allclose(flat(found.basis), factors.encoder.T @ taus, atol=1e-10)
    [one] = merge.recover(found, [3])
    np.testing.assert_allclose(flat([one])[0], expected[3], atol=1e-10)
    assert merge.recover(found, []) == []


def test_neither_the_order_of_keys_nor_absent_leaves_matter():
    taus = vectors()
    taus[2, 24:] = 0
    whole = merge.pca(trees(taus), 2)
    turned = [{"b": tau["b"], "a": tau["a"]} for tau in trees(taus)]
    del turned[2]["b"]
    found = merge.pca(turned, 2)
    np.testing.assert_allclose(recovered(found), recovered(whole), atol=1e-10)
    apart = merge.pca([{"x": np.ones(2)}, {"y": np.ones(3)}], 1)
    assert jax.tree.map(np.shape, apart.mean) == {"x": (2,), "y": (3,)}


def test_bases_are_in_float32_and_can_be_jitted():
    taus = trees(vectors().astype(np.float16))
    found = jax.jit(lambda taus: merge.pca(taus, 2))(taus)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.basis)} == {"float32"}
    expected = merge.pca(trees(flat(taus).astype(float)), 2)
    np.testing.assert_allclose(recovered(found), recovered(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: merge.pca(t, 0), "count is 0 for 5 task vectors; give .* 1 to 5"),
        (lambda t: merge.pca(t, 6), "count is 6 for 5 task vectors; give .* 1 to 5"),
        (lambda t: merge.autoencoder(t, -1, key=KEY), "count is -1 for 5"),
        (lambda t: merge.pca([]), "found an empty list"),
        (lambda t: merge.pca(t[0]), "found one tree, a dict"),
        (lambda t: merge.pca([*t, {"b": np.full(16, np.nan)}]), "task vector 5"),
        (lambda t: merge.recover(merge.pca(t), [0, 5, -1]), r"tasks \[5, -1\] have no"),
        (lambda t: linear_bases.pca_factors(np.ones((2, 3))), r"shape \[2, 3\]"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(trees(vectors()))
