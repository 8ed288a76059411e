"""Settings that differ from tensor to tensor: by a part of the name, or by depth.

A setting is a value; or a gradient, a list of numbers that are interpolated over the
layers; or a list of mappings with a `value`, which is either, and a `filter`, a part of
the names of the tensors that it is for. The first that fits counts. This is the
language of mergekit's files, with its depths.
"""

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"\.(\d+)\.")

Entries = Sequence[tuple[str | None, object]]


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor lies: from 0 in the first layer of its stack to 1.

    The first number between dots in a name is the layer, and what stands before it the
    stack, so that an encoder and a decoder have depths of their own. Tensors outside of
    all layers, before them or after, have depth 0, and the only layer of a stack has 1.

    Example:
      >>> depths(["h.0.w", "h.1.w", "h.2.w", "head.w"])
      {'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0, 'head.w': 0.0}
    """
    names = list(names)
    counts = stacks(names)
    return {name: _depth(_LAYER.search(name), counts) for name in names}


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of every stack, by what stands before their numbers."""
    counts = {}
    for found in filter(None, map(_LAYER.search, names)):
        stack = found.string[: found.start()]
        counts[stack] = max(counts.get(stack, 0), int(found[1]) + 1)
    return counts


def _depth(found, counts):
    if found is None:
        return 0.0
    last = counts[found.string[: found.start()]] - 1
    return int(found[1]) / last if last else 1.0


def entries(setting) -> Entries:
    """A setting as values with the filters that they stand behind.

    Settings that are asked one after another are their entries one after another.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        return [(entry.get("filter"), entry["value"]) for entry in setting]
    return [(None, setting)]


def value(found: Entries, name: str, depth: float):
    """The value for a tensor; None where no filter fits.

    Example:
      >>> setting = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]
      >>> value(entries(setting), "h.1.mlp.w", 0.25), value(entries(setting), "w", 0.0)
      (0.25, 0.3)
    """
    for part, setting in found:
        if part in (None, "*") or part in name:
            return _interpolated(setting, depth)
    return None


def _interpolated(setting, depth):
    if not isinstance(setting, list):
        return setting
    place = depth * (len(setting) - 1)
    low = int(place)
    high = min(low + 1, len(setting) - 1)
    share = place - low
    return (1 - share) * setting[low] + share * setting[high]


def is_constant(found: Entries) -> bool:
    """Whether all tensors have one value."""
    part, setting = found[0]
    if part not in (None, "*"):
        return False
    return not isinstance(setting, list) or len(set(setting)) == 1
