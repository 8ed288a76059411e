"""Linear layers as matrices `[in (+ 1), out]`: kernels side by side over their biases.

A layer computes `[x, 1] @ matrix`. Its bias is the last row of the matrix.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layer(NamedTuple):
    """The leaves that make up the matrix of a layer.

    Attributes:
      kernels: paths of kernels that read the same input; usually one.
      biases: paths of their biases, or none.
      out_first: whether the kernels are `[out, in]` instead of `[in, out]`.
    """

    kernels: tuple[str, ...]
    biases: tuple[str, ...]
    out_first: bool

    @property
    def name(self) -> str:
        """The path of the kernel; several paths are joined by `+`."""
        return "+".join(self.kernels)


def matrix(layer: Layer, leaves: Mapping[str, jax.Array]) -> jax.Array | None:
    """Returns the matrix of a layer in a task vector; None if the vector has no part.

    Args:
      layer: the layer.
      leaves: the leaves of the task vector by path. If the bias is missing, its row is
        zero.

    Raises:
      ValueError: the vector has the bias without the kernel, or only some of several
        kernels.

    Example:
      >>> layer = Layer(("kernel",), ("bias",), False)
      >>> matrix(layer, {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}).shape
      (3, 2)
    """
    found = [path for path in (*layer.kernels, *layer.biases) if path in leaves]
    if not found:
        return None
    if missing := [path for path in layer.kernels if path not in leaves]:
        raise ValueError(
            f"the task vector has {found[0]} but not {missing[0]}; the curvature of "
            "both was measured together. Train both, or measure only the trained "
            "leaves: curvature.collect(..., select=config.trained)."
        )
    kernels = [leaves[path] for path in layer.kernels]
    if layer.out_first:
        kernels = [kernel.T for kernel in kernels]
    rows = jnp.concatenate(kernels, axis=1) if len(kernels) > 1 else kernels[0]
    if not layer.biases:
        return rows
    biases = [
        leaves.get(path, jnp.zeros(kernel.shape[1], kernel.dtype))
        for path, kernel in zip(layer.biases, kernels, strict=True)
    ]
    return jnp.concatenate([rows, jnp.concatenate(biases)[None]])


def leaves(
    layer: Layer, values: jax.Array, like: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the leaves of a layer from its matrix, if `like` has them, by path."""
    found, start = {}, 0
    for number, path in enumerate(layer.kernels):
        width = like[path].shape[0 if layer.out_first else 1]
        part = values[:, start : start + width]
        start += width
        if layer.biases:
            if layer.biases[number] in like:
                found[layer.biases[number]] = part[-1]
            part = part[:-1]
        found[path] = part.T if layer.out_first else part
    return found
