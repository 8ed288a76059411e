r"""TSV-Merge: the leading singular vectors of every task, made orthogonal.

Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodolà. Task Singular Vectors:
Reducing Task Interference in Model Merging. CVPR 2025. arXiv:2412.00081.

Every matrix :math:`\tau_t = U_t \Sigma_t V_t^\top` keeps the top :math:`k = \lfloor r/T
\rfloor` of its :math:`r` triplets. Side by side they are :math:`U, \Sigma, V`, and

.. math:: \tau = U_\perp \Sigma V_\perp^\top, \qquad
          X_\perp = \arg\min_{X_\perp^\top X_\perp = I} \|X_\perp - X\|_F = P Q^\top
          \ \text{for}\ X = P D Q^\top.

Other leaves are averaged, as in the authors' code. A matrix with fewer singular values
than tasks is averaged too; in the authors' code it stays at the pre-trained values.
"""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus


def tsv(
    params_0: Params, taus: Taus, *, coef: Coef = 1.0, matrices: str | None = None
) -> Params:
    """Merges task vectors by TSV-Merge.

    Gradients treat the singular vectors as constants, so they only go through the
    singular values.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose;
        the others are averaged. None decomposes all.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `matrices` matches none of the 2-D leaves, several coefficients, no
        task vector, one that does not fit, or non-finite values.

    Example:
      >>> a, b = jnp.diag(jnp.array([2.0, 1])), jnp.diag(jnp.array([1.0, 3]))
      >>> taus = [{"w": a}, {"w": b}]
      >>> print(tsv({"w": jnp.zeros((2, 2))}, taus)["w"])
      [[2. 0.]
       [0. 3.]]
    """
    _leaves.check(params_0, taus)
    coef = _leaves.vector_coef(coef, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    return _leaves.fold(_merge_leaf, params_0, taus, are_matrices, coef)


@_leaves.leaf_function(static=("is_matrix",), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, coef):
    rank = min(leaf_0.shape) // len(taus) if is_matrix else 0
    if not rank:
        return leaf_0 + coef * (sum(taus) / len(taus))
    if len(taus) == 1:  # the decomposition of one vector multiplies back to the vector
        return leaf_0 + coef * taus[0]

    def leading(tau):
        u, s, vt = _matrices.svd(tau)
        return u.T[:rank], s[:rank], vt[:rank]

    # One task at a time, so that memory holds the workspace of one decomposition.
    ut, s, vt = jax.lax.map(leading, jnp.stack(taus))
    u = _matrices.polar(ut.reshape(-1, ut.shape[-1])).T
    v = _matrices.polar(vt.reshape(-1, vt.shape[-1]))
    return leaf_0 + coef * _matrices.dot(u * s.reshape(1, -1), v)
