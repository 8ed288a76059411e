"""Matrix products in fewer bits inside a function that knows nothing of it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core


def products_in(function: Callable, dtype) -> Callable:
    r"""`function` with the operands of its matrix products rounded to `dtype`.

    Products accumulate in the dtype that they had; all else is computed as before. The
    gradient of the result is that of `function`, its products rounded in the same way:
    reverse mode differentiates it, forward mode does not.

    Only products of two floating-point operands wider than `dtype` change, wherever
    they are: in calls, conditionals, loops or `jax.checkpoint`.

    Args:
      function: of pytrees of arrays, to a pytree of arrays.
      dtype: such as `jnp.bfloat16`.

    Example:
      >>> rounded = products_in(jnp.dot, jnp.bfloat16)
      >>> third = jnp.full(3, 1 / 3)
      >>> print(jnp.dot(third, jnp.ones(3)), rounded(third, jnp.ones(3)))
      1.0 1.0019531
    """

    def wrapped(*args):
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args), dtype)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _evaluate(jaxpr, consts, args, dtype):
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive is core.primitives.dot_general_p and _wider(operands, dtype):
            outputs = [_product(tuple(eqn.params.items()), dtype, *operands)]
        else:
            params = {name: _rounded(p, dtype) for name, p in eqn.params.items()}
            params = eqn.primitive.get_bind_params(params)
            outputs = eqn.primitive.bind(*operands, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _rounded(param, dtype):
    """A parameter of a primitive with the jaxprs in it changed."""
    if isinstance(param, core.ClosedJaxpr):
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in param.in_avals]
        evaluate = functools.partial(_evaluate, param.jaxpr, param.consts)
        return jax.make_jaxpr(lambda *args: evaluate(args, dtype))(*avals)
    if isinstance(param, core.Jaxpr):
        return _rounded(core.ClosedJaxpr(param, ()), dtype).jaxpr
    if type(param) is tuple:  # of branches; not a NamedTuple of options
        return tuple(_rounded(p, dtype) for p in param)
    return param


def _wider(operands, dtype):
    return all(
        jnp.issubdtype(x.dtype, jnp.floating)
        and jnp.finfo(x.dtype).bits > jnp.finfo(dtype).bits
        for x in operands
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(params, dtype, a, b):
    options = dict(params)
    options["preferred_element_type"] = options["preferred_element_type"] or a.dtype

    def native(a, b):
        return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), **options)

    def rounded(a, b):
        info = jnp.finfo(dtype)
        a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jax.lax.dot_general(a, b, **options)

    # XLA lacks some of these products on a CPU. Those of rounded operands are the same.
    return jax.lax.platform_dependent(a, b, cpu=rounded, default=native)


def _product_forward(params, dtype, a, b):
    # Rounded, the operands that are kept take less memory.
    kept = a.astype(dtype), b.astype(dtype)
    return _product(params, dtype, a, b), (*kept, a[:0], b[:0])


def _product_backward(params, dtype, kept, cotangent):
    a, b, like_a, like_b = kept
    operands = a.astype(like_a.dtype), b.astype(like_b.dtype)
    plain = functools.partial(jax.lax.dot_general, **dict(params))
    _, pull_back = jax.vjp(plain, *operands)
    return products_in(pull_back, dtype)(cotangent)


_product.defvjp(_product_forward, _product_backward)
