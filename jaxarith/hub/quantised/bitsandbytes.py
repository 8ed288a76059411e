"""bitsandbytes: 4 bits through a table (NF4, FP4), and integers of 8 bits.

With 4 bits, `X.weight` holds bytes, `X.weight.absmax` a scale for each block, and
`X.weight.quant_map` the 16 numbers; the scales may be packed too. With 8 bits,
`X.weight` `[out, in]` is multiplied by `X.SCB` `[out]` / 127.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith.hub.quantised import bits
from jaxarith.hub.quantised.unpacked import Unpacked, expect
from jaxarith.hub.stored import Stored

_STATE = ".quant_state.bitsandbytes__"


def values(
    packed: np.ndarray, table: np.ndarray, scales: np.ndarray, blocksize: int
) -> np.ndarray:
    """Unpacks 4-bit numbers to flat float32; the upper half of a byte is first.

    Args:
      packed: bytes.
      table: the 16 numbers.
      scales: one for each block.
      blocksize: numbers in a block.
    """
    numbers = bits.looked_up(packed, table, low_first=False)
    return numbers * np.repeat(scales, blocksize)[: len(numbers)]


def unnested(
    scales: np.ndarray,
    table: np.ndarray,
    outer: np.ndarray,
    blocksize: int,
    offset: float,
) -> np.ndarray:
    """Unpacks scales that are stored as bytes to float32.

    Args:
      scales: the bytes.
      table: the 256 numbers.
      outer: one scale for each block of scales.
      blocksize: scales in a block.
      offset: a number that is added to all scales.
    """
    found = table[scales] * np.repeat(outer, blocksize)[: len(scales)]
    return found + np.float32(offset)


def integers(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Unpacks 8-bit numbers `[out, in]` to float32 with the scales `[out]`."""
    return packed.astype(np.float32) * scales.astype(np.float32)[:, None] / 127


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    found = Unpacked({}, set())
    for name in tensors:
        weight, is_state, _ = name.partition(_STATE)
        if is_state:
            _read_4(tensors, weight, name, dtype, found)
        elif name.endswith(".SCB"):
            _read_8(tensors, name.removesuffix("SCB"), dtype, found)
    return found


def _read_4(tensors, weight, state, dtype, found):
    about = json.loads(tensors[state].read().tobytes())
    ends = ["absmax", "quant_map"]
    if "nested_blocksize" in about:
        ends += ["nested_absmax", "nested_quant_map"]
    parts = [weight, *(f"{weight}.{end}" for end in ends)]
    if missing := [part for part in parts if part not in tensors]:
        raise ValueError(f"{state} lacks {', '.join(missing)}. Save the model again.")
    given = [tensors[part] for part in parts]
    shape = tuple(about["shape"])
    if given[0].nbytes != (math.prod(shape) + 1) // 2:
        raise ValueError(f"{weight} is {given[0]}; expected 4 bits for {list(shape)}.")
    count = -(-math.prod(shape) // about["blocksize"])
    expect(parts[1], given[1], (count,), np.uint8 if given[3:] else np.float32)
    expect(parts[2], given[2], (16,), np.float32)
    if given[3:]:
        count = -(-count // about["nested_blocksize"])
        expect(parts[3], given[3], (count,), np.float32)
        expect(parts[4], given[4], (256,), np.float32)
    make = functools.partial(_made_4, given, about, shape, dtype)
    found.weights[weight] = Stored.made(dtype, shape, make)
    found.parts.update((state, *parts))


def _made_4(given, about, shape, dtype):
    packed, scales, table, *nested = [part.read() for part in given]
    if nested:
        outer, inner = nested
        scales = unnested(
            scales, inner, outer, about["nested_blocksize"], about["nested_offset"]
        )
    size = about["blocksize"]
    # The bytes may be stored as numbers of any other dtype.
    flat, count = packed.reshape(-1).view(np.uint8), math.prod(shape)

    def entries(at):
        halves = slice(at.start // 2, -(-at.stop // 2))
        blocks = slice(at.start // size, -(-at.stop // size))
        return values(flat[halves], table, scales[blocks], size)[: at.stop - at.start]

    return bits.rounded((count,), dtype, entries, multiple=size).reshape(shape)


def _read_8(tensors, module, dtype, found):
    name, scales = f"{module}weight", f"{module}SCB"
    form = f"{module}weight_format"
    if name not in tensors or tensors[name].dtype != np.int8:
        raise ValueError(f"{scales} exists, but no {name} in i8. Save the model again.")
    if form in tensors:
        found.parts.add(form)
        if tensors[form].read().any():
            raise ValueError(
                f"{form}: the weights are arranged for one device; only rows (0) are "
                "supported. Save the model again with a current bitsandbytes."
            )
    packed = tensors[name]
    expect(scales, tensors[scales], packed.shape[:1])
    make = functools.partial(_made_8, packed, tensors[scales], dtype)
    found.weights[name] = Stored.made(dtype, packed.shape, make)
    found.parts.update((name, scales))


def _made_8(packed, scales, dtype):
    numbers, factors = packed.read(), scales.read()
    return bits.rounded(
        packed.shape, dtype, lambda at: integers(numbers[at], factors[at])
    )
