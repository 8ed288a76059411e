r"""Task arithmetic: :math:`\theta_0 + \sum_t \lambda_t \tau_t`.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxarith.merge import _leaves
from jaxarith.tree import Tree


def task_arithmetic(params_0: Tree, taus: Sequence[Tree], *, coef=1.0) -> Tree:
    """Adds scaled task vectors; a negative coefficient makes the model forget.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      coef: the coefficient λ: one number, or one per task `[T]`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: no task vector, one that does not fit, or non-finite values.

    Example:
      >>> params_0, tau = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
      >>> print(task_arithmetic(params_0, [tau, tau], coef=0.5))
      {'w': Array([2., 2.], dtype=float32)}
    """
    _leaves.check(params_0, taus)
    coefs = _leaves.per_task(coef, len(taus), "coef")
    return _leaves.fold(add_scaled, params_0, taus, coefs)


@jax.jit
def add_scaled(leaf_0: jax.Array, taus: jax.Array, coefs: jax.Array) -> jax.Array:
    """`leaf_0 + Σ_t coefs[t] · taus[t]` for one leaf."""
    return leaf_0 + jnp.tensordot(coefs, taus, axes=1, precision="highest")
