"""The experts of gpt-oss in MXFP4: FP4 with an exponent for every 32 numbers.

A file holds `X_blocks` `[experts, out, in / 32, 16]` and `X_scales`; the model has X
`[experts, in, out]`, as its files in bfloat16 do.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith.hub.quantised import bits
from jaxarith.hub.quantised.unpacked import Unpacked
from jaxarith.hub.stored import Stored


def values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers, in float32.

    Args:
      blocks: bytes `[..., out, in / 32, 16]` with two numbers each, the lower half
        first.
      scales: exponents `[..., out, in / 32]`.

    Returns:
      `[..., in, out]`.
    """
    numbers = bits.e2m1(blocks) * bits.factors(scales)[..., None]
    return numbers.reshape(*scales.shape[:-1], -1).swapaxes(-1, -2)


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    found = Unpacked({}, set())
    for name, blocks in tensors.items():
        weight = name.removesuffix("_blocks")
        scales = tensors.get(f"{weight}_scales")
        if weight == name or scales is None:
            continue
        if len(blocks.shape) != 4 or (
            (*scales.shape, 16) != blocks.shape
            or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}
        ):
            raise ValueError(
                f"{name} is {blocks} and its scales are {scales}; expected u8 "
                "[experts, out, groups, 16] and [experts, out, groups]. Give the model "
                "in floating point."
            )
        experts, out, groups = scales.shape
        shape = (experts, 32 * groups, out)
        make = functools.partial(_made, blocks, scales, shape, dtype)
        found.weights[weight] = Stored.made(dtype, shape, make)
        found.parts.update((name, f"{weight}_scales"))
    return found


def _made(blocks, scales, shape, dtype):
    packed, exponents = blocks.read(), scales.read()
    return bits.rounded(shape, dtype, lambda at: values(packed[at], exponents[at]))
