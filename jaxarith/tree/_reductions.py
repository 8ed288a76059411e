"""Sums over leaves: Gram matrices, cosines and counts, each leaf read once."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxarith import lazy
from jaxarith.tree._paths import flatten
from jaxarith.tree._placement import gathered, settled
from jaxarith.typing import Tree


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root with derivative 0, not NaN, at 0: what a norm at zero needs."""
    zero = x <= 0  # not `x > 0`, which would turn NaN into 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def gram(trees: Sequence[Tree]) -> jax.Array:
    r"""Inner products of trees, `G[i, j] = Σ_leaves <tree_i, tree_j>`.

    Cosines, norms, AWD and task-vector bases need no more of the task vectors than
    this. The leaves are read once; a leaf that a tree lacks is zero. Sharded leaves are
    gathered one after another, so that the result has the bits of one device.

    Args:
      trees: T trees whose common leaves have the same shapes.

    Returns:
      `[T, T]` in float32, or float64 where a leaf is.

    Example:
      >>> gram([{"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}])
      Array([[2., 2.],
             [2., 3.]], dtype=float32)
    """
    zero = jnp.zeros((len(trees), len(trees)), jnp.float32)
    return zero + gram_of(aligned(trees).values())


def gram_of(rows: Iterable[tuple]) -> jax.Array:
    """`gram` of trees, given as rows of one leaf of all trees; 0 if there is no row."""
    return total(settled(_leaf_gram(gathered(row))) for row in rows)


BLOCK = 8  # tasks whose products are summed in one pass


@jax.jit
def _leaf_gram(leaves):
    # Products of entries summed in one loop read each vector once. A matrix product
    # would first copy the leaves side by side, and raveling would gather their shards.
    count = len(leaves)
    dtype = lazy.wide_dtype(*leaves)
    leaves = [jnp.asarray(leaf, dtype) for leaf in leaves]
    gram = jnp.zeros((count, count), dtype)
    for first in range(0, count, BLOCK):
        for second in range(first, count, BLOCK):
            pairs = [
                (i, j)
                for i in range(first, min(first + BLOCK, count))
                for j in range(max(second, i), min(second + BLOCK, count))
            ]
            rows, columns = np.array(pairs).T
            products = sums([leaves[i] * leaves[j] for i, j in pairs])
            gram = gram.at[rows, columns].set(products)
            gram = gram.at[columns, rows].set(products)
    return gram


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays, entry by entry; the number 0 if there is none."""
    return cast(jax.Array, sum(terms))


def sums(terms: Sequence[jax.Array]) -> jax.Array:
    """The sums `[len(terms)]` over all entries of arrays of one shape, in one pass.

    Arrays that are computed from few others, as products of them are, are not stored,
    and the others are read once.
    """
    return _sums(tuple(terms))


@jax.custom_jvp
def _sums(terms):
    return counts(terms, terms[0].dtype)


@_sums.defjvp
def _sums_jvp(primals, tangents):
    return _sums(*primals), jnp.stack([jnp.sum(tangent) for tangent in tangents[0]])


def counts(conditions: Sequence[ArrayLike], dtype: DTypeLike = jnp.int32) -> jax.Array:
    """The numbers of true entries `[len(conditions)]`, in one pass, as `sums`."""
    terms = [_in_rows(jnp.atleast_1d(jnp.asarray(t, dtype))) for t in conditions]
    zero = jnp.zeros((), dtype)
    # XLA makes a loop over the last axis of several reductions at once, but only then.
    rows = jax.lax.reduce(
        terms,
        [zero] * len(terms),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        [terms[0].ndim - 1],
    )
    return jnp.stack([jnp.sum(row, dtype=dtype) for row in rows])


def _in_rows(term, longest=4096, width=1024):
    """A long last axis as rows: the loop over it adds up one by one, and rounds so."""
    *rest, length = term.shape
    if length <= longest:
        return term
    padding = [(0, 0)] * len(rest) + [(0, -length % width)]
    return jnp.pad(term, padding).reshape(*rest, -1, width)


def aligned(trees: Sequence[Tree]) -> Mapping[str, tuple]:
    """For each path that any tree has, its leaf in every tree.

    Where a tree lacks the leaf, zeros stand for it that take no memory. Leaves in files
    are read when their path is looked up.
    """
    flat = [flatten(tree) for tree in trees]
    aligned = {}
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        found = [leaves[path] for leaves in flat if path in leaves]
        shapes = {jnp.shape(leaf) for leaf in found}
        if len(shapes) > 1:
            raise ValueError(
                f"the trees disagree on the shape of {path}: {sorted(shapes)}."
            )
        zeros = np.zeros((), _common_dtype(found))
        zeros = np.broadcast_to(zeros, jnp.shape(found[0]))
        aligned[path] = tuple(_as_array(leaves.get(path, zeros)) for leaves in flat)
    return lazy.rows(aligned)


def _common_dtype(leaves):
    """Their dtype if they share one; of float8 and another there is no common one."""
    dtypes = {jnp.result_type(leaf) for leaf in leaves}
    return dtypes.pop() if len(dtypes) == 1 else lazy.wide_dtype(*leaves)


def _as_array(leaf):
    is_number = isinstance(leaf, numbers.Number | np.generic)
    return jnp.asarray(leaf) if is_number else leaf


def cosine(gram: jax.Array) -> jax.Array:
    """Cosines from a Gram matrix `[T, T]`; zero for a tree that is zero."""
    norms = safe_sqrt(jnp.diagonal(gram))
    scale = norms[:, None] * norms[None, :]
    zero = scale == 0
    return jnp.where(zero, 0, gram / jnp.where(zero, 1, scale))
