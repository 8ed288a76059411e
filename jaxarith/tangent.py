r"""Tangent-space (linearised) models.

.. math:: f_\text{lin}(x; \theta) = f(x; \theta_0) + J(x; \theta_0)(\theta - \theta_0)

Ortiz-Jimenez, Favero, Frossard. Task Arithmetic in the Tangent Space: Improved Editing
of Pre-Trained Models. NeurIPS 2023. arXiv:2305.12827.

A task vector may cover only a part of the parameters. The other leaves are constants,
so frozen leaves cost no tangent products.

`product_dtype`, such as `bfloat16`, rounds the operands of the tangent's matrix
products, forward and in the gradient. The products accumulate in float32, and
:math:`f(x; \theta_0)` is computed in float32 throughout.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxarith import precision, task_vectors, tree
from jaxarith.typing import ApplyFn, Params, Taus


def linearize(
    apply_fn: ApplyFn, params_0: Params, *, product_dtype: DTypeLike | None = None
) -> ApplyFn:
    r"""Returns the first-order Taylor expansion of a model in its parameters.

    The result has the signature of `apply_fn` and is affine in its parameters, so it is
    trained, merged and evaluated like any other model. One call costs a forward pass
    and a tangent pass: 3 times the matrix products of `apply_fn`. Outputs that are not
    floating-point numbers, such as predicted classes, keep their values at `params_0`.

    Args:
      apply_fn: `apply_fn(params, *inputs, **options) -> outputs`; the outputs may be
        any pytree of arrays.
      params_0: the expansion point.
      product_dtype: dtype of the operands of tangent products; by default their own.

    Returns:
      `apply_lin(params, *inputs, **options)`. `params` has the structure of `params_0`,
      or holds only the trained part of it; the rest stays at `params_0` at no cost.

    Raises:
      ValueError: a leaf of `params` is not in `params_0` or has another shape.

    Example:
      >>> f_lin = linearize(lambda p, x: jnp.sin(p["w"] * x), {"w": 0.0})
      >>> print(f_lin({"w": 2.0}, 3.0))
      6.0
    """

    def apply_lin(params, *inputs, **options):
        tau = task_vectors.difference(params, params_0)
        with_options = functools.partial(apply_fn, **options)
        outputs, tangents = jvp(
            with_options, params_0, tau, *inputs, product_dtype=product_dtype
        )
        return jax.tree.map(_moved, outputs, tangents)

    return apply_lin


def _moved(output, tangent):
    return output if _has_none(tangent) else output + tangent


def _has_none(tangent):
    """Whether `tangent` is the placeholder for an output without derivatives."""
    return jnp.result_type(tangent) == jax.dtypes.float0


def jvp(
    apply_fn: ApplyFn,
    params_0: Params,
    tau: Params,
    *inputs: Any,
    product_dtype: DTypeLike | None = None,
) -> tuple[Any, Any]:
    r"""Computes outputs :math:`f(x;\theta_0)` and a tangent :math:`J(x;\theta_0)\tau`.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params_0: the parameters at which the model is differentiated.
      tau: a task vector: the structure of `params_0`, or a part of it.
      *inputs: passed on to `apply_fn`; not differentiated.
      product_dtype: dtype of the operands of tangent products; by default their own.
        If it is given, the result can be differentiated with respect to `tau` in
        reverse mode.

    Returns:
      `(outputs, tangents)`, both with the structure of `apply_fn`'s outputs. Tangents
      of integers have JAX's dtype `float0`.

    Raises:
      ValueError: a leaf of `tau` is not in `params_0` or has another shape.

    Example:
      >>> f = lambda p, x: p["w"] ** 2 * x
      >>> outputs, tangents = jvp(f, {"w": 3.0}, {"w": 1.0}, 2.0)
      >>> print(outputs, tangents)
      18.0 12.0
    """
    tree.check_part(tau, params_0, "task vector")
    function, start = _trained_part(apply_fn, params_0, tree.flatten(tau), inputs)
    if product_dtype is None:
        return jax.jvp(function, (start,), (tree.fill(tau, start),))
    with jax.default_matmul_precision("float32"):
        outputs, push_forward = jax.linearize(function, start)
    tangent = precision.products_in(push_forward, product_dtype)
    return outputs, tangent(tree.fill(tau, start))


def jvps(
    apply_fn: ApplyFn, params_0: Params, taus: Taus, *inputs: Any
) -> tuple[Any, Any]:
    r"""Computes outputs and many tangents :math:`J(x;\theta_0)\tau_t`.

    They come from one linearisation, so the forward pass is shared: T tangents cost
    1 + 2T forward passes, while T calls of `jvp` cost 3T. A rematerialised model
    repeats the forward pass for every tangent.

    Args:
      apply_fn, params_0, *inputs: as for `jvp`.
      taus: T task vectors. They may cover different parts; an absent leaf is zero.

    Returns:
      `(outputs, tangents)`; the leaves of `tangents` have a leading axis `[T, ...]`.

    Raises:
      ValueError: there is no task vector, or one does not fit `params_0`.

    Example:
      >>> f = lambda p, x: p["w"] ** 2 * x
      >>> outputs, tangents = jvps(f, {"w": 3.0}, [{"w": 1.0}, {"w": 2.0}], 2.0)
      >>> print(tangents)
      [12. 24.]
    """
    if not taus:
        raise ValueError("jvps needs at least one task vector; the list is empty.")
    for i, tau in enumerate(taus):
        tree.check_part(tau, params_0, f"task vector {i}")
    paths = {path for tau in taus for path in tree.flatten(tau)}
    function, start = _trained_part(apply_fn, params_0, paths, inputs)
    outputs, push_forward = jax.linearize(function, start)
    # One after another: `vmap` would first copy all task vectors into one array.
    tangents = [push_forward(tree.fill(tau, start)) for tau in taus]
    return outputs, jax.tree.map(_stacked, *tangents)


def _stacked(*tangents):
    if _has_none(tangents[0]):  # it holds nothing, and JAX does not stack it
        return np.zeros((len(tangents), *tangents[0].shape), jax.dtypes.float0)
    return jnp.stack(tangents)


def _trained_part(apply_fn, params_0, paths, inputs):
    """Returns `apply_fn` as a function of the leaves at these paths, and the leaves."""
    start = jax.tree.map(jnp.asarray, tree.restrict(params_0, paths))
    return (lambda part: apply_fn(tree.update(params_0, part), *inputs)), start
