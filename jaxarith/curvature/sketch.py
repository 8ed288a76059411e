r"""A few products Jᵀv that keep the terms between layers, which factors drop.

The rows u of a sketch have :math:`\sum_k u_k u_k^\top \approx E[J^\top J]`. They
approximate its largest eigenvalues and eigenvectors with one pass over the samples. One
chunk of rows after another is joined to the sketch, and the smallest directions are
dropped. Frequent Directions (Ghashami, Liberty, Phillips, Woodruff. 2015.
arXiv:1501.01711) does the same, but also shrinks the rows.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxarith import tree

# Rows `[n, ...]` by the path of a leaf.
Rows = Mapping[str, jax.Array]


def compress(rows: Rows, rank: int) -> dict[str, jax.Array]:
    r"""Returns the `rank` rows that best approximate :math:`\sum u u^\top` of n rows.

    Args:
      rows: n rows, in parts by leaf.
      rank: number of rows to keep, at most n.

    Returns:
      Orthogonal rows, the longest first. Their squared lengths are the largest
      eigenvalues of :math:`\sum u u^\top`.

    Example:
      >>> found = compress({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}, 1)
      >>> print(abs(found["w"]))
      [[3. 0.]]
    """
    gram = tree.total(_gram(part) for part in rows.values())
    _, vectors = jnp.linalg.eigh(gram)
    kept = vectors[:, ::-1][:, :rank].T
    return {path: _mixed(kept, part) for path, part in rows.items()}


def joined(first: Rows, second: Rows) -> dict[str, jax.Array]:
    """Joins the rows of two sketches."""
    return {path: jnp.concatenate([first[path], second[path]]) for path in first}


def product(rows: Rows, vector: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    r"""Returns :math:`\sum_k u_k (u_k \cdot \tau)`, for the leaves of the vector."""
    along = tree.total(
        jnp.tensordot(rows[path], leaf, leaf.ndim) for path, leaf in vector.items()
    )
    return {path: jnp.tensordot(along, rows[path], 1) for path in vector}


def _gram(part):
    flat = part.reshape(len(part), -1)
    return jnp.matmul(flat, flat.T, precision="highest")


def _mixed(weights, part):
    flat = part.reshape(len(part), -1)
    mixed = jnp.matmul(weights, flat, precision="highest")
    return mixed.reshape(len(weights), *part.shape[1:])
