r"""Iso-C: isotropic merging in the common subspace: a flat spectrum for the sum.

Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer. No Task Left Behind:
Isotropic Model Merging with Common and Task-Specific Subspaces. ICML 2025.
arXiv:2502.04959.

.. math:: \sum_t \tau_t = U \operatorname{diag}(\sigma) V^\top, \qquad
          \tau = \bar\sigma\, U V^\top, \quad \bar\sigma = \frac{1}{r}\sum_i \sigma_i

for every matrix; other leaves are averaged, as in the authors' code. Here r counts only
the singular values that are not zero up to rounding. The directions of the others are
noise and stay at zero.
"""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus


def iso_c(
    params_0: Params, taus: Taus, *, coef: Coef = 1.0, matrices: str | None = None
) -> Params:
    """Merges task vectors by Iso-C.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. The
        authors choose it on validation data.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose;
        the others are averaged. None decomposes all.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `matrices` matches none of the 2-D leaves, several coefficients, no
        task vector, one that does not fit, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])}, {"w": 2 * jnp.eye(2)}]
      >>> print(iso_c({"w": jnp.zeros((2, 2))}, taus)["w"])
      [[3. 0.]
       [0. 3.]]
    """
    _leaves.check(params_0, taus)
    coef = _leaves.vector_coef(coef, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    return _leaves.fold(_merge_leaf, params_0, taus, are_matrices, coef)


@_leaves.leaf_function(static=("is_matrix",), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, coef):
    if not is_matrix:
        return leaf_0 + coef * (sum(taus) / len(taus))
    u, s, vt = _matrices.svd(tree.total(taus))
    return leaf_0 + coef * mean_of_nonzero(s) * _matrices.dot(u, vt)


def mean_of_nonzero(values: jax.Array) -> jax.Array:
    """Returns the mean of the values that are above zero; zero if there are none."""
    return jnp.sum(values) / jnp.maximum(jnp.sum(values > 0), 1)
