r"""WiSE-FT: :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta = \theta_0 + \alpha\,\tau`.

Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Lopes, Hajishirzi, Farhadi, Namkoong,
Schmidt. Robust Fine-Tuning of Zero-Shot Models. CVPR 2022. arXiv:2109.01903.
"""

from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.typing import Coef, Params, Taus


def wise_ft(params_0: Params, taus: Taus, *, coef: Coef = 0.5) -> Params:
    """Interpolates between the pre-trained and one fine-tuned model.

    What fine-tuning gains on its own distribution is mostly kept, and what it loses on
    others is mostly regained.

    Args:
      params_0: pre-trained parameters.
      taus: a list of one task vector. A leaf that it lacks stays at its pre-trained
        value.
      coef: the mixing coefficient α: 0 is the pre-trained and 1 the fine-tuned model; a
        number, or one by path. The paper recommends 0.5 where there is no data to
        choose it with.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not one task vector, one that does not fit, or non-finite values.

    Example:
      >>> import jax.numpy as jnp
      >>> print(wise_ft({"w": jnp.array([1.0, 2.0])}, [{"w": jnp.array([2.0, -2.0])}]))
      {'w': Array([2., 1.], dtype=float32)}
    """
    if len(taus) > 1:
        raise ValueError(
            f"WiSE-FT moves the pre-trained model to one other; found {len(taus)} task "
            "vectors."
        )
    return task_arithmetic(params_0, taus, coef=coef)
