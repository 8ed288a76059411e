"""Matrices among the leaves, and their singular vectors, for merges that need them.

Singular vectors are taken as constants by automatic differentiation: where singular
values coincide or are zero they have no derivative, and JAX gives NaN. Singular values
are differentiated as :math:`\\operatorname{diag}(U^\\top M V)`, which is exact.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves

# The last part of a path says which side of a matrix its inputs are on: `kernel` of
# Flax and `w` of Haiku are [input, output]; `weight` of PyTorch and Equinox, and rows
# of embeddings, are [output, input]. Arrays of NNX have `value` behind their names.
_IN_OUT = re.compile(r"(.*[/.])?(kernel|w)(/value)?")
_OUT_IN = re.compile(r"(.*[/.])?(weight|embeddings?)(/value)?")
NO_EMBEDDING = r"(?!.*embed).*"  # matrices that something is multiplied with


def which(rows: Mapping[str, tuple], pattern: str | None) -> dict[str, bool]:
    """Whether each leaf is merged as a matrix: an argument of `fold`, a static one.

    Args:
      rows: the leaf of every task, by path.
      pattern: a regular expression of whole slash paths, or None for every 2-D leaf.

    Raises:
      ValueError: there are 2-D leaves, and none of their paths matches.
    """
    rows = _leaves.unmapped(rows)
    planes = [p for p, row in rows.items() if jnp.ndim(row[0]) == 2 if row[0].size]
    found = {p for p in planes if pattern is None or re.fullmatch(pattern, p)}
    if planes and not found:
        raise ValueError(
            f"no 2-D leaf matches matrices={pattern!r}. The pattern must match whole "
            f"slash paths, such as {', '.join(planes[:3])}; matrices=None takes all "
            "2-D leaves."
        )
    return {path: path in found for path in rows}


def which_in_out(
    are_matrices: Mapping[str, bool], pattern: str | None, method: str
) -> dict[str, bool]:
    """Whether each matrix is stored as [input, output]: an argument of `fold`.

    Args:
      are_matrices: by path, whether a leaf is merged as a matrix.
      pattern: a regular expression of whole slash paths; None goes by the names.
      method: the method that depends on it, which a warning names.
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
            "input]: their names do not say. Give in_out, a pattern of the paths of "
            "matrices that are [input, output]; in_out='(?!)' says that none is.",
            stacklevel=3,
        )
    return {path: bool(_IN_OUT.fullmatch(path)) for path in are_matrices}


def input_axis(path: str) -> int:
    """The axis along which the rows of a PyTorch weight run: over a layer's inputs.

    A Flax `kernel` is that weight transposed.
    """
    return -2 if _IN_OUT.fullmatch(path) else -1


def as_out_in(merge: Callable, taus: Sequence[jax.Array], is_in_out: bool) -> jax.Array:
    """`merge(taus)` of matrices [output, input], in the layout in which they came."""
    return merge([tau.T for tau in taus]).T if is_in_out else merge(taus)


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition `u[m, r], s[r], vt[r, n]`.

    Where a singular value is zero to rounding it and its vectors are exactly zero:
    such vectors are rounding noise, and methods that give directions new lengths would
    amplify it.
    """
    fixed = jax.lax.stop_gradient(matrix)
    # A tall matrix is first factored by QR, six times as slow on a CPU as the transpose
    # of a wide one.
    tall = matrix.shape[0] > matrix.shape[1]
    u, s, vt = jnp.linalg.svd(fixed.T if tall else fixed, full_matrices=False)
    kept = s > 16 * jnp.finfo(s.dtype).eps * s[0]
    u, vt = u * kept[None], vt * kept[:, None]
    if tall:
        u, vt = vt.T, u.T
    return u, jnp.sum(dot(u.T, matrix) * vt, axis=1), vt


def polar(matrix: jax.Array) -> jax.Array:
    """The nearest matrix with orthonormal columns or rows, a constant for gradients.

    Of a matrix that lacks full rank this is the partial isometry, which is unique.
    """
    u, _, vt = svd(jax.lax.stop_gradient(matrix))
    return dot(u, vt)


def times_inverse(matrix: jax.Array, gram: jax.Array, cutoff: float) -> jax.Array:
    """`matrix @ pinv(gram)`, for a symmetric `gram` with no negative eigenvalues.

    Args:
      matrix: `[m, n]`.
      gram: `[n, n]`.
      cutoff: eigenvalues up to this share of the largest count as zero.
    """
    # Eigenvectors have no derivative where eigenvalues coincide, so the inverse is a
    # constant here, and the second step has the derivative of the solution.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    kept = values > cutoff * values[-1]
    inverses = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

    def solve(right):
        return dot(dot(right, vectors) * inverses[None], vectors.T)

    x = jax.lax.stop_gradient(solve(matrix))
    return x + solve(matrix - dot(x, gram))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product in full precision, on accelerators too."""
    return jnp.dot(a, b, precision="highest")
