r"""CART: the mean of the tasks, plus low-rank parts of their differences from it.

Choi, Kim, Lee, Hong. Revisiting Weight Averaging for Model Merging. 2024.
arXiv:2412.12153.

.. math:: \tau = \bar\tau + \lambda \sum_t \operatorname{SVD}_k(\tau_t - \bar\tau),
          \qquad \bar\tau = \frac{1}{T} \sum_t \tau_t

for every matrix, where :math:`\operatorname{SVD}_k` keeps the top k singular triplets.
Other leaves are averaged. The differences sum to zero, so with all triplets the result
is the average. For two task vectors it is the average with any k, because the two
differences are opposite.
"""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus


def cart(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 2.3,
    rank: float = 0.16,
    matrices: str | None = None,
) -> Params:
    """Merges task vectors by CART.

    The defaults come from the authors' code for eight tasks on ViT-B/32, where CART is
    the start of AdaRank (arXiv:2503.22178). That code uses coefficients near 1 on
    ViT-L/14, and a rank of 0.32 for 20 tasks. In the paper the best rank is about 0.08.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient λ of the low-rank parts, but not of the mean: one number, or
        one by path. With 0 the result is the average, not the pre-trained model. The
        authors choose λ by model and number of tasks.
      rank: k as a share of the number of singular values, in (0, 1]; at least one is
        kept.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose;
        the others are averaged. None decomposes all; the authors decompose those of
        attention and MLP.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `rank` out of range, `matrices` matches none of the 2-D leaves,
        several coefficients, no task vector, one that does not fit, or non-finite
        values.

    Example:
      >>> taus = [{"w": jnp.diag(jnp.array(x))} for x in [[6.0, 1], [0, 5.0], [0, 0.0]]]
      >>> print(cart({"w": jnp.zeros((2, 2))}, taus, coef=1.0, rank=0.5)["w"])
      [[4. 0.]
       [0. 5.]]
    """
    if not 0 < rank <= 1:
        raise ValueError(f"rank is {rank}; it must be in (0, 1].")
    _leaves.check(params_0, taus)
    coef = _leaves.vector_coef(coef, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    return _leaves.fold(_merge_leaf, params_0, taus, are_matrices, coef, rank=rank)


@_leaves.leaf_function(static=("is_matrix", "rank"), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, coef, rank):
    mean = sum(taus) / len(taus)
    if not is_matrix:
        return leaf_0 + mean
    kept = max(int(rank * min(leaf_0.shape)), 1)

    def add(total, tau):
        u, s, vt = _matrices.svd(tau - mean)
        return total + _matrices.dot(u[:, :kept] * s[None, :kept], vt[:kept]), None

    # One task at a time, so that memory holds the workspace of one decomposition.
    parts, _ = jax.lax.scan(add, jnp.zeros_like(mean), jnp.stack(taus))
    return leaf_0 + mean + coef * parts
