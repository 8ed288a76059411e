"""Inputs of the linear layers of a Flax Linen model, and their Gram matrices.

RegMean merges with the mean of x xᵀ over the inputs x of every `flax.linen.Dense`. An
interceptor sees these inputs when a layer is called. So any `apply_fn` works if it
calls Linen modules on the whole of `params`; it may do anything else besides.

Layers of other classes are not captured (embeddings, norms, convolutions, the `Conv1D`
of GPT-2, `DenseGeneral`). Layers inside `nn.scan`, `nn.remat`, `nn.jit` or a `jit` in
`apply_fn` are not captured either, because their values cannot leave these.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.batches import mask_of
from jaxarith.typing import ApplyFn, Params


def dense_inputs(
    apply_fn: ApplyFn, params: Params, *inputs: Any
) -> dict[str, list[jax.Array]]:
    """Returns the inputs of every `flax.linen.Dense` that `apply_fn` calls.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      params: its parameters.
      *inputs: inputs of `apply_fn`.

    Returns:
      By the path of the kernel in `params`, in the order of the calls: the inputs
      `[..., in]` of each call. A layer that is called twice has two inputs.

    Raises:
      ValueError: no layer was called, or the kernel of a layer is not a leaf of
        `params`.

    Example:
      >>> dense = nn.Dense(2)
      >>> apply_fn = lambda params, x: dense.apply({"params": params}, x)
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> dense_inputs(apply_fn, params, jnp.ones((1, 3)))
      {'kernel': [Array([[1., 1., 1.]], dtype=float32)]}
    """
    leaves = tree.flatten(params)
    seen: dict[str, list[jax.Array]] = {}

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            path = "/".join((*context.module.path, "kernel"))
            if path not in leaves:
                raise ValueError(
                    f"a Dense layer has its kernel at {path}, which is not a leaf of "
                    "the parameters. Apply the Linen module to all of them: "
                    'module.apply({"params": params}, ...).'
                )
            x = args[0] if args else kwargs["inputs"]
            seen.setdefault(path, []).append(x)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        apply_fn(params, *inputs)
    if not seen:
        raise ValueError(
            "apply_fn called no flax.linen.Dense; expected at least one. Call a Linen "
            "module, and remove any jit inside apply_fn, which would hide the layers."
        )
    return seen


def dense_paths(apply_fn: ApplyFn, params: Params, *inputs: Any) -> list[str]:
    """Returns the kernels of `dense_inputs` in the order of calls; computes nothing.

    Raises:
      ValueError: as for `dense_inputs`.
    """
    paths: list[str] = []
    jax.eval_shape(
        lambda *args: paths.extend(dense_inputs(apply_fn, *args)), params, *inputs
    )
    return paths


def input_grams(
    apply_fn: ApplyFn,
    params: Params,
    batches: Sequence[dict],
    *,
    inputs: Sequence[str] = ("image",),
    token_mask: str | Callable[[str], str | None] | None = None,
    select: str = ".*",
) -> dict[str, jax.Array]:
    r"""Returns the mean of :math:`x x^\top` over all real inputs of every Dense layer.

    It makes one compiled pass over the data and keeps only the Gram matrices. They have
    Σ in² numbers: 0.6 GB in float32 for the image encoder of ViT-B.

    Args:
      apply_fn: `apply_fn(params, *inputs)`.
      params: its parameters.
      batches: dicts of arrays `[B, ...]`, as `data.pipeline.evaluation_batches` makes
        them. All tokens of a sample count, but none if its `mask`, `bool[B]`, is False.
        Without a mask every sample counts.
      inputs: names of the fields of a batch that `apply_fn` takes, in order.
      token_mask: name of a field `[B, S]` of the batches, for example
        `attention_mask`. It is true for tokens that count, in layers with the input
        `[B, S, in]`. It may also be a function from the path of a kernel to this name
        or None, because an encoder and a decoder have different tokens.
      select: a regular expression for whole paths of kernels; the others are skipped.

    Returns:
      By the path of the kernel `[in, out]`: a Gram matrix `[in, in]`, in float32 or
      better. For a layer that is called several times, it is the mean over the inputs
      of all calls.

    Raises:
      ValueError: no real sample, no layer that matches, a layer inside `nn.remat`, or
        an input whose shape differs from that of its mask.

    Example:
      >>> apply_fn = lambda params, x: nn.Dense(1).apply({"params": params}, x)
      >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
      >>> batches = [{"image": x, "mask": np.array([True, True, False])}]
      >>> print(input_grams(apply_fn, params, batches)["kernel"])
      [[ 5.  7.]
       [ 7. 10.]]
    """
    rows = [mask_of(batch) for batch in batches]
    if not any(map(np.any, rows)):
        raise ValueError("the batches hold no real sample; give at least one.")
    paths = dense_paths(apply_fn, params, *(batches[0][name] for name in inputs))
    chosen = [path for path in paths if re.fullmatch(select, path)]
    if not chosen:
        raise ValueError(
            f"no Dense layer matches {select!r}. The pattern must match whole paths; "
            f"the model has {', '.join(paths[:3])}."
        )
    field = token_mask if callable(token_mask) else lambda path: token_mask
    fields = tuple((path, field(path)) for path in chosen)
    kernels = tree.flatten(params)
    sums = {path: _zeros(kernels[path]) for path in chosen}
    params = jax.device_put(params)  # moved to the device once, not with every batch
    for batch, mask in zip(batches, rows, strict=True):
        masks = {name: batch[name] for _, name in fields if name is not None}
        values = tuple(batch[name] for name in inputs)
        args = sums, params, values, mask, masks, fields
        try:
            sums = _add_batch(apply_fn, *args)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "a Dense layer is called inside nn.remat, nn.jit or nn.scan, and its "
                "inputs cannot leave them. Build the model without remat, or leave the "
                "layer out with select."
            ) from error
    return {
        path: total / jnp.maximum(count, 1) for path, (total, count) in sums.items()
    }


def _zeros(kernel):
    dtype = jnp.promote_types(jnp.result_type(kernel), jnp.float32)
    return jnp.zeros((kernel.shape[0],) * 2, dtype), jnp.zeros((), jnp.int32)


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "fields"), donate_argnames="sums"
)
def _add_batch(apply_fn, sums, params, inputs, mask, masks, fields):
    seen = dense_inputs(apply_fn, params, *inputs)

    def add(path, name, total, count):
        for x in seen[path]:
            counted = _counted(x, mask, None if name is None else masks[name], path)
            rows = jnp.where(counted[..., None], x, 0).reshape(-1, x.shape[-1])
            rows = rows.astype(total.dtype)
            total += jnp.dot(rows.T, rows, precision="highest")
            count += jnp.sum(counted, dtype=jnp.int32)
        return total, count

    return {path: add(path, name, *sums[path]) for path, name in fields}


def _counted(x, mask, token_mask, path):
    """Returns which inputs `x[..., in]` belong to real samples and tokens."""
    tokens = x.shape[:-1]
    if tokens[:1] != mask.shape:
        raise ValueError(
            f"the input of {path} has shape {list(x.shape)} in batches of {len(mask)} "
            "samples; its first axis must be the samples. Leave the layer out with "
            "select."
        )
    counted = mask.astype(bool).reshape(mask.shape + (1,) * (len(tokens) - 1))
    if token_mask is not None and len(tokens) > 1:
        if token_mask.shape != tokens:
            raise ValueError(
                f"the input of {path} has shape {list(x.shape)} and its token mask "
                f"{list(token_mask.shape)}; expected {list(tokens)}. Let token_mask be "
                "a function of the path."
            )
        counted = counted & token_mask.astype(bool)
    return jnp.broadcast_to(counted, tokens)
