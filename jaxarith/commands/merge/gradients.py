"""Settings that differ between tensors: by a part of the name, or by depth.

A setting is a list of entries; the first entry that fits a tensor is used. An entry has
a value, or a gradient of values that are interpolated over the layers. It may have a
filter: a part of the names of its tensors. This is the language of mergekit's files,
with its depths.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from jaxarith.stream.stacks import LAYER, stacks

Value: TypeAlias = float | bool | str


class Entry(NamedTuple):
    """A value for some or all tensors.

    Attributes:
      value: the value; or a gradient, which is a tuple of values.
      part: a part of the names of the tensors; None or "*" fits all.
    """

    value: Value | tuple[Value, ...]
    part: str | None = None


Setting: TypeAlias = tuple[Entry, ...]


def constant(value: Value) -> Setting:
    """Returns the setting with one value for all tensors."""
    return (Entry(value),)


def plain(setting: Setting) -> Any:
    """Returns the setting in the form of a file: a value, a list, or mappings.

    Example:
      >>> plain((Entry((0, 1)),)), plain((Entry(2, "mlp"), Entry(1)))
      ([0, 1], [{'filter': 'mlp', 'value': 2}, {'value': 1}])
    """
    values = [list(v) if isinstance(v, tuple) else v for v, _ in setting]
    if len(setting) == 1 and setting[0].part is None:
        return values[0]
    return [
        {"value": value} if part is None else {"filter": part, "value": value}
        for value, (_, part) in zip(values, setting, strict=True)
    ]


def depths(
    names: Iterable[str], config: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Returns each tensor's depth: 0 in the first layer of its stack, 1 in the last.

    The first number between dots in a name is the layer. The part before it is the name
    of the stack, so an encoder and a decoder have separate depths. Tensors outside all
    layers have the depth 0. The only layer of a stack has the depth 1, and so have
    layers beyond those of the configuration, which predict further tokens.

    Args:
      names: the names of all tensors.
      config: the content of `config.json`, to tell layers from other numbers.

    Example:
      >>> depths(["h.0.w", "h.1.w", "h.2.w", "head.w"])
      {'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0, 'head.w': 0.0}
      >>> depths(["h.0.w", "h.1.w", "head.0.w"], {"num_hidden_layers": 2})
      {'h.0.w': 0.0, 'h.1.w': 1.0, 'head.0.w': 0.0}
    """
    names = list(names)
    counts = stacks(names, config)
    return {name: _depth(LAYER.search(name), counts) for name in names}


def _depth(found: re.Match[str] | None, counts: Mapping[str, int]) -> float:
    stack = found.string[: found.start()] if found else ""
    if found is None or stack not in counts:
        return 0.0
    last = counts[stack] - 1
    return min(int(found[1]) / last, 1.0) if last else 1.0


def value(setting: Setting, name: str, depth: float) -> Value | None:
    """Returns the value for a tensor; None if no filter fits.

    Example:
      >>> setting = (Entry((0, 1), "mlp"), Entry(0.3))
      >>> value(setting, "h.1.mlp.w", 0.25), value(setting, "w", 0.0)
      (0.25, 0.3)
    """
    for found, part in setting:
        if part is None or part == "*" or part in name:
            return _interpolated(found, depth) if isinstance(found, tuple) else found
    return None


def _interpolated(values, depth):
    place = depth * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    share = place - low
    return (1 - share) * values[low] + share * values[high]


def is_constant(setting: Setting) -> bool:
    """Whether all tensors have one value."""
    found, part = setting[0]
    if part not in (None, "*"):
        return False
    return not isinstance(found, tuple) or len(set(found)) == 1


def unused(settings: Iterable[Setting], names: Collection[str]) -> list[str]:
    """Returns the filters that fit none of the tensors."""
    parts = {part for setting in settings for _, part in setting if part is not None}
    return sorted(
        part for part in parts - {"*"} if not any(part in name for name in names)
    )
