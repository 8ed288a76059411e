"""EMR-Merging against NumPy transcriptions of the paper and of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge, task_vectors

SHAPES = {"a": (4, 6), "b": (5,), "c": ()}


def leaves(seed):
    """Few distinct values, so that sums and entries are often exactly zero."""
    return {
        path: np.round(2 * oracles.normal((seed, i), *shape)) / 4
        for i, (path, shape) in enumerate(SHAPES.items())
    }


def paper(taus):
    unified, masks = {}, [{} for _ in taus]
    before, after = np.zeros(len(taus)), np.zeros(len(taus))
    for path in SHAPES:
        stacked = np.stack([tau[path] for tau in taus])
        sign = np.sign(stacked.sum(axis=0))
        agreeing = np.where(stacked * sign > 0, np.abs(stacked), 0)
        unified[path] = sign * agreeing.max(axis=0)
        for t, tau in enumerate(taus):
            masks[t][path] = tau[path] * unified[path] > 0
            before[t] += np.abs(tau[path]).sum()
            after[t] += np.abs(masks[t][path] * unified[path]).sum()
    return unified, masks, before / after


def authors_code(taus):
    unified, masks = {}, [{} for _ in taus]
    before, after = np.zeros(len(taus)), np.zeros(len(taus))
    for path in SHAPES:
        flag = (np.mean([tau[path] for tau in taus], axis=0) > 0) * 2 - 1
        for t, tau in enumerate(taus):
            masks[t][path] = tau[path] * flag > 0
            before[t] += np.mean(np.abs(tau[path]))
        magnitudes = [
            np.abs(m[path] * tau[path]) for m, tau in zip(masks, taus, strict=True)
        ]
        unified[path] = flag * np.max(magnitudes, axis=0)
        for t in range(len(taus)):
            after[t] += np.mean(np.abs(unified[path] * masks[t][path]))
    return unified, masks, before / after


@pytest.mark.parametrize(
    ("preset", "oracle"), [("paper", paper), ("official", authors_code)]
)
def test_emr_is_the_published_algorithm(preset, oracle):
    with jax.enable_x64(True):
        for seed in range(3):
            taus = [leaves(10 * seed + t) for t in range(3)]
            params_0 = leaves(10 * seed + 9)
            tau, masks, scales = oracle(taus)
            total = np.sum([t["a"] for t in taus], axis=0)
            assert np.any((total == 0) & (taus[0]["a"] != 0))  # entries that cancel
            merged = merge.emr_masks(params_0, taus, preset=preset)
            jax.tree.map(np.testing.assert_array_equal, merged.tau, tau)
            jax.tree.map(np.testing.assert_array_equal, merged.masks, masks)
            np.testing.assert_allclose(merged.scales, scales, rtol=1e-12)
            model = task_vectors.apply(params_0, merged.vector(1))
            for path in SHAPES:
                expected = params_0[path] + scales[1] * masks[1][path] * tau[path]
                np.testing.assert_allclose(model[path], expected, rtol=1e-12)


def test_the_presets_differ():
    taus = [leaves(t) for t in range(3)]
    a, b = (merge.emr_masks(taus[0], taus, preset=p) for p in ("paper", "official"))
    assert np.any(a.scales != b.scales) and np.any(a.tau["a"] != b.tau["a"])


def test_the_norm_of_every_task_is_kept():
    taus = [leaves(t) for t in range(3)]
    merged = merge.emr_masks(taus[0], taus)
    for t, tau in enumerate(taus):
        norms = [
            sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(vector))
            for vector in (tau, merged.vector(t))
        ]
        np.testing.assert_allclose(*norms, rtol=1e-6)


def test_vectors_are_kept_exactly_where_supports_are_disjoint():
    full = leaves(0)["a"]
    taus = [
        {"a": np.where(np.arange(24).reshape(4, 6) % 2 == t, full, 0)} for t in (0, 1)
    ]
    merged = merge.emr_masks({"a": np.zeros((4, 6))}, taus)
    for t, tau in enumerate(taus):
        np.testing.assert_allclose(merged.vector(t)["a"], tau["a"], rtol=1e-6)


def test_zero_task_vector_has_an_empty_mask_and_scale_zero():
    taus = [{"a": jnp.ones(3)}, {"a": jnp.zeros(3)}]
    merged = merge.emr_masks({"a": jnp.zeros(3)}, taus)
    np.testing.assert_array_equal(merged.scales, [1, 0])
    np.testing.assert_array_equal(merged.vector(1)["a"], np.zeros(3))


def test_bfloat16_vectors_are_merged_in_float32():
    taus = [{"a": jnp.ones(3, jnp.bfloat16)}, {"a": jnp.ones(3, jnp.bfloat16)}]
    merged = merge.emr_masks({"a": jnp.zeros(3, jnp.bfloat16)}, taus)
    assert merged.tau["a"].dtype == merged.vector(0)["a"].dtype == jnp.float32
    assert merged.masks[0]["a"].dtype == bool


def test_unknown_preset_is_an_error():
    with pytest.raises(ValueError, match="unknown preset 'code'; known are paper"):
        merge.emr_masks({"a": jnp.zeros(3)}, [{"a": jnp.zeros(3)}], preset="code")
