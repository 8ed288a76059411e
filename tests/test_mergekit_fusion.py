"""arcee_fusion, RAM and RAM+ against transcriptions of mergekit's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith.merge import mergekit

SHAPES = {"w": (7, 40), "b": (33,), "deep": (3, 4, 5), "one": ()}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def leaves(seed, scale=1.0):
    return {
        path: np.asarray(normal((seed, i), *shape), np.float64) * scale
        for i, (path, shape) in enumerate(SHAPES.items())
    }


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def fused(base, model):
    """For entries all of which are drawn, in the order of the sorted ones."""
    p, q = softmax(model) + 1e-8, softmax(base) + 1e-8
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    importance = np.abs(model - base) * divergence
    ordered = np.sort(importance.ravel())
    places = (np.array([0.25, 0.5, 0.75]) * (ordered.size - 1)).astype(int)
    lower, median, upper = ordered[places]
    return np.where(importance >= median + 1.5 * (upper - lower), model, base)


def test_arcee_fusion_is_mergekits():
    base, tau = leaves(0), leaves(1, 0.3)
    found = mergekit.arcee_fusion(base, [tau])
    for path in ("w", "b", "deep"):
        expected = fused(base[path], base[path] + tau[path])
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-12)
        taken = np.mean(expected != base[path])
        assert 0.01 < taken < 0.4
    # One entry is as important as all entries of its tensor.
    np.testing.assert_allclose(found["one"], base["one"] + tau["one"])


def test_what_did_not_move_and_what_moved_alike_is_taken_over():
    base = {"w": jnp.ones((2, 3))}
    assert (mergekit.arcee_fusion(base, [{"w": jnp.zeros((2, 3))}])["w"] == 1).all()
    # The softmax of a row that is shifted stays, so nothing is important.
    shifted = mergekit.arcee_fusion(base, [{"w": jnp.full((2, 3), 0.5)}])["w"]
    np.testing.assert_allclose(shifted, 1.5)


def reinforced(base, taus, r, alpha, epsilon):
    active = np.stack([np.abs(tau) > epsilon for tau in taus])
    count = active.sum(axis=0)
    total = np.zeros_like(base)
    for tau, own in zip(taus, active, strict=True):
        unique, shared = own & (count == 1), own & (count > 1)
        ratio = shared.sum() / max(unique.sum(), epsilon)
        factor = 1 + r * min(max(ratio, 0), alpha)
        total += factor * tau * unique + tau * shared / np.maximum(count, 1)
    return base + total


@pytest.mark.parametrize("options", [None, {}, {"r": 2.0, "alpha": 0.7}])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_reinforced_merging_is_mergekits(options, tasks):
    base, taus = leaves(0), [leaves(1 + task, 0.5) for task in range(tasks)]
    epsilon, defaults = 0.4, {"r": 0.1, "alpha": 0.2}
    if options is None:
        found = mergekit.ram(base, taus, epsilon=epsilon)
        used = {"r": 0.0, "alpha": 0.0}
    else:
        found = mergekit.ramplus_tl(base, taus, epsilon=epsilon, **options)
        used = defaults | options
    for path, leaf in base.items():
        own = [tau[path] for tau in taus]
        expected = reinforced(leaf, own, epsilon=epsilon, **used)
        np.testing.assert_allclose(found[path], expected, rtol=1e-12)
        assert path == "one" or (found[path] != leaf).any()


def test_the_default_epsilon_is_a_number_and_no_share():
    base = {"w": jnp.zeros(3)}
    taus = [{"w": jnp.array([1.1e-5, 9e-6, 1.0])}, {"w": jnp.array([0.0, 1.0, 3.0])}]
    found = mergekit.ram(base, taus)["w"]
    np.testing.assert_allclose(found, [1.1e-5, 1.0, 2.0])


def test_wrong_input_is_refused():
    base, tau = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="exactly one task vector; found 2"):
        mergekit.arcee_fusion(base, [tau, tau])
    with pytest.raises(ValueError, match="epsilon is -1"):
        mergekit.ram(base, [tau], epsilon=-1.0)
    with pytest.raises(ValueError, match="alpha is nan"):
        mergekit.ramplus_tl(base, [tau], alpha=float("nan"))
    with pytest.raises(ValueError, match="task vector 0 has NaN"):
        mergekit.ram(base, [{"w": jnp.array([1.0, jnp.nan, 0.0])}])
