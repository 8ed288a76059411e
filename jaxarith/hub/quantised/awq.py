"""AWQ, layout "gemm": 4-bit integers, with a scale and a zero for each input group.

`X.qweight` `[in, out / 8]`, `X.qzeros` `[groups, out / 8]`, `X.scales` `[groups, out]`.
The fields of a word, from the lowest, are the columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith.hub.quantised import bits
from jaxarith.hub.quantised.unpacked import Unpacked, expect
from jaxarith.hub.stored import Stored

_SHIFTS = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)  # of the columns of a word
_ENDS = ("qweight", "qzeros", "scales")


def columns(words: np.ndarray) -> np.ndarray:
    """Unpacks words `[..., n]` to fields `[..., 8 n]`, in the order of columns."""
    found = words.view(np.uint32)[..., None] >> _SHIFTS & np.uint32(15)
    return found.reshape(*words.shape[:-1], -1)


def values(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers `[out, in]`, in float32.

    Args:
      qweight: words `[in, out / 8]`.
      qzeros: words `[groups, out / 8]`.
      scales: `[groups, out]`.
    """
    size = len(qweight) // len(scales)
    found = columns(qweight).astype(np.float32)
    found -= np.repeat(columns(qzeros).astype(np.float32), size, axis=0)
    found *= np.repeat(scales.astype(np.float32), size, axis=0)
    return found.T


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    version = str(settings.get("version") or "gemm").lower()
    width = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or width != 4:
        raise ValueError(
            f"AWQ in the layout {version} with {width} bits is not supported, only "
            "gemm with 4 bits. Give the model as it was before it was repacked."
        )
    found = Unpacked({}, set())
    for name in tensors:
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        parts = [f"{module}.{end}" for end in _ENDS]
        if missing := [part for part in parts if part not in tensors]:
            raise ValueError(f"{name} has no {', '.join(missing)}, which AWQ needs.")
        given = [tensors[part] for part in parts]
        inputs, words = given[0].shape
        groups = given[2].shape[0]
        for part, tensor, length in zip(parts, given, (inputs, groups), strict=False):
            expect(part, tensor, (length, words), np.int32)
        expect(parts[2], given[2], (groups, 8 * words))
        if inputs % groups:
            raise ValueError(f"{name} has {inputs} inputs in {groups} groups.")
        shape = (8 * words, inputs)
        make = functools.partial(_made, given, shape, dtype)
        found.weights[f"{module}.weight"] = Stored.made(dtype, shape, make)
        found.parts.update(parts)
    return found


def _made(given, shape, dtype):
    qweight, qzeros, scales = [part.read() for part in given]

    def rows(at):
        words = slice(at.start // 8, at.stop // 8)
        return values(qweight[:, words], qzeros[:, words], scales[:, at])

    return bits.rounded(shape, dtype, rows, multiple=8)
