"""The merge by curvature: against a dense solve, and what all merges promise."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_networks as tiny
from checks import assert_close

from jaxarith import curvature, merge, tangent, tree


def setting(dtype=None):
    apply_fn, params, x = tiny.network("tanh", True, tokens=5, samples=60)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)
    found = [
        curvature.collect(
            apply_fn, params, [{"image": part}], probes=None, rank=2, chunk=20
        )
        for part in (x[:20], x[20:40], x[40:])
    ]
    return apply_fn, params, x, found, [tiny.vector(params, seed) for seed in range(3)]


@pytest.mark.usefixtures("x64")
def test_it_is_the_solution_of_the_dense_system():
    _, params, _, found, taus = setting()
    flat, unravel = jax.flatten_util.ravel_pytree(taus[0])

    def dense(one):
        return jax.vmap(
            lambda v: jax.flatten_util.ravel_pytree(one.product(unravel(v)))[0]
        )(jnp.eye(flat.size))

    matrices = [dense(one) for one in found]
    vectors = [jax.flatten_util.ravel_pytree(tau)[0] for tau in taus]
    right = sum(m @ v for m, v in zip(matrices, vectors, strict=True))
    mean = sum(vectors) / 3
    # From the mean: directions of no curvature keep it.
    want = (
        mean
        + np.linalg.lstsq(sum(matrices), right - sum(matrices) @ mean, rcond=1e-12)[0]
    )
    merged = merge.curvature(params, taus, found, steps=2000)
    moved = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, merged, params))[0]
    # Conjugate gradients stop at a residual of 1e-5.
    residual = sum(matrices) @ moved - right
    assert np.linalg.norm(residual) < 2e-5 * np.linalg.norm(right)
    np.testing.assert_allclose(moved, want, atol=1e-2)

    def objective(v):
        rests = [v - own for own in vectors]
        return sum(r @ m @ r for r, m in zip(rests, matrices, strict=True))

    assert objective(moved) <= objective(want) * (1 + 1e-6)
    assert objective(moved) < 0.9 * objective(mean)


@pytest.mark.usefixtures("x64")
def test_in_the_tangent_space_the_features_of_every_task_stay_nearest():
    apply_fn, params, x, _, taus = setting()
    parts = [x[:20], x[20:40], x[40:]]
    exact = [  # a sketch of full rank beside nothing is the exact form
        curvature.collect(
            apply_fn, params, [{"image": part}], probes=None, sharing=None, rank=31
        )
        for part in parts
    ]
    exact = [
        dataclasses.replace(one, diagonal=jax.tree.map(jnp.zeros_like, one.diagonal))
        for one in exact
    ]
    linear = tangent.linearize(apply_fn, params)

    def distance(tau):
        moved = jax.tree.map(jnp.add, params, tau)
        own = [jax.tree.map(jnp.add, params, t) for t in taus]
        return sum(
            float(jnp.mean(jnp.sum((linear(moved, p) - linear(o, p)) ** 2, axis=-1)))
            for o, p in zip(own, parts, strict=True)
        )

    merged = merge.curvature(params, taus, exact, steps=2000)
    tau = jax.tree.map(jnp.subtract, merged, params)
    least = distance(tau)
    for seed in range(5):
        step = jax.tree.map(lambda leaf: 1e-2 * leaf, tiny.vector(params, 10 + seed))
        assert distance(jax.tree.map(jnp.add, tau, step)) > least - 1e-9
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *taus)
    assert least < 0.9 * distance(mean)


def test_one_task_is_given_back_and_equal_tasks_are_theirs():
    _, params, _, found, taus = setting("float32")
    alone = merge.curvature(params, taus[:1], found[:1])
    assert_close(alone, jax.tree.map(jnp.add, params, taus[0]), rtol=1e-5, atol=1e-5)
    same = merge.curvature(params, [taus[0]] * 3, found)
    assert_close(same, alone, rtol=1e-4, atol=1e-4)


def test_the_coefficient_scales_and_dtypes_stay():
    _, params, _, found, taus = setting("float32")
    half = merge.curvature(params, taus, found, coef=0.5)
    whole = merge.curvature(params, taus, found)
    want = jax.tree.map(lambda p, m: p + 0.5 * (m - p), params, whole)
    assert_close(half, want, rtol=1e-4, atol=1e-5)
    mixed = params | {"first": jax.tree.map(jnp.bfloat16, params["first"])}
    merged = merge.curvature(mixed, taus, found)
    assert jax.tree.map(jnp.dtype, merged) == jax.tree.map(jnp.dtype, mixed)


def test_a_leaf_that_a_vector_lacks_counts_as_zero():
    _, params, _, found, taus = setting("float32")
    part = {"second": taus[0]["second"]}
    zeros = part | {"first": jax.tree.map(jnp.zeros_like, taus[0]["first"])}
    assert_close(
        merge.curvature(params, [part, *taus[1:]], found),
        merge.curvature(params, [zeros, *taus[1:]], found),
        rtol=0,
        atol=0,
    )


def test_mistakes():
    _, params, _, found, taus = setting("float32")
    with pytest.raises(ValueError, match="2 curvatures for 3 task vectors"):
        merge.curvature(params, taus, found[:2])
    with pytest.raises(ValueError, match="steps is 0"):
        merge.curvature(params, taus, found, steps=0)
    wide = params | {"third": jnp.zeros(2)}
    moved = [tau | {"third": jnp.ones(2)} for tau in taus]
    with pytest.raises(ValueError, match="no curvature was measured for third"):
        merge.curvature(wide, moved, found)


def test_what_no_vector_moves_stays():
    _, params, _, found, taus = setting("float32")
    part = [tree.select(tau, "first/.*") for tau in taus]
    merged = merge.curvature(params, part, found)
    assert_close(merged["second"], params["second"], rtol=0, atol=0)
