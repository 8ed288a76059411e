r"""Isotropise: makes the spectrum of any merged vector flat, as Iso-C does for the sum.

Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer. No Task Left Behind:
Isotropic Model Merging with Common and Task-Specific Subspaces. ICML 2025.
arXiv:2502.04959.

.. math:: \tau = U \operatorname{diag}(\sigma) V^\top \;\to\; \bar\sigma\, U V^\top
"""

import functools

from jaxarith.merge import _leaves, _matrices, wrapped
from jaxarith.merge.iso_c import mean_of_nonzero
from jaxarith.typing import Coef, Params, Taus


def isotropise(
    params_0: Params,
    taus: Taus,
    merged: Params,
    *,
    coef: Coef = 1.0,
    matrices: str | None = None,
) -> Params:
    """Sets all singular values of each matrix of a merged vector to their mean.

    After the sum of task vectors, its matrices are those of Iso-C. The other leaves
    differ, because Iso-C averages them. Directions whose singular value is zero up to
    rounding stay at zero.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: the task vectors that were merged; only their paths are used.
      merged: the result of a merge of them, in float32.
      coef: the coefficient of the isotropic vector: one number, or one by path.
      matrices: a regular expression for the whole paths of the 2-D leaves to change;
        the others stay as merged, times `coef`. None changes all.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: `matrices` matches none of the 2-D leaves, `merged` does not have the
        structure of `params_0`, task vectors that do not fit, or non-finite values.

    Example:
      >>> import numpy as np
      >>> merged = {"w": np.diag([3.0, 1.0])}
      >>> print(isotropise({"w": np.zeros((2, 2))}, [merged], merged)["w"])
      [[2. 0.]
       [0. 2.]]
    """
    options = {"coef": coef, "matrices": matrices}
    return wrapped.run(functools.partial(plan, **options), params_0, taus, merged)


def plan(
    rows: wrapped.Rows, *, coef: Coef = 1.0, matrices: str | None = None
) -> wrapped.Plan:
    """Plans the changes of `isotropise` to each leaf; it has the same arguments."""
    args = (_matrices.which(rows, matrices), wrapped.coefs(coef, rows))
    return wrapped.Plan(_change, args)


@_leaves.leaf_function(static=("is_matrix",), whole=True)
def _change(leaf, row, is_matrix, coef):
    vector = leaf - row[0]
    if is_matrix:
        u, s, vt = _matrices.svd(vector)
        vector = mean_of_nonzero(s) * _matrices.dot(u, vt)
    return row[0] + coef * vector
