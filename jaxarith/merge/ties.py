"""TIES: trim, elect sign, and merge the entries that agree.

Yadav, Tam, Choshen, Raffel, Bansal. TIES-Merging: Resolving Interference When Merging
Models. NeurIPS 2023. arXiv:2306.01708.

Where the paper is silent this follows the authors' code: one trimming threshold per
task over the whole vector, entries at the threshold kept, and an entry whose trimmed
values cancel exactly takes the sign of the majority of all entries. Without a majority
such an entry stays at zero here; their code keeps its negative values.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.tree import Tree


def ties(params_0: Tree, taus: Sequence[Tree], *, density=0.2, coef=1.0) -> Tree:
    """Merges task vectors by TIES, with the global trim and the disjoint mean.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero; a leaf that all lack
        does not count among the entries of which `density` is a share.
      density: the share of entries of every task vector that is kept, in (0, 1].
      coef: the coefficient λ of the merged vector.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `density` out of range, several coefficients, no task vector, one
        that does not fit, or non-finite values.

    Example:
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> taus = [{"w": jnp.array([4.0, 3.0, 0.1])}, {"w": jnp.array([2.0, -5.0, 0.2])}]
      >>> print(ties(params_0, taus, density=0.5)["w"])
      [ 3. -5.  0.]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    coef = jnp.asarray(coef, float)
    if coef.ndim:
        raise ValueError(
            f"coef has shape {list(coef.shape)}; TIES scales its one merged vector by "
            "one number."
        )
    _leaves.check(params_0, taus)
    rows = tree.aligned(taus)
    thresholds = trim_thresholds(rows, density)
    majority = jnp.sign(sum(_sign_sum(row, thresholds) for row in rows.values()))
    return _leaves.fold(_merge_leaf, params_0, taus, thresholds, majority, coef)


def trim_thresholds(rows: dict[str, tuple], density: float) -> jax.Array:
    """The magnitude `[T]` from which on the entries of each task vector are kept.

    It is the (d - ⌊density · d⌋)-th smallest of the d magnitudes of a vector. It is
    found exactly, without sorting or joining the leaves: magnitudes order as their bit
    patterns do, so counting the entries below a pattern, over all leaves, decides one
    of its bits.
    """
    size = sum(row[0].size for row in rows.values())
    rank = size - int(size * density)
    if size >= 2**31:
        raise ValueError(
            f"{size} entries in a task vector; at most 2^31 - 1 are counted."
        )
    dtype = jnp.result_type(
        jnp.float32, *(leaf for row in rows.values() for leaf in row)
    )
    return _kth_magnitude(tuple(rows.values()), rank, dtype=dtype.name)


@jax.jit(static_argnames="dtype")
def _kth_magnitude(rows, rank, dtype):
    bits = jnp.uint64 if dtype == "float64" else jnp.uint32
    width = jnp.dtype(bits).itemsize * 8

    def count_below(row, trial):
        magnitudes = jnp.abs(tree.stack_leaves(row).astype(dtype))
        patterns = jax.lax.bitcast_convert_type(magnitudes, bits)
        # Over all axes: raveling first would gather sharded leaves.
        axes = tuple(range(1, patterns.ndim))
        return jnp.sum(patterns < _column(trial, patterns), axes, dtype=jnp.int32)

    def decide_bit(i, found):
        # `found` are the leading bits of the answer. The next one is set if fewer than
        # `rank` entries lie below the pattern that has it set.
        trial = found | (jnp.ones_like(found) << (width - 2 - i).astype(bits))
        below = sum(count_below(row, trial) for row in rows)
        return jnp.where(below < rank, trial, found)

    found = jnp.zeros(len(rows[0]), bits)
    found = jax.lax.fori_loop(0, width - 1, decide_bit, found)
    return jax.lax.bitcast_convert_type(found, jnp.dtype(dtype))


def _column(values, like):
    """`[task]` as `[task, 1, ...]`, to compare with a leaf of all tasks."""
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _trim(taus, thresholds):
    return jnp.where(jnp.abs(taus) >= _column(thresholds, taus), taus, 0)


@jax.jit
def _sign_sum(row, thresholds):
    signs = jnp.sign(_trim(tree.stack_leaves(row), thresholds).sum(axis=0))
    return jnp.sum(signs, dtype=jnp.int32)


@jax.jit
def _merge_leaf(leaf_0, taus, thresholds, majority, coef):
    trimmed = _trim(taus, thresholds)
    sign = jnp.sign(trimmed.sum(axis=0))
    sign = jnp.where(sign == 0, majority, sign)
    # Disjoint mean: over the tasks whose kept entry has the elected sign.
    agrees = trimmed * sign[None] > 0
    total = jnp.sum(trimmed, axis=0, where=agrees)
    return leaf_0 + coef * total / jnp.maximum(agrees.sum(axis=0), 1)
