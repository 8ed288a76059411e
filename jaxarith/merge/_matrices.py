"""Matrices among the leaves, and their singular vectors, for merges that need them.

Automatic differentiation treats singular vectors as constants. They have no derivative
where singular values are equal or zero, and JAX would return NaN. Singular values
are differentiated as :math:`\\operatorname{diag}(U^\\top M V)`, which is exact.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves

# The last part of a path tells the axis of a matrix that belongs to the inputs. Flax's
# `kernel` and Haiku's `w` are [input, output]. The `weight` of PyTorch and Equinox, and
# embeddings, are [output, input]. NNX adds `value` to the names of its arrays.
_IN_OUT = re.compile(r"(.*[/.])?(kernel|w)(/value)?")
_OUT_IN = re.compile(r"(.*[/.])?(weight|embeddings?)(/value)?")
NO_EMBEDDING = r"(?!.*embed).*"  # matrices that are used in matrix products


def which(rows: Mapping[str, tuple], pattern: str | None) -> dict[str, bool]:
    """Returns, by path, whether each leaf is merged as a matrix.

    The result is a static argument of `fold`.

    Args:
      rows: the leaf of every task, by path.
      pattern: a regular expression of whole slash paths, or None for every 2-D leaf.

    Raises:
      ValueError: 2-D leaves exist, but none of their paths matches.
    """
    rows = _leaves.unmapped(rows)
    planes = [p for p, row in rows.items() if jnp.ndim(row[0]) == 2 if row[0].size]
    found = {p for p in planes if pattern is None or re.fullmatch(pattern, p)}
    if planes and not found:
        raise ValueError(
            f"no 2-D leaf matches matrices={pattern!r}. The pattern must match whole "
            f"slash paths; the 2-D leaves include {', '.join(planes[:3])}. "
            "matrices=None takes all 2-D leaves."
        )
    return {path: path in found for path in rows}


def which_in_out(
    are_matrices: Mapping[str, bool], pattern: str | None, method: str
) -> dict[str, bool]:
    """Returns, by path, whether each matrix is stored as [input, output].

    The result is an argument of `fold`.

    Args:
      are_matrices: by path, whether a leaf is merged as a matrix.
      pattern: a regular expression for the whole slash paths of [input, output]
        matrices; None decides by the names of the leaves.
      method: name of the merge method, for the warning.
    """
    if pattern is not None:
        return {path: bool(re.fullmatch(pattern, path)) for path in are_matrices}
    unknown = [
        path
        for path, is_matrix in are_matrices.items()
        if is_matrix and not (_IN_OUT.fullmatch(path) or _OUT_IN.fullmatch(path))
    ]
    if unknown:
        warnings.warn(
            f"{method} merges {', '.join(tree.first_few(unknown, most=3))} as [output, "
            "input], because their names do not say which axis is which. Set in_out to "
            "a pattern that matches the paths of [input, output] matrices; "
            "in_out='(?!)' says that none is.",
            stacklevel=3,
        )
    return {path: bool(_IN_OUT.fullmatch(path)) for path in are_matrices}


def input_axis(path: str) -> int:
    """Returns the axis of a matrix that runs over the inputs of its layer: -2 or -1.

    It is -1 for a `weight` of PyTorch and -2 for a `kernel` of Flax, which is stored
    transposed. The name of the leaf decides.

    Args:
      path: slash path of the matrix.

    Example:
      >>> input_axis("dense/kernel"), input_axis("dense/weight")
      (-2, -1)
    """
    return -2 if _IN_OUT.fullmatch(path) else -1


def as_out_in(merge: Callable, taus: Sequence[jax.Array], is_in_out: bool) -> jax.Array:
    """Calls `merge` with [output, input] matrices; returns the original layout."""
    return merge([tau.T for tau in taus]).T if is_in_out else merge(taus)


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the thin singular value decomposition `u[m, r], s[r], vt[r, n]`.

    If a singular value is zero up to rounding, the function sets it and its vectors to
    zero. Such vectors are rounding noise, which methods that rescale directions would
    amplify.
    """
    fixed = jax.lax.stop_gradient(matrix)
    # LAPACK decomposes a tall matrix faster than a wide one: on 2 cores of an AMD EPYC,
    # [3072, 768] took 433 ms and [768, 3072] 597 ms with one thread (761 and 1865 ms
    # with two).
    wide = matrix.shape[0] < matrix.shape[1]
    u, s, vt = jnp.linalg.svd(fixed.T if wide else fixed, full_matrices=False)
    kept = s > 16 * jnp.finfo(s.dtype).eps * s[0]
    u, vt = u * kept[None], vt * kept[:, None]
    if wide:
        u, vt = vt.T, u.T
    return u, jnp.sum(dot(u.T, matrix) * vt, axis=1), vt


def polar(matrix: jax.Array) -> jax.Array:
    """Returns the nearest matrix with orthonormal columns or rows.

    Gradients treat it as a constant. For a matrix without full rank the result is the
    partial isometry, which is unique.
    """
    u, _, vt = svd(jax.lax.stop_gradient(matrix))
    return dot(u, vt)


def times_inverse(matrix: jax.Array, gram: jax.Array, cutoff: float) -> jax.Array:
    """Returns `matrix @ pinv(gram)`, `[m, n]`.

    `gram` must be symmetric and without negative eigenvalues.

    Args:
      matrix: `[m, n]`.
      gram: `[n, n]`.
      cutoff: eigenvalues up to this share of the largest count as zero.
    """
    # Eigenvectors have no derivative where eigenvalues are equal. So the inverse is a
    # constant here, and the last line has the derivative of the solution.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    kept = values > cutoff * values[-1]
    inverses = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

    def solve(right):
        return dot(dot(right, vectors) * inverses[None], vectors.T)

    x = jax.lax.stop_gradient(solve(matrix))
    return x + solve(matrix - dot(x, gram))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the matrix product in full precision, on accelerators too."""
    return jnp.dot(a, b, precision="highest")
