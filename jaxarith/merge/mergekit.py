"""mergekit's merges, tensor by tensor as its version 0.1.5 defines them.

They give the models that people's mergekit files give; the operators of
`jaxarith.merge` follow the papers, which differ. Parameters are named as in those
files, `lambda` apart, which is `coef`. Every number that a file can set by layer or by
filter may be a function of a tensor's path.

mergekit merges task vectors, or, without a base model, the models themselves. Here
these are the task vectors of parameters that are zero: `linear`, `slerp`, `karcher`,
`nuslerp` and `multislerp` then are those of the models.

All sums are taken in float32 or better and cast once; mergekit computes most in the
dtype of the checkpoints. Its `int8_mask` has no effect on a result, nor here.

`karcher` is that of `jaxarith.merge`, which differs where models of norm below 1e-5
meet others, and where directions cancel: mergekit then takes that of the first model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.merge.karcher import karcher as karcher
from jaxarith.merge.mergekit_arithmetic import (
    generalized_task_arithmetic as generalized_task_arithmetic,
)
from jaxarith.merge.mergekit_models import linear as linear
from jaxarith.merge.mergekit_models import multislerp as multislerp
from jaxarith.merge.mergekit_models import nuslerp as nuslerp
from jaxarith.merge.mergekit_models import slerp as slerp
from jaxarith.merge.ties import agreeing
from jaxarith.tree import Tree


def model_stock(params_0: Tree, taus: Sequence[Tree], *, filter_wise=False) -> Tree:
    """Model Stock with the cosines as they are: see `merge.model_stock`.

    Three things differ from that one. A negative cosine moves away from the mean; where
    the formula then has no value the leaf stays at `params_0`. A product of two norms
    below 1e-6 counts as 1e-6, which lowers the cosines of short vectors. And rows may
    have a ratio of their own.

    Args:
      params_0: pre-trained parameters.
      taus: N ≥ 2 task vectors. A leaf that one lacks counts as zero.
      filter_wise: whether every row along the last axis counts as a layer, and not the
        leaf.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: fewer than two task vectors, one that does not fit, or non-finite
        values.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([5.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}]
      >>> print(model_stock(params_0, taus)["w"])  # cos φ = 0.6, t = 0.75
      [3.  1.5]
    """
    _leaves.check(params_0, taus, least=2)
    return _leaves.fold(_stock_leaf, params_0, taus, filter_wise=filter_wise)


@_leaves.leaf_function(static="filter_wise", whole=True)
def _stock_leaf(leaf_0, taus, filter_wise):
    count = len(taus)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    products = [taus[i] * taus[j] for i, j in pairs]
    if filter_wise and leaf_0.ndim:
        products = [jnp.sum(product, -1, keepdims=True) for product in products]
    else:
        products = tree.sums(products)
    inner = dict(zip(pairs, products, strict=True))
    norms = [tree.safe_sqrt(inner[i, i]) for i in range(count)]
    cosines = [
        (inner[i, j] / jnp.maximum(norms[i] * norms[j], 1e-6)).clip(-1, 1)
        for i, j in pairs
        if i != j
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    singular = jnp.abs(divisor) < 1e-6
    ratio = jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, divisor))
    return leaf_0 + ratio / count * sum(taus)


def sce(params_0: Tree, taus: Sequence[Tree], *, select_topk=1.0) -> Tree:
    """SCE: select entries that vary, calculate weights, erase minority signs.

    Wan, Zhong, Yang, Zhang, Li, Quan. FuseChat. arXiv:2408.07990.

    In every leaf the entries are kept whose variance over the models is largest:
    ⌊select_topk·m⌋ of the m entries with any, at least one; mergekit then keeps none.
    Of entries with equal variance all are kept. The weight of a model is its share in
    the sum of mean squares, but all are equal where that sum is below 1e-6. Entries
    without the sign of the sum over models are erased, and the rest is averaged by
    weight.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      select_topk: the share, in [0, 1]: one number, or a function of the path. One
        selects all entries, those without variance too; zero none.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a share out of range, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([3.0, -1.0])}, {"w": jnp.array([1.0, 3.0])}]
      >>> print(sce(params_0, taus)["w"])  # of equal weights
      [2. 3.]
    """
    _leaves.check(params_0, taus)
    shares = _leaves.vector_coef(select_topk, taus, "select_topk")
    for path, share in tree.flatten(shares).items():
        known = not isinstance(share, jax.core.Tracer)
        if known and not 0 <= np.asarray(share) <= 1:
            where = f" of {path}" if path else ""
            raise ValueError(f"select_topk{where} is {share}; it must be in [0, 1].")
    rows = _leaves.Mapped(tree.gathered, tree.aligned(taus))  # it sums over leaves
    rows = _leaves.Mapped(_select, rows, shares)
    return _leaves.fold(_sce_leaf, params_0, rows)


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
    # The variance is the result of a program: to compute it again, with the threshold,
    # may round it otherwise, and lose the very entry that the threshold comes from.
    return _keep_varying(row, _variance(row), share)


@jax.jit
def _variance(row):
    """The variance over the tasks of every entry of a leaf."""
    row = [_leaves.widened(tau) for tau in row]
    # From the first task: the variance of equal entries is zero, not rounding.
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


def nearswap(params_0: Tree, taus: Sequence[Tree], *, t) -> Tree:
    """Takes over from the other model the entries that are near: min(1, t/|τ|) of each.

    Args:
      params_0: mergekit's base model.
      taus: one task vector.
      t: the distance up to which an entry is taken over whole: one number, or a
        function of the path.

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
            f"nearswap merges one model into its base; found {len(taus)} task vectors."
        )
    return _leaves.fold(_swap_leaf, params_0, taus, _leaves.vector_coef(t, taus, "t"))


@_leaves.leaf_function
def _swap_leaf(leaf_0, taus, t):
    share = (t / jnp.maximum(jnp.abs(taus[0]), 1e-6)).clip(0, 1)
    return leaf_0 + share * taus[0]
