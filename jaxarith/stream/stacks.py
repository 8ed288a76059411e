"""Counts the layers of a model from its names and its configuration.

The first number between dots in a name is the layer. The part before it is the name of
the stack, so an encoder and a decoder are two stacks.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxarith.hub.config import parts

LAYER = re.compile(r"\.(\d+)\.")
# Keys of configurations that count layers: first of the language model, then of any
# stack.
MAIN = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_COUNT = re.compile(
    r"(num_)?(\w+_)?(hidden_)?layers?|n_layers?|depth|num_blocks|\w+_layers?"
)
FURTHER = re.compile(r"(^|\.)(mtp|nextn)\b")


def stacks(
    names: Iterable[str], config: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Returns the number of layers of every stack, by the name of the stack.

    Args:
      names: the names of all tensors.
      config: the content of `config.json`. If it counts the layers of one of the
        stacks, numbered modules that do not fit its counts are left out.
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
    """Returns a model's number of layers; beside an encoder, the language model's."""
    counts = set(stacks(names, config).values())
    text = (config or {}).get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config or {}):
        for key in MAIN:
            count = part.get(key)
            if type(count) is int and count in counts:
                return count
    return max(counts, default=0)


def _stated(config: Mapping[str, Any]) -> tuple[set[int], int]:
    """Returns all layer counts of a configuration, and that of extra-token layers."""
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
