"""Stacks of layers: how many layers a model has, by its names and its configuration.

The first number between dots in a name is the layer, and what stands before it the
stack, so that an encoder and a decoder are two stacks.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxarith.hub.config import parts

LAYER = re.compile(r"\.(\d+)\.")
# Keys of configurations that count layers: of the language model, and of any stack.
MAIN = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_COUNT = re.compile(
    r"(num_)?(\w+_)?(hidden_)?layers?|n_layers?|depth|num_blocks|\w+_layers?"
)
FURTHER = re.compile(r"(^|\.)(mtp|nextn)\b")


def stacks(
    names: Iterable[str], config: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """The number of layers of every stack, by what stands before their numbers.

    Args:
      names: the names of all tensors.
      config: the content of `config.json`. If it counts the layers of one of the
        stacks, numbered modules that are no such stack are left out.
    """
    counts: dict[str, int] = {}
    for found in filter(None, map(LAYER.search, names)):
        stack = found.string[: found.start()]
        counts[stack] = max(counts.get(stack, 0), int(found[1]) + 1)
    stated, further = _stated(config or {})
    known = {}
    for stack, count in counts.items():
        trunk = [n for n in stated if n < count <= n + further]
        if count in stated or FURTHER.search(stack):
            known[stack] = count
        elif trunk:
            known[stack] = trunk[0]
    layers = [stack for stack in known if not FURTHER.search(stack)]
    return known if layers else counts


def layers(names: Iterable[str], config: Mapping[str, Any] | None = None) -> int:
    """The number of layers of a model, of the language model beside an encoder."""
    counts = set(stacks(names, config).values())
    text = (config or {}).get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config or {}):
        for key in MAIN:
            count = part.get(key)
            if type(count) is int and count in counts:
                return count
    return max(counts, default=0)


def _stated(config: Mapping[str, Any]) -> tuple[set[int], int]:
    """All numbers of layers in a configuration, and of layers for further tokens."""
    found, further = set(), 0
    for part in parts(config).values():
        inner, more = _stated(part)
        found, further = found | inner, max(further, more)
    for key, value in config.items():
        if type(value) is int and key == "num_nextn_predict_layers":
            further = max(further, value)
        elif type(value) is int and value > 0 and _COUNT.fullmatch(key):
            found.add(value)
    return found, further
