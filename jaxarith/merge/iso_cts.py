r"""Iso-CTS: isotropic merging in common and task-specific subspaces.

Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer. No Task Left Behind:
Isotropic Model Merging with Common and Task-Specific Subspaces. ICML 2025.
arXiv:2502.04959.

The top k triplets of :math:`\sum_t \tau_t`, with left vectors :math:`U_c`, and the top
(r - k)/T triplets of every residual

.. math:: \bar\tau_t = \tau_t - U_c U_c^\top \tau_t

are set side by side as U and V. With the orthogonal matrices nearest to them (as in
TSV-Merge) and the mean σ̄ of all these singular values, :math:`\tau = \bar\sigma\,
U_\perp V_\perp^\top`. Other leaves are averaged, as in the authors' code.

The residual is taken on the side of the outputs, so the method must know which side
that is.
"""

import functools

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.merge.iso_c import mean_of_nonzero
from jaxarith.typing import Coef, Params, Taus


def iso_cts(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    common: float = 0.8,
    matrices: str | None = None,
    in_out: str | None = None,
) -> Params:
    """Merges task vectors by Iso-CTS.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. The
        authors choose it on validation data.
      common: the share of singular vectors that come from the sum of the task vectors,
        in [0, 1]. It is rounded so that each task provides the same number of the
        others. If that is less than half a vector for each task, this is Iso-C.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose;
        the others are averaged. None decomposes all.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output]; the others are [output, input]. None decides by the last name
        of a path: `kernel` and `w` (Flax, Haiku) are [input, output]; `weight` and
        `embedding` (PyTorch, Equinox) are [output, input]. It warns about other names.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `common` out of range, `matrices` matches none of the 2-D leaves,
        several coefficients, no task vector, one that does not fit, or non-finite
        values.

    Example:
      >>> a, b = jnp.diag(jnp.array([5.0, 1])), jnp.diag(jnp.array([5.0, 0]))
      >>> taus = [{"w": a}, {"w": b}]
      >>> print(iso_cts({"w": jnp.zeros((2, 2))}, taus)["w"])
      [[5.5 0. ]
       [0.  5.5]]
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common is {common}; it must be in [0, 1].")
    _leaves.check(params_0, taus)
    coef = _leaves.vector_coef(coef, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "iso_cts")
    return _leaves.fold(
        _merge_leaf, params_0, taus, are_matrices, are_in_out, coef, common=common
    )


@_leaves.leaf_function(static=("is_matrix", "is_in_out", "common"), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, is_in_out, coef, common):
    if not is_matrix:
        return leaf_0 + coef * (sum(taus) / len(taus))
    merge = functools.partial(_merge_matrices, common=common)
    return leaf_0 + coef * _matrices.as_out_in(merge, taus, is_in_out)


def _merge_matrices(taus, common):
    """Returns the merged vector of matrices [output, input]."""
    size, tasks = min(taus[0].shape), len(taus)
    each = min(round((size - int(size * common)) / tasks), size // tasks)
    u, s, vt = (part[: size - tasks * each] for part in _triplets(sum(taus)))
    if each:

        def specific(tau):
            residual = tau - _matrices.dot(u.T, _matrices.dot(u, tau))
            return tuple(part[:each] for part in _triplets(residual))

        # One task at a time, so that memory holds the workspace of one decomposition.
        of_tasks = jax.lax.map(specific, jnp.stack(taus))
        u, s, vt = (
            jnp.concatenate([own.reshape(-1, *part.shape[1:]), part])
            for own, part in zip(of_tasks, (u, s, vt), strict=True)
        )
        u, vt = _matrices.polar(u), _matrices.polar(vt)
    return mean_of_nonzero(s) * _matrices.dot(u.T, vt)


def _triplets(matrix):
    """Returns left vectors as rows, singular values, and right vectors as rows."""
    u, s, vt = _matrices.svd(matrix)
    return u.T, s, vt
