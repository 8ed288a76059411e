r"""Subspace boosting: raises the small singular values of a merged vector.

Skorobogat, Roth, Georgescu, Akata. Subspace-Boosted Model Merging. arXiv:2506.16506.

For every matrix :math:`\tau = U \Sigma V^\top` of a merged vector, k is the smallest
number for which the k largest singular values have the share β of the sum of all. Then

.. math:: \tilde\sigma_r = \max(\sigma_r, \sigma_k).
"""

import functools

import jax.numpy as jnp

from jaxarith.merge import _leaves, _matrices, wrapped
from jaxarith.typing import Coef, Params, Taus


def subspace_boosting(
    params_0: Params,
    taus: Taus,
    merged: Params,
    *,
    beta: float = 0.01,
    coef: Coef = 1.0,
    matrices: str | None = None,
) -> Params:
    """Raises the small singular values of a merged vector, without data.

    The vector gets longer, so choose its coefficient again. With β = 0 all singular
    values become equal to the largest; up to its length, that is Iso-C of the merged
    vector. With β = 1 nothing changes. Directions whose singular value is zero up to
    rounding stay at zero.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: the task vectors that were merged; only their paths are used.
      merged: the result of a merge of them, in float32.
      beta: the share β in [0, 1]. The authors try values from 0 to 0.2; 0.01 is the
        default of a third-party implementation, merge-and-rebase.
      coef: the coefficient of the boosted vector: one number, or one by path.
      matrices: a regular expression for the whole paths of the 2-D leaves to boost; the
        others stay as merged, times `coef`. None boosts all. The authors split fused
        matrices of queries, keys and values into three.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: β is out of range, `matrices` matches none of the 2-D leaves, `merged`
        does not have the structure of `params_0`, task vectors that do not fit, or
        non-finite values.

    Example:
      >>> merged = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> params_0 = {"w": jnp.zeros((3, 3))}
      >>> print(subspace_boosting(params_0, [merged], merged, beta=0.6)["w"])
      [[3. 0. 0.]
       [0. 2. 0.]
       [0. 0. 2.]]
    """
    options = {"beta": beta, "coef": coef, "matrices": matrices}
    return wrapped.run(functools.partial(plan, **options), params_0, taus, merged)


def plan(
    rows: wrapped.Rows,
    *,
    beta: float = 0.01,
    coef: Coef = 1.0,
    matrices: str | None = None,
) -> wrapped.Plan:
    """Plans the changes of `subspace_boosting` to each leaf; same arguments."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be in [0, 1].")
    args = (_matrices.which(rows, matrices), beta, wrapped.coefs(coef, rows))
    return wrapped.Plan(_change, args)


@_leaves.leaf_function(static=("is_matrix",), whole=True)
def _change(leaf, row, is_matrix, beta, coef):
    vector = leaf - row[0]
    if is_matrix:
        u, s, vt = _matrices.svd(vector)
        vector = _matrices.dot(u * _boosted(s, beta)[None], vt)
    return row[0] + coef * vector


def _boosted(values, beta):
    shares = jnp.cumsum(values)
    first = jnp.sum(shares < beta * shares[-1])
    return jnp.maximum(values, values[first])
