"""Unpacks numbers of a few bits, and large tensors piece by piece."""

import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

_PIECE = 2**22  # entries that are unpacked at a time
# FP4 (E2M1): a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def fields(words: np.ndarray, bits: int, count: int, axis: int = -1) -> np.ndarray:
    """Unpacks unsigned fields from streams of bits, the lowest bits of a word first.

    A field may lie across two words, for example one of 3 bits.

    Args:
      words: 32-bit words.
      bits: bits of a field.
      count: how many fields to take from a stream; the rest is padding.
      axis: the axis along which streams lie.

    Returns:
      The fields as int32, `count` along the axis.
    """
    words, axis = words.view(np.uint32), axis % words.ndim
    before, after = words.shape[:axis], words.shape[axis + 1 :]
    flat = (-1, *[1] * len(after))
    mask = np.uint32(2**bits - 1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(flat)
        found = np.expand_dims(words, axis + 1) >> shifts & mask
        found = found.reshape(*before, -1, *after)
        return found[(slice(None),) * axis + (slice(count),)].view(np.int32)
    first, shift = np.divmod(bits * np.arange(count), 32)
    second = np.minimum(first + 1, words.shape[axis] - 1)
    low, high = (words.take(x, axis).astype(np.uint64) for x in (first, second))
    both = (low | high << np.uint64(32)) >> shift.astype(np.uint64).reshape(flat)
    return (both.astype(np.uint32) & mask).view(np.int32)


def looked_up(packed: np.ndarray, table: np.ndarray, *, low_first: bool) -> np.ndarray:
    """Looks up 4-bit numbers in a table: `[..., n]` bytes to `[..., 2 n]` numbers.

    Args:
      packed: bytes, each with two 4-bit numbers.
      table: the 16 numbers.
      low_first: whether the first number is in the lower half of a byte.
    """
    low, high = table[np.arange(256) & 15], table[np.arange(256) >> 4]
    pairs = np.stack((low, high) if low_first else (high, low), axis=-1)
    return pairs[packed.view(np.uint8)].reshape(*packed.shape[:-1], -1)


def e2m1(packed: np.ndarray) -> np.ndarray:
    """Unpacks FP4 numbers to float32: two in a byte, the first in its lower half."""
    return looked_up(packed, _E2M1, low_first=True)


def factors(scales: np.ndarray) -> np.ndarray:
    """Returns scales as float32. Bytes are exponents: `2^(byte - 127)`; 255 is NaN."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def rounded(
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Callable[[slice], np.ndarray],
    multiple: int = 1,
) -> np.ndarray:
    """Computes a tensor in float32, a few rows at a time, and rounds it.

    Args:
      shape, dtype: shape and dtype of the result.
      rows: `rows(at)` computes the rows of a slice.
      multiple: every slice begins at a multiple of this.
    """
    out = np.empty(shape, dtype)
    step = max(_PIECE // max(math.prod(shape[1:]), 1), 1)
    step = -(-step // multiple) * multiple
    # Numbers too large for the dtype are reported with their name by the merge.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, shape[0], step):
            at = slice(start, min(start + step, shape[0]))
            out[at] = rows(at)
    return out
