"""Finds the best product of low rank for a matrix.

Halko, Martinsson, Tropp. Finding Structure with Randomness. SIAM Review 2011.
arXiv:0909.4061 (algorithms 4.4 and 5.1).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EXACT = 256  # up to this shorter side, all singular values are computed
_MORE = 16  # extra directions in the sketch
_POWERS = 2  # iterations; each squares the gaps between singular values
_FIRST = 32  # the rank that is tried first if the energy is given


class LowRank(NamedTuple):
    """A product of factors of equal norms, `left @ right`.

    Attributes:
      left: `[m, r]`.
      right: `[r, n]`.
      squared_norm: squared norm of the whole matrix.
      energy: the share of the squared norm that the product keeps.
    """

    left: np.ndarray
    right: np.ndarray
    squared_norm: float
    energy: float


def low_rank(matrix: jax.Array, *, rank: int | None, energy: float | None) -> LowRank:
    """Returns the product of a matrix's leading singular directions.

    It is exact for small matrices and for large ranks. Otherwise it is found in a
    random sketch, whose error is far smaller than what the rank leaves out. The sketch
    is the same for every matrix of a shape.

    Args:
      matrix: `[m, n]`, in float32.
      rank: the largest rank; None allows any.
      energy: the share of the squared norm to reach; None keeps `rank`.

    Example:
      >>> matrix = jnp.diag(jnp.array([3.0, 1.0, 0.0]))
      >>> [
      ...     round(low_rank(matrix, rank=rank, energy=energy).energy, 3)
      ...     for rank, energy in ((1, None), (None, 1))
      ... ]
      [0.9, 1.0]
    """
    short = min(matrix.shape)
    total = float(np.sum(np.square(np.asarray(matrix, np.float64))))
    most = short if rank is None else min(rank, short)
    wanted = most if energy is None else min(most, _FIRST)
    while True:
        exact = short <= _EXACT or 3 * (wanted + _MORE) >= short
        found = _exact(matrix) if exact else _sketched(matrix, wanted + _MORE)
        u, s, vt = map(np.asarray, found)
        kept = np.cumsum(np.square(s, dtype=np.float64))
        reached = energy is not None and kept[:wanted][-1] >= energy * total
        if energy is None or reached or exact or wanted == most:
            break
        wanted = min(2 * wanted, most)
    if exact:
        wanted = most
    if energy is not None:
        wanted = min(wanted, 1 + int(np.searchsorted(kept, energy * total)))
    # Smaller singular values are only rounding.
    noise = 16 * np.finfo(s.dtype).eps * s[0]
    count = max(1, min(wanted, int(np.sum(s > noise))))
    roots = np.sqrt(s[:count])
    return LowRank(
        u[:, :count] * roots,
        roots[:, None] * vt[:count],
        total,
        min(1.0, float(kept[count - 1]) / total) if total else 1.0,
    )


@jax.jit
def _exact(matrix):
    return jnp.linalg.svd(matrix, full_matrices=False)


@functools.partial(jax.jit, static_argnames="width")
def _sketched(matrix, width):
    dot = functools.partial(jnp.dot, precision="highest")
    sketch = jax.random.normal(jax.random.key(0), (matrix.shape[1], width))
    q = jnp.linalg.qr(dot(matrix, sketch)).Q
    for _ in range(_POWERS):
        q = jnp.linalg.qr(dot(matrix.T, q)).Q
        q = jnp.linalg.qr(dot(matrix, q)).Q
    # Singular directions of the small matrix q' matrix, from the QR factors of its
    # transpose.
    right, triangle = jnp.linalg.qr(dot(matrix.T, q))
    u, s, vt = jnp.linalg.svd(triangle.T, full_matrices=False)
    return dot(q, u), s, dot(vt, right.T)
