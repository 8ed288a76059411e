r"""Singular value calibration: shortens the shared directions of a merged vector.

Li, Peng, Zhang, Guo, Duan, Shi. When Shared Knowledge Hurts: Spectral
Over-Accumulation in Model Merging. ICML 2026. arXiv:2602.05536.

Let :math:`\tau = U \Sigma V^\top` be a matrix [output, input] of a merged vector. Task
t contributes this share to a direction :math:`u_r` of the outputs:

.. math:: s_t^r = \frac{\langle u_r^\top \tau,\; u_r^\top \tau_t \rangle}
                       {\|u_r^\top \tau_t\|^2}, \qquad
          \tilde\sigma_r = \frac{T}{\sum_t \max(\alpha, s_t^r)}\,\sigma_r.

A share of 1 means that the merged vector holds the task's own part of this direction
once. If all tasks point the same way, their sum holds it T times.
"""

import functools

import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices, wrapped
from jaxarith.typing import Coef, Params, Taus


def svc(
    params_0: Params,
    taus: Taus,
    merged: Params,
    *,
    alpha: float | None = None,
    coef: Coef = 1.0,
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> Params:
    r"""Calibrates the singular values of a merged vector, without data.

    Afterwards the coefficient of the merge has almost no effect. For :math:`c\,\tau`
    every share is c times as large, so the factor is 1/c times as large, except for
    shares below α. So compare with the merge at its *best* coefficient, not at 1.

    A direction in which all tasks have less than α becomes :math:`1 / \alpha` times as
    long; by default that is T times. Equal singular values have arbitrary directions.
    So after Iso-C, which makes all singular values equal, the result depends on the
    linear algebra of the machine.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: the T task vectors that were merged. A missing leaf counts as zero.
      merged: the result of a merge of them, for example `ties(params_0, taus)`, in
        float32. Rounded parameters hold too few digits of the vector.
      alpha: smallest share α that counts, above 0; by default 1 / T, as in the paper.
        The authors use 1 after TSV-Merge, which then only shortens.
      coef: the coefficient of the calibrated vector: one number, or one by path.
      matrices: a regular expression for the whole paths of the 2-D leaves to calibrate;
        by default those without `embed` in their path. The others stay as merged, times
        `coef`. None calibrates all.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output], as for `wudi`. None decides by the last name of a path.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: α is not above 0, `matrices` matches none of the 2-D leaves, `merged`
        does not have the structure of `params_0`, task vectors that do not fit, or
        non-finite values.

    Example:
      >>> taus = [{"kernel": jnp.diag(jnp.array([2.0, 1.0]))}] * 2
      >>> params_0 = {"kernel": jnp.zeros((2, 2))}
      >>> total = {"kernel": taus[0]["kernel"] * 2}
      >>> print(svc(params_0, taus, total)["kernel"])
      [[2. 0.]
       [0. 1.]]
    """
    options = {"alpha": alpha, "coef": coef, "matrices": matrices, "in_out": in_out}
    return wrapped.run(functools.partial(plan, **options), params_0, taus, merged)


def plan(
    rows: wrapped.Rows,
    *,
    alpha: float | None = None,
    coef: Coef = 1.0,
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> wrapped.Plan:
    """Plans the changes of `svc` to each leaf; it has the same arguments."""
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be above 0.")
    are_matrices = _matrices.which(rows, matrices)
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "svc")
    args = (are_matrices, are_in_out, alpha, wrapped.coefs(coef, rows))
    return wrapped.Plan(_change, args)


@_leaves.leaf_function(static=("is_matrix", "is_in_out"), whole=True)
def _change(leaf, row, is_matrix, is_in_out, alpha, coef):
    leaf_0, *taus = row
    if not is_matrix:
        return leaf_0 + coef * (leaf - leaf_0)

    def calibrated(found):
        return _calibrated(found[0], found[1:], alpha)

    vector = _matrices.as_out_in(calibrated, [leaf - leaf_0, *taus], is_in_out)
    return leaf_0 + coef * vector


def _calibrated(vector, taus, alpha):
    alpha = 1 / len(taus) if alpha is None else alpha
    u, s, vt = _matrices.svd(vector)
    own = s[:, None] * vt  # u_rᵀ τ for all directions, [r, input]
    shares = [_shares(own, u, tau) for tau in taus]
    counted = tree.total(jnp.maximum(alpha, share) for share in shares)
    return _matrices.dot(u * (len(taus) / counted * s)[None], vt)


def _shares(own, u, tau):
    part = _matrices.dot(u.T, tau)
    square = jnp.sum(part**2, axis=1)
    # A task that has no part in a direction has only rounding noise there.
    least = (16 * jnp.finfo(square.dtype).eps) ** 2 * jnp.sum(tau**2)
    is_part = square > least
    product = jnp.sum(own * part, axis=1)
    return jnp.where(is_part, product / jnp.where(is_part, square, 1), 0)
