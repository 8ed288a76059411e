r"""Singular value calibration: shared directions of a merged vector, shortened.

Li, Peng, Zhang, Guo, Duan, Shi. When Shared Knowledge Hurts: Spectral
Over-Accumulation in Model Merging. ICML 2026. arXiv:2602.05536.

Of every matrix [output, input] of a merged vector :math:`\tau = U \Sigma V^\top`, and
every direction :math:`u_r` of the outputs, task t contributes the share

.. math:: s_t^r = \frac{\langle u_r^\top \tau,\; u_r^\top \tau_t \rangle}
                       {\|u_r^\top \tau_t\|^2}, \qquad
          \tilde\sigma_r = \frac{T}{\sum_t \max(\alpha, s_t^r)}\,\sigma_r.

A share of 1 says that the merge holds the task's own part there once; where all tasks
point the same way a sum holds it T times.
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
    r"""Calibrates the singular values of what a merge gave. No data are needed.

    A coefficient of the merge has next to no effect any more: of :math:`c\,\tau` every
    share is c times as large and the factor 1/c of it, but for the shares below α. So
    compare with the merge at its *best* coefficient, and not at 1.

    Directions in which all tasks have less than α get :math:`1 / \alpha` times their
    length, T times with the default. Singular values that coincide have arbitrary
    directions: after Iso-C, whose output has but one singular value, the result depends
    on the linear algebra of the machine.

    Gradients take the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: the T task vectors that were merged. A leaf that one lacks counts as zero.
      merged: the parameters that a merge of them gave, such as `ties(params_0, taus)`;
        in float32, for rounded ones hold few digits of the vector.
      alpha: the least share α that counts, above 0: by default 1 / T, as in the paper.
        Its authors take 1 after TSV-Merge, which then only shortens.
      coef: the coefficient of the calibrated vector: one number, or one by path.
      matrices: a regular expression of the paths of the 2-D leaves that are calibrated:
        by default those with no `embed` in their path. The others stay as merged, times
        `coef`.
      in_out: a regular expression of the paths of matrices that are stored as [input,
        output], as for `wudi`; None goes by the last name of a path.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: α is not above 0, `matrices` matches none of the 2-D leaves, `merged`
        does not have the form of `params_0`, task vectors that do not fit, or
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
    """What `svc` does to each leaf; arguments as there."""
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
    own = s[:, None] * vt  # of all directions at once, [r, input]
    shares = [_shares(own, u, tau) for tau in taus]
    counted = tree.total(jnp.maximum(alpha, share) for share in shares)
    return _matrices.dot(u * (len(taus) / counted * s)[None], vt)


def _shares(own, u, tau):
    part = _matrices.dot(u.T, tau)
    square = jnp.sum(part**2, axis=1)
    # A task without a part in a direction has rounding noise there.
    least = (16 * jnp.finfo(square.dtype).eps) ** 2 * jnp.sum(tau**2)
    is_part = square > least
    product = jnp.sum(own * part, axis=1)
    return jnp.where(is_part, product / jnp.where(is_part, square, 1), 0)
