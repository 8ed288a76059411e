"""Finds matrices that are `[in, out]`, as in the layers that GPT-2 calls Conv1D."""

import os
import re
from collections.abc import Mapping

from jaxarith.hub.stored import Stored


def known(base: Mapping[str, Stored]) -> dict[str, bool]:
    """Returns whether each matrix is `[in, out]`, if it is not square and has a bias.

    The length of the bias is the number of outputs.
    """
    found = {}
    for name, tensor in base.items():
        bias = base.get(name.removesuffix("weight") + "bias")
        if bias is None or len(tensor.shape) != 2:
            continue
        fits = [bias.shape == (length,) for length in tensor.shape]
        if name.endswith(".weight") and sum(fits) == 1:
            found[name] = fits[1]
    return found


def in_out(
    name: str, shape: tuple[int, ...], known: Mapping[str, bool], flag: bool
) -> bool:
    """Whether a matrix is `[in, out]`, as in the layers that GPT-2 calls Conv1D.

    PEFT looks at the class of the layer, but a checkpoint names no classes. The flag in
    PEFT's file is wrong for models with layers of both kinds. For a square matrix, the
    answer is that of another matrix in the same layer.
    """
    if len(shape) != 2:
        return False
    if name in known:
        return known[name]
    if shape[0] != shape[1]:
        return flag
    layer = re.match(r".*\.\d+\.", name)
    relatives = [other for other in known if layer and other.startswith(layer[0])]
    if not relatives:
        return flag
    return known[max(relatives, key=lambda other: _common(other, name))]


def _common(a, b):
    return len(os.path.commonprefix([a.split("."), b.split(".")]))
