"""DARE: drops entries of the task vectors at random, rescales the rest and adds.

Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099.

DARE is task arithmetic after `merge.drop`. Any other merge can follow the drop too; for
example, DARE with TIES is `merge.ties(params_0, merge.drop(taus, key=key))`.
"""

import jax

from jaxarith.merge.drop import DROP_RATE, Rescale, Strategy, drop
from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.typing import Coef, Params, Taus


def dare(
    params_0: Params,
    taus: Taus,
    *,
    drop_rate: float = DROP_RATE,
    strategy: Strategy = "random",
    rescale: Rescale = "inverse",
    coef: Coef = 1.0,
    key: jax.Array | None = None,
) -> Params:
    """Drops entries of task vectors, rescales the rest and adds the vectors.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      drop_rate, strategy, rescale, key: as for `merge.drop`.
      coef: the coefficient λ: one number, one per task `[T]`, or either by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `drop_rate` out of range, an unknown option, no key for random draws,
        no task vector, one that does not fit, non-finite values, or a wrong number of
        coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> params_0 = {"w": jnp.zeros(8)}
      >>> taus = [{"w": jnp.ones(8)}]
      >>> print(dare(params_0, taus, drop_rate=0.5, key=jax.random.key(0))["w"])
      [2. 0. 2. 0. 0. 0. 2. 2.]
    """
    dropped = drop(
        taus, drop_rate=drop_rate, strategy=strategy, rescale=rescale, key=key
    )
    return task_arithmetic(params_0, dropped, coef=coef)
