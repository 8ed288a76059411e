"""mergekit's passthrough: one model, whose tensors may be scaled."""

from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus


def passthrough(params_0: Params, taus: Taus, *, scale: Coef = 1.0) -> Params:
    """Returns a model, with its tensors multiplied by a number.

    With a scale of 0 for the last matrix of each residual branch, a layer returns its
    input. That is used to make models deeper (Wu et al. LLaMA Pro. ACL 2024.
    arXiv:2401.02415).

    Args:
      params_0: parameters that define the structure and the dtypes. Leaves that the
        model lacks are taken from here.
      taus: a list with the one model.
      scale: one number, or one by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: there are several models, the model does not fit, or its values are
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> model = {"w": jnp.array([1.0, -2.0])}
      >>> print(passthrough({"w": jnp.zeros(2)}, [model], scale=0.5)["w"])
      [ 0.5 -1. ]
    """
    _leaves.check(params_0, taus)
    if len(taus) != 1:
        raise ValueError(
            f"passthrough takes one model; found {len(taus)}. For the mean of several, "
            "use `linear`."
        )
    return _leaves.fold_all(
        _scaled, params_0, taus, _leaves.task_coefs(scale, taus, "scale")
    )


@_leaves.leaf_function()
def _scaled(leaf_0, taus, scale):
    del leaf_0
    return scale[0] * taus[0]
