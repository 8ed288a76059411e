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
    """Returns the square root; its derivative at 0 is 0, not NaN.

    The gradient of a norm at zero needs that.

    Example:
      >>> print(safe_sqrt(jnp.array(9.0)), jax.grad(safe_sqrt)(0.0))
      3.0 0.0
    """
    zero = x <= 0  # not `x > 0`, which would turn NaN into 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def gram(trees: Sequence[Tree]) -> jax.Array:
    r"""Returns the inner products of trees, `G[i, j] = Σ_leaves <tree_i, tree_j>`.

    Cosines, norms, AWD and task-vector bases need nothing else from the task vectors.
    Each leaf is read once. A leaf that a tree lacks counts as zero. Sharded leaves are
    gathered one after another, so the result has the same bits as on one device.

    Args:
      trees: T trees whose common leaves have the same shapes.

    Returns:
      `[T, T]` in float32, or in float64 if a leaf is float64.

    Raises:
      ValueError: common leaves differ in shape.

    Example:
      >>> gram([{"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}])
      Array([[2., 2.],
             [2., 3.]], dtype=float32)
    """
    zero = jnp.zeros((len(trees), len(trees)), jnp.float32)
    return zero + gram_of(aligned(trees).values())


def gram_of(rows: Iterable[tuple]) -> jax.Array:
    """Returns `gram` of trees that are given row by row; 0 if there is no row.

    Args:
      rows: for each path, the tuple of its leaves in all trees, as in `aligned`.

    Example:
      >>> print(gram_of([(jnp.ones(2), jnp.zeros(2))]))
      [[2. 0.]
       [0. 0.]]
    """
    return total(settled(_leaf_gram(gathered(row))) for row in rows)


BLOCK = 8  # number of tasks whose products are summed in one pass


@jax.jit
def _leaf_gram(leaves):
    # One loop that sums the products of entries reads each vector once. A matrix
    # product would first copy the leaves side by side, and raveling would gather their
    # shards.
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
    """Returns the sum of arrays, entry by entry; the number 0 if there is no array.

    Example:
      >>> print(total([jnp.ones(2), jnp.ones(2)]))
      [2. 2.]
    """
    return cast(jax.Array, sum(terms))


def sums(terms: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum over all entries of each array, `[len(terms)]`, in one pass.

    If the arrays are computed from a few others, for example as their products, they
    are not stored, and the others are read once.

    Args:
      terms: arrays of one shape.

    Example:
      >>> print(sums([jnp.ones(3), jnp.arange(3.0)]))
      [3. 3.]
    """
    return _sums(tuple(terms))


@jax.custom_jvp
def _sums(terms):
    return counts(terms, terms[0].dtype)


@_sums.defjvp
def _sums_jvp(primals, tangents):
    return _sums(*primals), jnp.stack([jnp.sum(tangent) for tangent in tangents[0]])


def counts(conditions: Sequence[ArrayLike], dtype: DTypeLike = jnp.int32) -> jax.Array:
    """Returns the number of true entries of each array, `[len(conditions)]`.

    Like `sums`, it takes one pass.

    Args:
      conditions: `bool` arrays of one shape.
      dtype: dtype of the counts.

    Example:
      >>> print(counts([jnp.array([True, False]), jnp.array([True, True])]))
      [1 2]
    """
    terms = [_in_rows(jnp.atleast_1d(jnp.asarray(t, dtype))) for t in conditions]
    zero = jnp.zeros((), dtype)
    # XLA fuses several reductions into one loop only if they reduce the last axis.
    rows = jax.lax.reduce(
        terms,
        [zero] * len(terms),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        [terms[0].ndim - 1],
    )
    return jnp.stack([jnp.sum(row, dtype=dtype) for row in rows])


def _in_rows(term, longest=4096, width=1024):
    """Cuts a long last axis into rows.

    The loop adds entries one by one, so the rounding error grows with the length.
    """
    *rest, length = term.shape
    if length <= longest:
        return term
    padding = [(0, 0)] * len(rest) + [(0, -length % width)]
    return jnp.pad(term, padding).reshape(*rest, -1, width)


def aligned(trees: Sequence[Tree]) -> Mapping[str, tuple]:
    """Returns, for each path that any tree has, its leaf in every tree.

    If a tree lacks a leaf, zeros that take no memory stand for it. Leaves in files are
    read when their path is looked up.

    Raises:
      ValueError: common leaves differ in shape.

    Example:
      >>> rows = aligned([{"a": np.array(1.0)}, {"b": np.array(2.0)}])
      >>> {path: tuple(map(float, row)) for path, row in rows.items()}
      {'a': (1.0, 0.0), 'b': (0.0, 2.0)}
    """
    flat = [flatten(tree) for tree in trees]
    aligned = {}
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        found = [leaves[path] for leaves in flat if path in leaves]
        shapes = {jnp.shape(leaf) for leaf in found}
        if len(shapes) > 1:
            raise ValueError(
                f"the trees differ in the shape of {path}: {sorted(shapes)}; expected "
                "one shape. Check that all trees come from the same model."
            )
        zeros = np.zeros((), _common_dtype(found))
        zeros = np.broadcast_to(zeros, jnp.shape(found[0]))
        aligned[path] = tuple(_as_array(leaves.get(path, zeros)) for leaves in flat)
    return lazy.rows(aligned)


def _common_dtype(leaves):
    """Returns the common dtype; float8 and another dtype have none in JAX."""
    dtypes = {jnp.result_type(leaf) for leaf in leaves}
    return dtypes.pop() if len(dtypes) == 1 else lazy.wide_dtype(*leaves)


def _as_array(leaf):
    is_number = isinstance(leaf, numbers.Number | np.generic)
    return jnp.asarray(leaf) if is_number else leaf


def cosine(gram: jax.Array) -> jax.Array:
    """Returns the cosines `[T, T]` from a Gram matrix `[T, T]`.

    The cosines of a tree that is zero are zero.

    Example:
      >>> print(cosine(jnp.array([[4.0, 3.0], [3.0, 9.0]])))
      [[1.  0.5]
       [0.5 1. ]]
    """
    norms = safe_sqrt(jnp.diagonal(gram))
    scale = norms[:, None] * norms[None, :]
    zero = scale == 0
    return jnp.where(zero, 0, gram / jnp.where(zero, 1, scale))
