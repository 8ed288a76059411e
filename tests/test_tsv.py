"""TSV-Merge against a NumPy transcription of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge
from jaxarith.merge import _matrices


def polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def authors_tsv(taus):
    rank = min(taus.shape[1:]) // len(taus)
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:rank] for _, s, _ in parts])
    v = np.concatenate([vt[:rank] for _, _, vt in parts])
    return polar(u) * s @ polar(v)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8), (7, 40)])
def test_tsv_is_the_authors_algorithm(shape):
    with jax.enable_x64(True):
        taus = oracles.normal(0, 3, *shape) + oracles.normal(1, *shape)
        params_0 = oracles.normal(2, *shape)
        biases = oracles.normal(3, 3, 5)
        merged = merge.tsv(
            {"w": params_0, "b": np.zeros(5)},
            [{"w": tau, "b": bias} for tau, bias in zip(taus, biases, strict=True)],
            coef=0.7,
        )
        expected = params_0 + 0.7 * authors_tsv(taus)
        assert np.abs(expected - params_0 - 0.7 * taus.mean(axis=0)).max() > 0.1
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(merged["b"], 0.7 * biases.mean(axis=0))


def test_tasks_with_orthogonal_rows_and_columns_add_up():
    with jax.enable_x64(True):
        u = np.linalg.qr(oracles.normal(0, 9, 9))[0]
        v = np.linalg.qr(oracles.normal(1, 12, 12))[0]
        taus = [
            u[:, 3 * t : 3 * t + 3] * [[3.0, 2.0, 1.0]] @ v[:, 3 * t : 3 * t + 3].T
            for t in range(3)
        ]
        merged = merge.tsv({"w": np.zeros((9, 12))}, [{"w": tau} for tau in taus])
        np.testing.assert_allclose(merged["w"], sum(taus), atol=1e-12)


def test_equal_tasks_give_their_leading_part():
    """Where the authors' code completes the orthogonal matrices with rounding noise."""
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        merged = merge.tsv({"w": np.zeros((6, 9))}, [{"w": tau}] * 2)
        expected = u[:, :3] * s[:3] @ vt[:3]
        np.testing.assert_allclose(merged["w"], expected, atol=1e-12)


def test_zero_task_vector_does_not_disturb_the_others():
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        taus = [{"w": tau}, {"w": np.zeros((6, 9))}]
        merged = merge.tsv({"w": np.zeros((6, 9))}, taus)
        np.testing.assert_allclose(merged["w"], u[:, :3] * s[:3] @ vt[:3], atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 4), (1, 1)])
def test_matrices_too_small_for_all_tasks_are_averaged(shape):
    taus = [{"w": oracles.normal(i, *shape)} for i in range(3)]
    merged = merge.tsv({"w": jnp.zeros(shape)}, taus)
    expected = np.mean([tau["w"] for tau in taus], axis=0)
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [merge.tsv, merge.iso_c, merge.iso_cts])
def test_other_matrices_than_those_chosen_are_averaged(method):
    params_0 = {"embedding": jnp.zeros((4, 6)), "kernel": jnp.zeros((4, 6))}
    taus = [
        {path: oracles.normal((i, j), 4, 6) for j, path in enumerate(params_0)}
        for i in range(2)
    ]
    merged = method(params_0, taus, matrices="kernel")
    everything = method(params_0, taus)
    mean = np.mean([tau["embedding"] for tau in taus], axis=0)
    np.testing.assert_allclose(merged["embedding"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(merged["kernel"], everything["kernel"])
    assert np.abs(everything["embedding"] - mean).max() > 0.1


@pytest.mark.parametrize("method", [merge.tsv, merge.iso_c, merge.iso_cts, merge.wudi])
def test_pattern_that_no_matrix_matches_is_an_error(method):
    tau = {"a": {"w": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="no 2-D leaf matches matrices='kernel'.* a/w"):
        method(tau, [tau, tau], matrices="kernel")


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 3), (3, 1)])
def test_singular_values_are_differentiable_and_vectors_are_not(shape):
    with jax.enable_x64(True):
        matrix = oracles.normal(0, *shape)
        u, s, vt = _matrices.svd(jnp.asarray(matrix))
        np.testing.assert_allclose(u * s[None] @ vt, matrix, atol=1e-12)
        gradient = jax.grad(lambda m: jnp.sum(_matrices.svd(m)[1]))(matrix)
        np.testing.assert_allclose(gradient, polar(matrix), atol=1e-12)
        vectors = jax.grad(lambda m: jnp.sum(_matrices.svd(m)[0] ** 3))(matrix)
        np.testing.assert_array_equal(vectors, 0)


def test_singular_values_that_are_rounding_noise_are_zero_with_their_vectors():
    low_rank = oracles.normal(0, 30, 2) @ oracles.normal(1, 2, 40)
    u, s, vt = _matrices.svd(jnp.asarray(low_rank, jnp.float32))
    assert np.all(s[:2] > 1) and not np.any(s[2:])
    assert not np.any(u[:, 2:]) and not np.any(vt[2:])
