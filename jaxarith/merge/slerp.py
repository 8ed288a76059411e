r"""SLERP: interpolation of two models along a great circle, tensor by tensor.

Shoemake. Animating rotation with quaternion curves. SIGGRAPH 1985. Merging by SLERP
has no paper; the conventions are those of mergekit and fusion_bench. :math:`\Omega` is
the angle between the tensors θ₁ and θ₂:

.. math:: \theta = \frac{\sin((1-t)\,\Omega)}{\sin\Omega}\,\theta_1
                 + \frac{\sin(t\,\Omega)}{\sin\Omega}\,\theta_2.
"""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus

Between = Literal["models", "task_vectors"]

PARALLEL = 0.9995  # above this |cos Ω| both tools interpolate linearly


def slerp(
    params_0: Params,
    taus: Taus,
    *,
    t: Coef = 0.5,
    between: Between = "models",
    coef: Coef = 1.0,
) -> Params:
    """Interpolates two fine-tuned models on the sphere, each tensor separately.

    Tensors that are nearly parallel (|cos Ω| > 0.9995) are interpolated linearly, and
    so is a pair with a zero tensor. If both models are fine-tuned from the same model,
    most of their tensors are nearly parallel.

    Args:
      params_0: pre-trained parameters.
      taus: exactly two task vectors. A missing leaf counts as zero.
      t: the position between the first model (0) and the second (1): one number, or one
        by path.
      between: the tensors to interpolate, which also define the angle: "models" or
        "task_vectors". The latter follows mergekit's `nuslerp` with a base model,
        except that it is linear if |cos Ω| > 0.9995.
      coef: the coefficient of the merged vector: one number, or one by path. 1 returns
        the point on the arc, 0 the pre-trained model.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not two task vectors, one that does not fit, non-finite values,
        several numbers `t` or coefficients, or an unknown `between`.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> print(slerp(params_0, taus)["w"].round(3))
      [0.707 0.707]
    """
    _leaves.one_of(between, Between, "between")
    _leaves.check(params_0, taus)
    if len(taus) != 2:
        raise ValueError(
            f"SLERP merges exactly two task vectors; found {len(taus)}. For more, use "
            "`karcher`, the mean on the sphere."
        )
    by_path = callable(t) or isinstance(t, Mapping)
    if not by_path and (shape := jnp.asarray(t).shape):
        raise ValueError(
            f"t has shape {list(shape)}; expected one number, the position between the "
            "first model (0) and the second (1), or one by path."
        )
    t = _leaves.vector_coef(t, taus, "t")
    scale = _leaves.vector_coef(coef, taus)
    return _leaves.fold_all(_merge_leaf, params_0, taus, t, scale, between=between)


@_leaves.leaf_function(static=("between",), whole=True)
def _merge_leaf(leaf_0, taus, t, coef, between):
    ends = [leaf_0 + tau for tau in taus] if between == "models" else taus
    gram = tree.gram(ends)
    cosine = tree.cosine(gram)[0, 1]
    linear = jnp.any(jnp.diagonal(gram) == 0) | (jnp.abs(cosine) > PARALLEL)
    angle = jnp.arccos(jnp.where(linear, 0, cosine))  # keeps the gradient finite
    weights = [
        jnp.where(linear, share, jnp.sin(share * angle) / jnp.sin(angle))
        for share in (1 - t, t)
    ]
    if between == "models":
        # Σ wᵢ θᵢ - θ₀ has the term (Σ wᵢ - 1) θ₀; it is exactly zero where the weights
        # sum to one.
        rest = coef * jnp.where(linear, 0, weights[0] + weights[1] - 1)
        leaf_0, ends = leaf_0 + rest * leaf_0, taus
    first, second = (coef * weight for weight in weights)
    return leaf_0 + first * ends[0] + second * ends[1]
