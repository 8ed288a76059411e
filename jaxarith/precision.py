"""Computes the matrix products of any function in fewer bits, without changing it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.typing import DTypeLike


def products_in(function: Callable, dtype: DTypeLike) -> Callable:
    r"""Returns `function` with the operands of its matrix products rounded to `dtype`.

    Products accumulate in their original dtype; everything else is computed as before.
    The gradient of the result is the gradient of `function`, with its products rounded
    in the same way.

    A product changes if it depends on the arguments and both operands are
    floating-point numbers wider than `dtype`. Products inside calls, conditionals,
    loops and `jax.checkpoint` are found; products inside a `custom_vjp` or a kernel are
    not.

    Args:
      function: function from pytrees of arrays to a pytree of arrays.
      dtype: dtype of the rounded operands, such as `jnp.bfloat16`.

    Returns:
      A function of the same arguments. It can be differentiated in reverse mode.

    Raises:
      TypeError: the result is differentiated in forward mode.

    Example:
      >>> rounded = products_in(jnp.dot, jnp.bfloat16)
      >>> third = jnp.full(3, 1 / 3)
      >>> print(jnp.dot(third, jnp.ones(3)), rounded(third, jnp.ones(3)))
      1.0 1.0019531
    """

    def wrapped(*args):
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        moving = [True] * len(leaves)
        outputs = _evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, moving, dtype)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _evaluate(jaxpr, consts, args, moving, dtype):
    """Returns the outputs of a jaxpr; `moving` tells which arguments are not constants.

    Values that a tangent function computes only from its constants belong to the point
    of linearisation (`jax.checkpoint` repeats that work) and must not be rounded.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    changing = {var for var, m in zip(jaxpr.invars, moving, strict=True) if m}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        moves = [
            not isinstance(atom, core.Literal) and atom in changing
            for atom in eqn.invars
        ]
        if any(moves):
            changing.update(eqn.outvars)
        with eqn.ctx.manager:
            if any(moves) and _is_wide_product(eqn, dtype):
                result = eqn.outvars[0].aval.dtype
                params = tuple(eqn.params.items())
                outputs = [_product(params, result, dtype, *map(jnp.asarray, operands))]
            else:
                inside = _moves_inside(eqn, moves)
                params = {k: _rounded(p, inside, dtype) for k, p in eqn.params.items()}
                params = eqn.primitive.get_bind_params(params)
                outputs = eqn.primitive.bind(*operands, **params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _moves_inside(eqn, moves):
    """Returns which operands vary inside; outputs of a loop come back into it."""
    if eqn.primitive.name == "while":
        return [True] * len(moves)
    if eqn.primitive.name == "scan":
        consts, carried, slices = _parts_of_scan(eqn.params, moves)
        return [*consts, *[True] * len(carried), *slices]
    return moves


def _parts_of_scan(params, operands):
    """Splits the operands: constants of the body, its carry, and arrays to slice.

    JAX 0.10 separates these kinds by two numbers, JAX 0.12 by a tree.
    """
    if "ft_in" in params:
        return map(list, params["ft_in"].update(operands).unpack())
    first, count = params["num_consts"], params["num_carry"]
    last = first + count
    return operands[:first], operands[first:last], operands[last:]


def _is_wide_product(eqn, dtype):
    return eqn.primitive is core.primitives.dot_general_p and all(
        jnp.issubdtype(atom.aval.dtype, jnp.floating)
        and jnp.finfo(atom.aval.dtype).bits > jnp.finfo(dtype).bits
        for atom in eqn.invars
    )


def _rounded(param, moving, dtype):
    """Returns a parameter of a primitive with changed jaxprs."""
    if isinstance(param, core.ClosedJaxpr):
        if not _has_wide_product(param.jaxpr, dtype):
            return param
        # The first operand of a conditional chooses the branch.
        moving = moving[len(moving) - len(param.jaxpr.invars) :]
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in param.in_avals]
        evaluate = functools.partial(_evaluate, param.jaxpr, param.consts)
        return jax.make_jaxpr(lambda *args: evaluate(args, moving, dtype))(*avals)
    if isinstance(param, core.Jaxpr):
        return _rounded(core.ClosedJaxpr(param, ()), moving, dtype).jaxpr
    if type(param) is tuple:  # of branches; not a NamedTuple of options
        return tuple(_rounded(p, moving, dtype) for p in param)
    return param


def _has_wide_product(jaxpr, dtype):
    return any(
        _is_wide_product(eqn, dtype)
        or any(
            _has_wide_product(sub, dtype) for sub in core.jaxprs_in_params(eqn.params)
        )
        for eqn in jaxpr.eqns
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(params, result, dtype, a, b):
    """Applies `dot_general` with `params` to rounded operands."""
    options: dict[str, Any] = dict(params)
    options |= {"preferred_element_type": result, "precision": None}
    highest: dict[str, Any] = {**options, "precision": "highest"}

    def native(a, b):
        return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), **options)

    def rounded(a, b):
        info = jnp.finfo(dtype)
        a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jax.lax.dot_general(a, b, **highest)

    # XLA lacks some of these products on a CPU. There, products of rounded operands at
    # the highest precision are the same.
    return jax.lax.platform_dependent(a, b, cpu=rounded, default=native)


def _product_forward(params, result, dtype, a, b):
    # Rounded operands take less memory to keep.
    kept = a.astype(dtype), b.astype(dtype)
    dtypes = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)
    return _product(params, result, dtype, a, b), (kept, dtypes)


def _product_backward(params, result, dtype, residuals, cotangent):
    operands = [x.astype(like.dtype) for x, like in zip(*residuals, strict=True)]
    plain = functools.partial(jax.lax.dot_general, **dict(params))
    _, pull_back = jax.vjp(plain, *operands)
    return products_in(pull_back, dtype)(cotangent)


_product.defvjp(_product_forward, _product_backward)
