"""Applies adapters of fused experts to files that hold each expert separately.

transformers 5 fuses the experts of most models when it loads them. Adapters are then
trained on the fused parameters: `gate_up_proj` `[experts, 2 width, hidden]` and
`down_proj` `[experts, hidden, width]`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxarith.hub.adapter_tensors import Factors
from jaxarith.hub.stored import Stored

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
# The names of an expert's matrices: the two that are fused, and then the last.
_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_MODULE = re.compile(r"\.block_sparse_moe(?=\.experts$)")  # in files of Mixtral


class Fused(NamedTuple):
    """A parameter of a model that a file holds in separate tensors.

    Attributes:
      leaf: dtype and shape `[experts, out, in]` of the parameter; it cannot be read.
      parts: for each expert, the names of the tensors that are stacked in its matrix.
    """

    leaf: Stored
    parts: list[list[str]]


def find(base: Mapping[str, Stored]) -> dict[str, Fused]:
    """Returns, by name, the fused parameters whose experts a file holds separately."""
    counts: dict[str, int] = {}
    for found in filter(None, map(_EXPERT.fullmatch, base)):
        counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    fused = {}
    for module, count in counts.items():
        for gate, up, down in _MATRICES:
            for name, kinds in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
                parts = [
                    [f"{module}.{expert}.{kind}.weight" for kind in kinds]
                    for expert in range(count)
                ]
                if all(part in base for row in parts for part in row):
                    leaf = _fused([[base[part] for part in row] for row in parts])
                    if leaf is not None:
                        place = f"{_MODULE.sub('.mlp', module)}.{name}"
                        fused[place] = Fused(leaf, parts)
    return fused


def _fused(rows):
    """Returns one leaf for all experts; None if they differ in shape or dtype."""
    [shapes, *others] = [tuple(part.shape for part in row) for row in rows]
    if any(other != shapes for other in others) or len({x[1:] for x in shapes}) > 1:
        return None
    shape = (len(rows), sum(out for out, *_ in shapes), *shapes[0][1:])
    return Stored.made(rows[0][0].dtype, shape, lambda: np.empty(0))


def deltas(fused: Fused, pair: Factors, scaling: float) -> dict[str, Stored]:
    """Returns what factors of the parameter add to each tensor of the file."""
    count, rows, _ = fused.leaf.shape
    found = {}
    for expert, names in enumerate(fused.parts):
        height = rows // len(names)
        for i, name in enumerate(names):
            place = slice(i * height, (i + 1) * height)
            shape = (height, fused.leaf.shape[2])

            def read(expert=expert, place=place):
                a = pair.a.read().reshape(count, -1, pair.a.shape[1])[expert]
                b = pair.b.read().reshape(rows, -1, count)[place, :, expert]
                product = b.astype(np.float32) @ a.astype(np.float32)
                return np.float32(scaling) * product

            found[name] = Stored.made(np.float32, shape, read)
    return found
