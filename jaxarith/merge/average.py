r"""Weight averaging: :math:`\theta_0 + \sum_t w_t \tau_t = \sum_t w_t \theta_t`.

Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time. ICML 2022. arXiv:2203.05482.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxarith.merge import _leaves
from jaxarith.merge.task_arithmetic import add_scaled
from jaxarith.typing import Coef, Params, PerTask, Taus


def average(
    params_0: Params, taus: Taus, *, weights: PerTask = 1.0, coef: Coef = 1.0
) -> Params:
    """Returns the weighted mean of the fine-tuned models.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      weights: one number, or one number per task `[T]`; they are divided by their sum.
      coef: the coefficient of the merged vector: one number, or one by path. 1 returns
        the mean, 0 the pre-trained model.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, weights
        whose sum is not positive, or several coefficients.

    Example:
      >>> taus = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
      >>> print(average({"w": jnp.zeros(2)}, taus, weights=[3, 1]))
      {'w': Array([0.75, 0.75], dtype=float32)}
    """
    _leaves.check_fit(params_0, taus)
    shares = _leaves.per_task(weights, len(taus), "weights")
    total = jnp.sum(shares)
    if not isinstance(total, Tracer) and not total > 0:
        raise ValueError(f"the weights sum to {total}; the sum must be positive.")
    scale = _leaves.vector_coef(coef, taus)
    shares = jax.tree.map(lambda scale: shares / total * scale, scale)
    merged = _leaves.fold_all(add_scaled, params_0, taus, shares)
    _leaves.check_sum(merged, params_0, taus)
    return merged
