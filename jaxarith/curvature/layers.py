"""The linear layers of a Flax Linen model: their matrices, inputs and output gradients.

An interceptor sees the layers as they are called, so any `apply_fn` works that calls
Linen modules on the whole of `params`. It adds an array of zeros, a *tap*, to the
output of each call; the gradient in the tap is the gradient in the output.

Linear layers are `flax.linen.Dense` and modules that say by an attribute
`out_first = True` that they compute `x @ kernel.T`, such as the `Conv1D` of GPT-2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.curvature.matrices import Layer
from jaxarith.typing import ApplyFn, Params

# Arrays of every call of a layer, by the path of its kernel.
Calls = Mapping[str, Sequence[jax.Array]]


class Seen(NamedTuple):
    """What the linear layers of one forward pass have shown.

    Attributes:
      inputs: the inputs `[..., in]` of every call, by the path of the kernel.
      outputs: the outputs `[..., out]` of every call, taps included.
      out_first: whether a kernel is `[out, in]`, by its path.
    """

    inputs: dict[str, list[jax.Array]]
    outputs: dict[str, list[jax.Array]]
    out_first: dict[str, bool]


def tapped(
    apply_fn: ApplyFn, params: Params, inputs: Sequence[Any], taps: Calls | None = None
) -> tuple[Any, Seen]:
    """Runs a model and looks at its linear layers.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      params: its parameters.
      inputs: passed on to `apply_fn`.
      taps: what is added to the output of every call; by default nothing.

    Returns:
      The outputs of `apply_fn`, and what was seen, in the order of the calls.

    Raises:
      ValueError: the path of a layer is not that of a leaf of `params`.
    """
    leaves = tree.flatten(params)
    seen = Seen({}, {}, {})

    def look(next_function, args, kwargs, context):
        found = next_function(*args, **kwargs)
        layer = context.module
        out_first = getattr(layer, "out_first", False)
        if context.method_name != "__call__" or not (
            out_first or isinstance(layer, nn.Dense)
        ):
            return found
        path = "/".join((*layer.path, "kernel"))
        if path not in leaves:
            raise ValueError(
                f"a linear layer has its kernel at {path}, which is not a leaf of the "
                "parameters. Apply the Linen module to all of them: "
                'module.apply({"params": params}, ...).'
            )
        calls = seen.inputs.setdefault(path, [])
        if taps is not None and path in taps:
            found = found + taps[path][len(calls)]
        calls.append(args[0] if args else kwargs["inputs"])
        seen.outputs.setdefault(path, []).append(found)
        seen.out_first[path] = out_first
        return found

    with nn.intercept_methods(look):
        return apply_fn(params, *inputs), seen


def layers_of(
    apply_fn: ApplyFn,
    params: Params,
    inputs: Sequence[Any],
    paths: Sequence[str],
    joint: bool,
) -> tuple[Layer, ...]:
    """The linear layers with a kernel among these paths; nothing is computed.

    Args:
      apply_fn, params, inputs: as for `tapped`.
      paths: paths of leaves. A layer has its bias only if that is among them too.
      joint: layers that are called once and read the same array, as queries, keys and
        values do, are one layer, with their kernels side by side.
    """
    groups: list[list[str]] = []
    kinds: dict[str, bool] = {}

    def look(params, inputs):
        _, seen = tapped(apply_fn, params, inputs)
        kinds.update(seen.out_first)
        read: dict[tuple, list[str]] = {}
        for path, calls in seen.inputs.items():
            if path not in paths:
                continue
            has_bias = bias_path(path) in paths
            alone = not joint or len(calls) > 1
            # `seen` holds the arrays, so that no two of them have the same id.
            key = (path,) if alone else (id(calls[0]), has_bias, kinds[path])
            read.setdefault(key, []).append(path)
        groups.extend(read.values())

    jax.eval_shape(look, params, tuple(inputs))
    return tuple(
        Layer(
            kernels=tuple(group),
            biases=tuple(bias_path(p) for p in group if bias_path(p) in paths),
            out_first=kinds[group[0]],
        )
        for group in groups
    )


def bias_path(kernel: str) -> str:
    """`a/bias` of `a/kernel`."""
    return kernel.removesuffix("kernel") + "bias"


def taps_like(outputs: Calls) -> dict[str, list[jax.Array]]:
    """Taps of zeros for outputs, or their shapes."""
    return {
        path: [jnp.zeros(call.shape, call.dtype) for call in calls]
        for path, calls in outputs.items()
    }
