"""AWD for each row of a matrix separately: rows of a leaf, Gram matrices, Adam."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _awd_solvers
from jaxarith.merge._matrices import input_axis

# Entries of the Gram matrices that are solved at the same time: 2^14 rows of eight
# tasks.
ENTRIES = 2**20


def axis_of(path: str, leaf: jax.Array) -> int | None:
    """Returns the axis along which rows of a leaf run; None if the leaf is one row."""
    return input_axis(path) if jnp.ndim(leaf) == 2 and jnp.size(leaf) else None


@functools.partial(jax.jit, static_argnames="axis")
def grams(leaves: Sequence[jax.Array], axis: int | None) -> jax.Array:
    """Returns the inner products of the K vectors for every row, `[row, K, K]`.

    Args:
      leaves: a leaf of K task vectors.
      axis: the axis from `axis_of`.
    """
    rows = jnp.stack([_rows(leaf, axis) for leaf in _awd_solvers.widened(leaves)])
    return jnp.einsum("irn,jrn->rij", rows, rows, precision="highest")


def coefs(path: str, leaves: tuple, solve: Callable) -> jax.Array:
    """Returns the coefficients c of every row of a leaf.

    Their shape lets them multiply the leaf.

    Args:
      path: the leaf's path.
      leaves: the leaf of K task vectors.
      solve: `solve(grams[row, K, K], room[row]) -> c[row, K], length`. `room` is False,
        because c stays in the span.

    Returns:
      `[K]` for a leaf of one row; `[K, 1, n]` or `[K, m, 1]` for a matrix.
    """
    leaves = tree.gathered(leaves)
    axis = axis_of(path, leaves[0])
    of_rows = tree.settled(grams(leaves, axis))
    step = max(1, ENTRIES // of_rows[0].size)
    room = jnp.zeros(len(of_rows), bool)
    chunks = [slice(i, i + step) for i in range(0, len(of_rows), step)]
    found = jnp.concatenate([solve(of_rows[c], room[c])[0] for c in chunks])
    return found[0] if axis is None else jnp.expand_dims(found.T, axis)


def adam(
    part: dict[str, tuple[jax.Array, ...]],
    alpha: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    reverse: float | jax.Array,
) -> dict[str, jax.Array]:
    """Runs `_awd_solvers.adam` for every row of the leaves, with the same arguments."""

    def of_row(row):
        return _awd_solvers.adam({"": row}, alpha, step_size, steps, reverse)[""]

    def of_leaf(path, leaves):
        axis = axis_of(path, leaves[0])
        delta = jax.vmap(of_row)(tuple(_rows(leaf, axis) for leaf in leaves))
        return delta.T if axis == -2 else delta.reshape(leaves[0].shape)

    return {path: of_leaf(path, leaves) for path, leaves in part.items()}


def _rows(leaf, axis):
    if axis is None:
        return leaf.reshape(1, -1)
    return leaf.T if axis == -2 else leaf
