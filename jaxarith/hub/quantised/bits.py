"""Numbers of a few bits, and the pieces in which large tensors are unpacked."""

import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

_PIECE = 2**22  # entries that are unpacked at a time
# FP4 (E2M1): a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned fields of a stream of bits, the lowest bits of a word first.

    A field of 3 bits may lie in two words.

    Args:
      words: 32-bit words `[..., n]`.
      bits: bits of a field.
      count: how many fields to take; the rest is padding.

    Returns:
      The fields as int32 `[..., count]`.
    """
    words = words.view(np.uint32)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        found = words[..., None] >> shifts & np.uint32(2**bits - 1)
        found = found.reshape(*words.shape[:-1], -1)[..., :count]
        return found.astype(np.int32)
    first, shift = np.divmod(bits * np.arange(count), 32)
    second = np.minimum(first + 1, words.shape[-1] - 1)
    wide = words.astype(np.uint64)
    both = wide[..., first] | wide[..., second] << np.uint64(32)
    return (both >> shift.astype(np.uint64) & np.uint64(2**bits - 1)).astype(np.int32)


def nibbles(packed: np.ndarray, *, low_first: bool) -> np.ndarray:
    """The two halves of each byte, `[..., n]` to `[..., 2 n]`."""
    packed = packed.view(np.uint8)
    halves = packed & 15, packed >> 4
    both = np.stack(halves if low_first else halves[::-1], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)


def e2m1(packed: np.ndarray) -> np.ndarray:
    """FP4 numbers, two in a byte with the first one in its lower half, as float32."""
    return _E2M1[nibbles(packed, low_first=True)]


def factors(scales: np.ndarray) -> np.ndarray:
    """Scales as float32; bytes are exponents, `2^(byte - 127)` with 255 for NaN."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def rounded(
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Callable[[slice], np.ndarray],
    multiple: int = 1,
) -> np.ndarray:
    """A tensor that is computed in float32, a few rows at a time, and rounded.

    Args:
      shape, dtype: shape and dtype of the result.
      rows: `rows(at)` computes the rows of a slice.
      multiple: slices begin at multiples of this.
    """
    out = np.empty(shape, dtype)
    step = max(_PIECE // max(math.prod(shape[1:]), 1), 1)
    step = -(-step // multiple) * multiple
    # What is too large for the type is reported by name when it is merged.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, shape[0], step):
            at = slice(start, min(start + step, shape[0]))
            out[at] = rows(at)
    return out
