r"""WiSE-FT: :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta = \theta_0 + \alpha\,\tau`.

Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Lopes, Hajishirzi, Farhadi, Namkoong,
Schmidt. Robust Fine-Tuning of Zero-Shot Models. CVPR 2022. arXiv:2109.01903.
"""

from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.typing import Coef, Params, Taus


def wise_ft(params_0: Params, taus: Taus, *, coef: Coef = 0.5) -> Params:
    """Interpolates between the pre-trained model and one fine-tuned model.

    The result keeps most of the accuracy that fine-tuning gained on its own
    distribution, and gets back most of the accuracy that it lost on others.

    Args:
      params_0: pre-trained parameters.
      taus: a list of one task vector. A leaf that it lacks stays at its pre-trained
        value.
      coef: the mixing coefficient α: one number, or one by path. 0 returns the
        pre-trained model, 1 the fine-tuned model. The paper recommends 0.5 if there is
        no data to choose it with.

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
            f"WiSE-FT takes exactly one task vector; found {len(taus)}. For several, "
            "use `task_arithmetic` or `average`."
        )
    return task_arithmetic(params_0, taus, coef=coef)
