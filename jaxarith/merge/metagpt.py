r"""MetaGPT: coefficients of task arithmetic from the norms of task vectors.

Zhou, Song, Wang, Chen. MetaGPT: Merging Large Language Models Using Model Exclusive
Task Arithmetic. EMNLP 2024. arXiv:2406.11385.

.. math:: \lambda_t = \frac{\|\tau_t\|^2}{\sum_k \|\tau_k\|^2}
"""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Taus


def metagpt_coefs(taus: Taus) -> jax.Array:
    """Returns the coefficients of MetaGPT for `task_arithmetic`; they sum to one.

    They favour the longest task vector. A vector that is twice as long as the others
    has a coefficient four times as large, so it moves the merged model eight times as
    far. WUDI-Merging does the opposite: its loss divides by the squared norms.

    Args:
      taus: T task vectors. A missing leaf counts as zero.

    Returns:
      The coefficients λ, `[T]`. A task vector that is zero has the coefficient zero,
      even if all are zero.

    Raises:
      ValueError: no task vector, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> coef = metagpt_coefs(taus)
      >>> print(coef)
      [0.2 0.8]
    """
    _leaves.check_vectors(taus)
    squares = jnp.diagonal(tree.gram(taus))
    total = jnp.sum(squares)
    zero = total == 0
    return jnp.where(zero, 0, squares / jnp.where(zero, 1, total))
