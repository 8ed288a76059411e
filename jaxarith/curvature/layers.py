"""The linear layers of a Flax Linen model: their matrices, inputs and output gradients.

An interceptor sees the layers when they are called, so any `apply_fn` works that calls
Linen modules on the whole of `params`. It adds an array of zeros, a *tap*, to the
output of each call. The gradient in the tap is the gradient in the output.

Linear layers are `flax.linen.Dense`, and modules with an attribute `out_first = True`,
which compute `x @ kernel.T`. The `Conv1D` of GPT-2 is an example.
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
    """The inputs and outputs of the linear layers in one forward pass.

    Attributes:
      inputs: inputs `[..., in]` of every call, by the path of the kernel.
      outputs: outputs `[..., out]` of every call, with taps, by the path of the kernel.
      out_first: whether a kernel is `[out, in]`, by its path.
    """

    inputs: dict[str, list[jax.Array]]
    outputs: dict[str, list[jax.Array]]
    out_first: dict[str, bool]


def tapped(
    apply_fn: ApplyFn, params: Params, inputs: Sequence[Any], taps: Calls | None = None
) -> tuple[Any, Seen]:
    """Runs a model and records the inputs and outputs of its linear layers.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      params: its parameters.
      inputs: inputs of `apply_fn`.
      taps: arrays that are added to the output of every call; by default none.

    Returns:
      The outputs of `apply_fn`, and the record, in the order of the calls.

    Raises:
      ValueError: the kernel of a layer is not a leaf of `params`.
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
    """Returns the linear layers with a kernel among these paths; computes nothing.

    Args:
      apply_fn, params, inputs: as for `tapped`.
      paths: paths of leaves. A layer includes its bias only if the bias is one of them.
      joint: whether to treat layers that are called once and read the same array as one
        layer, with their kernels side by side. Queries, keys and values are an example.
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
            # `seen` keeps the arrays alive, so different arrays have different ids.
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
    """Returns the path of the bias: `a/bias` for `a/kernel`."""
    return kernel.removesuffix("kernel") + "bias"


def taps_like(outputs: Calls) -> dict[str, list[jax.Array]]:
    """Returns taps of zeros for outputs, or for their shapes."""
    return {
        path: [jnp.zeros(call.shape, call.dtype) for call in calls]
        for path, calls in outputs.items()
    }
