"""Weights of 8 bits with a scale for each block, as in DeepSeek-V3.

`X.weight` is multiplied by `X.weight_scale_inv`, despite the name. As in DeepSeek-V4,
scales may be exponents (UE8M0), and experts may be FP4 with a scale for 32 numbers.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxarith.hub.quantised import bits, blocks
from jaxarith.hub.quantised.unpacked import Unpacked
from jaxarith.hub.stored import Stored

_ENDS = ("_scale_inv", "_scale")
_EXPONENTS = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu))
_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
_FP4_BLOCK = (1, 32)


def values(
    packed: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    """Returns the numbers `[..., out, in]`, in float32.

    Args:
      packed: `[..., out, in]` in float8.
      scales: `[..., block rows, block columns]`.
      block: rows and columns of a block.
    """
    factors = blocks.spread(bits.factors(scales), block, packed.shape)
    return packed.astype(np.float32) * factors


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    found = Unpacked({}, set())
    stated = settings.get("weight_block_size")
    stated = [(stated[0], stated[1])] if stated else [(128, 128)]
    for name, scale in _pairs(tensors):
        packed, scales = tensors[name], tensors[scale]
        *lead, columns = packed.shape
        if is_fp4 := packed.dtype in _BYTES:
            columns *= 2
        shape = (*lead, columns)
        known = [_FP4_BLOCK] if is_fp4 else stated
        block = blocks.size(name, scales.shape, shape, known)
        make = functools.partial(_made, packed, scales, block, shape, dtype)
        found.weights[name] = Stored.made(dtype, shape, make)
        found.parts.update((name, scale))
    return found


def _pairs(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """Yields the name of each weight with the name of its scales."""
    for name, tensor in tensors.items():
        scales = [f"{name}{end}" for end in _ENDS]
        if name.endswith(".weight"):
            scales.append(f"{name.removesuffix('weight')}scale")  # in DeepSeek's files
        scale = next((x for x in scales if x in tensors), None)
        if scale is None or len(tensor.shape) < 2:
            continue
        is_float8 = tensor.dtype.itemsize == 1 and tensor.dtype.kind not in "iub"
        if is_float8 or (tensor.dtype in _BYTES and tensors[scale].dtype in _EXPONENTS):
            yield name, scale


def _made(packed, scales, block, shape, dtype):
    numbers, factors = packed.read(), scales.read()

    def rows(at):
        part = numbers[at]
        if packed.dtype in _BYTES:
            part = bits.e2m1(part)
        if len(shape) > 2:
            return values(part, factors.reshape(shape[0], -1)[at], block)
        first = at.start // block[0]
        grid = factors.reshape(-(-shape[0] // block[0]), -1)
        return values(part, grid[first : -(-at.stop // block[0])], block)

    multiple = block[0] if len(shape) == 2 else 1
    return bits.rounded(shape, dtype, rows, multiple)
