"""GPTQ: integers of 2, 3, 4 or 8 bits, with scales and zeros for groups of inputs.

The tensors are `X.qweight` `[in · bits / 32, out]`, `X.qzeros` `[groups, out · bits /
32]`, `X.scales` `[groups, out]`, and `X.g_idx` `[in]`, the group of each input. The
first version of the format stores each zero minus one.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith.hub.quantised import bits
from jaxarith.hub.quantised.unpacked import Unpacked, expect
from jaxarith.hub.stored import Stored

_VERSIONS = ("gptq", "gptq_v2")
_BITS = (2, 3, 4, 8)


def zeros(qzeros: np.ndarray, width: int, count: int, *, less_one: bool) -> np.ndarray:
    """Unpacks the zeros of all groups, `[groups, count]`.

    Args:
      qzeros: words `[groups, n]`.
      width: bits of a field.
      count: the number of outputs.
      less_one: whether the file has the first version. One is then added to each field
        separately: a full field becomes 0 and does not carry into the next.
    """
    found = bits.fields(qzeros, width, count)
    return found + 1 & 2**width - 1 if less_one else found


def values(
    qweight: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    groups: np.ndarray,
    width: int,
) -> np.ndarray:
    """Returns the numbers `[out, in]`, in float32.

    Args:
      qweight: words `[n, out]`.
      zeros, scales: `[groups, out]`.
      groups: the group of each input.
      width: bits of a field.
    """
    found = bits.fields(qweight, width, len(groups), axis=0).astype(np.float32)
    found -= zeros.astype(np.float32)[groups]
    found *= scales.astype(np.float32)[groups]
    return found.T


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    stated = settings.get("checkpoint_format") or settings.get("format")
    version = str(stated or "gptq")
    if version not in _VERSIONS or settings.get("is_marlin_format"):
        version = version if version not in _VERSIONS else "marlin"
        raise ValueError(
            f"the layout {version} of GPTQ is not supported, only "
            f"{' and '.join(_VERSIONS)}. Give the model as it was before that."
        )
    found = Unpacked({}, set())
    for name, qweight in tensors.items():
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        parts = {end: f"{module}.{end}" for end in ("qweight", "qzeros", "scales")}
        if f"{module}.g_idx" in tensors:
            parts["g_idx"] = f"{module}.g_idx"
        if missing := [part for part in parts.values() if part not in tensors]:
            raise ValueError(f"{name} has no {', '.join(missing)}, which GPTQ needs.")
        given = {end: tensors[part] for end, part in parts.items()}
        width = _width(name, given, settings)
        shape = (qweight.shape[1], 32 * qweight.shape[0] // width)
        groups, words = given["scales"].shape[0], -(-width * shape[0] // 32)
        expect(parts["scales"], given["scales"], (groups, shape[0]))
        expect(parts["qzeros"], given["qzeros"], (groups, words), np.int32)
        make = functools.partial(
            _made, given, width, version == "gptq", _size(settings), shape, dtype
        )
        found.weights[f"{module}.weight"] = Stored.made(dtype, shape, make)
        found.parts.update(parts.values())
    return found


def _width(name, given, settings):
    """Returns the bits of a field, which single modules may set differently."""
    width = settings.get("bits")
    if "g_idx" in given:
        [inputs] = given["g_idx"].shape
        width = 32 * given["qweight"].shape[0] / inputs
    if width not in _BITS or given["qweight"].dtype != np.int32:
        raise ValueError(
            f"{name} is {given['qweight']} of {width} bits; expected words of i32 with "
            f"fields of {', '.join(map(str, _BITS))} bits."
        )
    return int(width)


def _size(settings):
    return int(settings.get("group_size") or -1)


def _made(given, width, less_one, size, shape, dtype):
    out, inputs = shape
    found = {end: part.read() for end, part in given.items()}
    if "g_idx" in found:
        groups = found["g_idx"]
    else:
        groups = np.arange(inputs) // (size if size > 0 else inputs)
    if groups.min() < 0 or groups.max() >= len(found["scales"]):
        raise ValueError(
            f"g_idx names the groups {groups.min()} to {groups.max()}, but there are "
            f"scales for {len(found['scales'])}."
        )
    offsets = zeros(found["qzeros"], width, out, less_one=less_one)

    def rows(at):
        parts = found["qweight"][:, at], offsets[:, at], found["scales"][:, at]
        return values(*parts, groups, width)

    return bits.rounded(shape, dtype, rows)
