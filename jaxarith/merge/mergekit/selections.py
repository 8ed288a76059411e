"""mergekit's merges that select entries: SCE and nearswap."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.merge.ties import agreeing
from jaxarith.typing import Coef, Params, Taus


def sce(params_0: Params, taus: Taus, *, select_topk: Coef = 1.0) -> Params:
    """Merges by SCE: selects entries that vary, weights models, erases minority signs.

    Wan, Zhong, Yang, Zhang, Li, Quan. FuseChat. arXiv:2408.07990.

    Every leaf keeps the entries with the largest variance over the models. If m entries
    have a variance above zero, ⌊select_topk·m⌋ of them are kept, but at least one;
    mergekit may keep none. Entries of equal variance are all kept. The weight of a
    model is its share in the sum of mean squares; if that sum is below 1e-6, all
    weights are equal. Entries whose sign differs from that of the sum over models are
    erased, and the rest is averaged with the weights.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      select_topk: the share of entries, in [0, 1]: one number, or one by path. 1
        selects all entries, even those without variance; 0 selects none.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a share out of range, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([3.0, -1.0])}, {"w": jnp.array([1.0, 3.0])}]
      >>> print(sce(params_0, taus)["w"])  # the weights are equal
      [2. 3.]
    """
    _leaves.check(params_0, taus)
    shares = _leaves.vector_coef(select_topk, taus, "select_topk")
    for path, share in tree.flatten(shares).items():
        known = not isinstance(share, Tracer)
        if known and not 0 <= np.asarray(share) <= 1:
            where = f" of {path}" if path else ""
            raise ValueError(f"select_topk{where} is {share}; it must be in [0, 1].")
    rows = _leaves.Mapped(tree.gathered, tree.aligned(taus))  # SCE sums over leaves
    rows = _leaves.Mapped(_select, rows, shares)
    return _leaves.fold_all(_sce_leaf, params_0, rows)


@_leaves.leaf_function
def _sce_leaf(leaf_0, taus):
    squares = tree.sums([tau * tau for tau in taus]) / leaf_0.size
    total = jnp.sum(squares)
    small = total < 1e-6
    weights = jnp.where(small, 1 / len(taus), squares / jnp.where(small, 1, total))
    taus, _ = agreeing(taus, 1)
    merged = sum(w * tau for w, tau in zip(weights, taus, strict=True))
    weight = sum(w * (tau != 0) for w, tau in zip(weights, taus, strict=True))
    return leaf_0 + merged / jnp.maximum(weight, 1e-6)


def _select(row, share):
    # A separate program computes the variance. A second computation, with the
    # threshold, may round differently and lose the entry that the threshold comes from.
    return _keep_varying(row, _variance(row), share)


@jax.jit
def _variance(row):
    """Returns the variance of every entry of a leaf over the tasks."""
    row = [_leaves.widened(tau) for tau in row]
    # Differences from the first task make the variance of equal entries exactly zero.
    rest = [tau - row[0] for tau in row]
    mean = sum(rest) / len(row)
    return sum((tau - mean) ** 2 for tau in rest) / len(row)


@jax.jit
def _keep_varying(row, variance, share):
    some = tree.counts([variance > 0])[0]
    kept = jnp.maximum((some * share).astype(jnp.int32), 1)
    rank = variance.size - kept + 1
    least = _order.kth_magnitudes({"leaf": (variance,)}, rank)[0]
    varying = (variance >= least) & (variance > 0) & (share > 0)
    row = [_leaves.widened(tau) for tau in row]
    return tuple(jnp.where(varying | (share >= 1), tau, 0) for tau in row)


def nearswap(params_0: Params, taus: Taus, *, t: Coef) -> Params:
    """Moves every entry towards another model, by the share min(1, t/|τ|).

    So an entry that is near to the base is taken over completely.

    Args:
      params_0: mergekit's base model.
      taus: a list of one task vector.
      t: largest change of an entry: one number, or one by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not one task vector, one that does not fit, non-finite values, or
        several numbers `t`.

    Example:
      >>> taus = [{"w": jnp.array([0.1, -2.0])}]
      >>> print(nearswap({"w": jnp.zeros(2)}, taus, t=0.5)["w"])
      [ 0.1 -0.5]
    """
    _leaves.check(params_0, taus)
    if len(taus) != 1:
        raise ValueError(
            f"nearswap takes exactly one task vector; found {len(taus)}. Merge them "
            "one after another."
        )
    return _leaves.fold_all(
        _swap_leaf, params_0, taus, _leaves.vector_coef(t, taus, "t")
    )


@_leaves.leaf_function
def _swap_leaf(leaf_0, taus, t):
    share = (t / jnp.maximum(jnp.abs(taus[0]), 1e-6)).clip(0, 1)
    return leaf_0 + share * taus[0]
