"""mergekit's merges that take over important entries: Arcee fusion and RAM."""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.typing import Params, Taus

_EPSILON = 1e-8  # added to every probability


def arcee_fusion(params_0: Params, taus: Taus) -> Params:
    r"""Takes over the most important entries of another model; the rest is the base.

    The importance of an entry is its change, times the change of the softmax of its row
    over the last axis:

    .. math:: |\tau_{ij}| \, \mathrm{KL}\big(\mathrm{softmax}(\theta_i) \,\|\,
              \mathrm{softmax}(\theta_{0,i})\big).

    An entry is taken over if its importance is at least the median plus 1.5
    interquartile ranges. The quantiles are over all entries of a leaf. mergekit takes
    them over a million entries, which it draws without a seed, so its result differs
    from run to run.

    Args:
      params_0: mergekit's base model.
      taus: one task vector.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not one task vector, one that does not fit, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([0.1, 0.1, 0.1, 0.1, 2.0])}]
      >>> print(arcee_fusion({"w": jnp.zeros(5)}, taus)["w"])
      [0.1 0.1 0.1 0.1 2. ]
      >>> taus = [{"w": jnp.array([0.1, 0.2, 0.3, 0.4, 2.0])}]
      >>> print(arcee_fusion({"w": jnp.zeros(5)}, taus)["w"])
      [0. 0. 0. 0. 2.]
    """
    _leaves.check(params_0, taus)
    if len(taus) != 1:
        raise ValueError(
            f"arcee_fusion takes exactly one task vector; found {len(taus)}. Merge "
            "them one after another."
        )
    return _leaves.fold_all(_fused, params_0, taus)


@_leaves.leaf_function(whole=True)
def _fused(leaf_0, taus):
    [tau] = taus
    # Computed once: a second computation, with the threshold, may round differently.
    importance = jax.lax.optimization_barrier(_importance(leaf_0, tau))
    last = importance.size - 1
    ranks = jnp.array([int(share * last) + 1 for share in (0.25, 0.5, 0.75)])
    lower, median, upper = _order.kth_magnitudes({"leaf": (importance,) * 3}, ranks)
    kept = importance >= median + 1.5 * (upper - lower)
    return leaf_0 + jnp.where(kept, tau, 0)


def _importance(leaf_0, tau):
    if not leaf_0.ndim:
        return jnp.zeros_like(tau)  # the softmax of one entry does not move
    before, after = (jax.nn.softmax(x) + _EPSILON for x in (leaf_0, leaf_0 + tau))
    # The sum of after - before is zero. With it no term is negative and none cancels.
    terms = after * jnp.log1p((after - before) / before) - (after - before)
    divergence = jnp.sum(jnp.maximum(terms, 0), axis=-1, keepdims=True)
    return jnp.abs(tau) * divergence


def ram(params_0: Params, taus: Taus, *, epsilon: float = 1e-5) -> Params:
    """Merges by reinforced agent merging (arXiv:2601.13572).

    A task vector is active at an entry if its magnitude there is above `epsilon`. If
    several task vectors are active, their mean is added. If only one is active, its
    whole entry is added.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      epsilon: absolute magnitude above which an entry is active.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a negative `epsilon`, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}]
      >>> print(ram({"w": jnp.zeros(2)}, taus)["w"])
      [2. 2.]
    """
    return _reinforced(params_0, taus, epsilon, 0.0, 0.0)


def ramplus_tl(
    params_0: Params,
    taus: Taus,
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Params:
    """Merges by RAM+, tensor by tensor: makes the entries of a single task larger.

    An entry where only one task is active is multiplied by
    1 + r · min(shared / unique, alpha). `unique` is the number of entries of the leaf
    where only this task is active; `shared` is the number where others are active too.

    Args:
      params_0, taus, epsilon: as for `ram`.
      r: factor of the ratio; 0 is `ram`.
      alpha: the largest ratio that counts.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: as for `ram`, or `alpha` is negative.

    Example:
      >>> taus = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}]
      >>> print(ramplus_tl({"w": jnp.zeros(2)}, taus, r=1.0, alpha=0.5)["w"])
      [2. 3.]
    """
    return _reinforced(params_0, taus, epsilon, r, alpha)


def _reinforced(params_0, taus, epsilon, r, alpha):
    for name, value in (("epsilon", epsilon), ("alpha", alpha)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative.")
    _leaves.check(params_0, taus)
    return _leaves.fold_all(_reinforced_leaf, params_0, taus, epsilon, r, alpha)


@_leaves.leaf_function(whole=True)
def _reinforced_leaf(leaf_0, taus, epsilon, r, alpha):
    active = [jnp.abs(tau) > epsilon for tau in taus]
    count = sum(mask.astype(jnp.int32) for mask in active)
    alone = [mask & (count == 1) for mask in active]
    unique = tree.counts(alone).astype(leaf_0.dtype)
    shared = tree.counts(active).astype(leaf_0.dtype) - unique
    factors = 1 + r * jnp.minimum(shared / jnp.maximum(unique, 1), alpha)
    parts = (
        jnp.where(own, factor * tau, jnp.where(mask, tau, 0) / jnp.maximum(count, 1))
        for tau, mask, own, factor in zip(taus, active, alone, factors, strict=True)
    )
    return leaf_0 + sum(parts)
