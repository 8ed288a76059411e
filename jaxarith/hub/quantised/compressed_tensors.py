"""compressed-tensors: integers, FP8 and FP4, with scales of tensors, rows or groups.

A weight is `X.weight` or `X.weight_packed`. Depending on the format, it comes with
`X.weight_scale`, `X.weight_zero_point`, `X.weight_global_scale`, `X.weight_g_idx` (the
group of each input) and `X.weight_shape`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith.hub.quantised import bits, blocks
from jaxarith.hub.quantised.unpacked import Unpacked, expect
from jaxarith.hub.stored import Stored

_ENDS = ("", "_packed", "_scale", "_zero_point", "_global_scale", "_g_idx", "_shape")


def values(
    numbers: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    block: tuple[int, int],
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the weights `[out, in]`, in float32.

    Args:
      numbers: `[out, in]`.
      scales: one for each block, as floating-point numbers.
      zeros: one for each block, as stored; None if the format has none.
      block: rows and columns of a block.
      groups: the group of each input, if groups are not blocks; the scales are then
        `[out, groups]`.
    """

    def each(found):
        if groups is not None:
            return found[:, groups]
        return blocks.spread(found, block, numbers.shape)

    centred = numbers.astype(np.float32)
    if zeros is not None:
        centred = centred - each(zeros).astype(np.float32)
    return centred * each(bits.factors(scales))


def unpacked(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """Unpacks signed integers from words, which store them as unsigned."""
    return bits.fields(words, width, count) - 2 ** (width - 1)


def read(
    tensors: Mapping[str, Stored], settings: Mapping[str, Any], dtype: np.dtype
) -> Unpacked:
    """Finds the weights of this format; see `quantised.READERS`."""
    inner = settings.get("quantization_config")
    settings = {**settings, **inner} if isinstance(inner, Mapping) else settings
    _check(settings)
    schemes = [
        group["weights"]
        for group in (settings.get("config_groups") or {}).values()
        if isinstance(group, Mapping) and group.get("weights")
    ]
    found = Unpacked({}, set())
    for name in tensors:
        weight = name.removesuffix("_scale")
        if weight == name or not weight.endswith("weight"):
            continue
        names = {end: f"{weight}{end}" for end in _ENDS if f"{weight}{end}" in tensors}
        given = {end: tensors[part] for end, part in names.items()}
        leaf = _leaf(weight, given, schemes, dtype)
        if leaf is not None:
            found.weights[weight] = leaf
            found.parts.update(names.values())
    return found


def _check(settings):
    form = str(settings.get("format"))
    sparse = settings.get("sparsity_config")
    sparse = sparse.get("format") if isinstance(sparse, Mapping) else None
    for what in (form, str(sparse or "dense")):
        if "24" in what or "bitmask" in what:
            raise ValueError(
                f"the layout {what} of compressed-tensors is not supported. Give the "
                "model as it was before it was made sparse."
            )
    if settings.get("transform_config"):
        raise ValueError(
            "the weights are rotated (transform_config of compressed-tensors), which "
            "is not supported. Give the model in floating point."
        )


def _leaf(name, given, schemes, dtype):
    """Returns the weight, not read yet; None if scales have no weight."""
    packed = given.get("_packed", given.get(""))
    if packed is None or len(packed.shape) != 2:
        return None
    out, columns = packed.shape
    width, size = None, None
    if "_packed" not in given:
        size = 32 if given["_scale"].dtype == np.uint8 else None  # MXFP8
    elif packed.dtype == np.uint8:  # NVFP4 has a scale of the whole tensor, MXFP4 none
        columns *= 2
        size = 16 if "_global_scale" in given else 32
    else:
        columns = _columns(name, packed, given)
        width = _width(name, packed, columns, schemes)
    shape = (out, columns)
    scales = given["_scale"].shape
    if "_global_scale" in given:
        expect(f"{name}_global_scale", given["_global_scale"], (1,))
    if (zeros := given.get("_zero_point")) is not None:
        is_packed = width is not None and zeros.dtype == np.int32
        rows = -(-out * width // 32) if is_packed else None
        expect(f"{name}_zero_point", zeros, (rows, *scales[1:]) if rows else scales)
    if "_g_idx" in given and (given["_g_idx"].read() >= 0).all():
        expect(f"{name}_g_idx", given["_g_idx"], (columns,))
        expect(f"{name}_scale", given["_scale"], (out, scales[1]))
        block = None
    else:
        stated = {(1, size)} if size else _blocks(schemes, scales, columns)
        block = blocks.size(name, scales, shape, stated)
    make = functools.partial(_made, given, shape, block, width, dtype)
    return Stored.made(dtype, shape, make)


def _columns(name, packed, given):
    if "_shape" not in given:
        raise ValueError(f"{name}_packed is {packed}, but {name}_shape is missing.")
    return int(given["_shape"].read()[1])


def _blocks(schemes, scales, columns):
    """Returns rows and columns of all schemes' blocks; without any, equal groups."""
    found = set()
    for scheme in schemes:
        high, wide = scheme.get("block_structure") or (1, scheme.get("group_size") or 0)
        if wide > 0:
            found.add((int(high), int(wide)))
    if not found and len(scales) == 2 and scales[1] and columns % scales[1] == 0:
        return {(1, columns // scales[1])}
    return found


def _width(name, packed, columns, schemes):
    """Returns the bits of a field, from the scheme that fits the number of words."""
    widths = {int(one.get("num_bits") or 0) for one in schemes} - {0}
    fitting = {w for w in widths if -(-columns * w // 32) == packed.shape[1]}
    if len(fitting) != 1 or packed.dtype != np.int32:
        raise ValueError(
            f"{name}_packed is {packed} for {columns} columns, which fits "
            f"{'several' if fitting else 'none'} of the bits that config.json states "
            f"({', '.join(map(str, sorted(widths))) or 'none'})."
        )
    return fitting.pop()


def _made(given, shape, block, width, dtype):
    found = {end: part.read() for end, part in given.items()}
    numbers = found["_packed" if "_packed" in found else ""]
    scales, zeros = found["_scale"], found.get("_zero_point")
    groups = found["_g_idx"] if block is None else None
    high, wide = block or (1, shape[1])
    if "_global_scale" in found:
        scales = scales.astype(np.float32) / found["_global_scale"].astype(np.float32)
    if width is not None and zeros is not None and zeros.dtype == np.int32:
        # The zeros of integers of a few bits are packed along the rows.
        zeros = unpacked(np.ascontiguousarray(zeros.T), width, shape[0]).T
    grid = (-(-shape[0] // high), -1)  # a row of scales for each row of blocks
    scales = scales.reshape(grid)
    zeros = None if zeros is None else zeros.reshape(grid)

    def rows(at):
        part = numbers[at]
        if width is not None:
            part = unpacked(part, width, shape[1])
        elif "_packed" in found:
            part = bits.e2m1(part)
        of = slice(at.start // high, -(-at.stop // high))
        below = None if zeros is None else zeros[of]
        return values(part, scales[of], below, (high, wide), groups)

    return bits.rounded(shape, dtype, rows, multiple=high)
