"""Chooses the tensors that an extracted adapter keeps whole, and their PEFT names."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxarith.commands.adapters.classes import Layout
from jaxarith.hub import Stored
from jaxarith.hub.adapter_tensors import BASE_LAYER, PREFIX

_LANGUAGE_MODEL = re.compile(r".*(ForCausalLM|LMHeadModel)")


def task_type(config: Mapping[str, Any]) -> str | None:
    """Returns PEFT's name for the task of a language model's class.

    None for classifiers: with their task, PEFT expects a whole head in every adapter.
    """
    [architecture, *_] = config.get("architectures") or [""]
    if config.get("is_encoder_decoder") and architecture.endswith("Generation"):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if _LANGUAGE_MODEL.fullmatch(architecture) else None


class Rest(NamedTuple):
    """Tensors with which an adapter replaces those of the base.

    Attributes:
      whole: the tensors of each module by their last names; the modules by name.
      biases: the bias of each adapted module.
      left: the base's names of tensors that no adapter can keep.

    Modules have the names of the model's class.
    """

    whole: dict[str, dict[str, Stored]]
    biases: dict[str, Stored]
    left: list[str]

    @property
    def bias(self) -> str:
        """PEFT's value of `bias` for the biases in the file."""
        return "all" if self.biases else "none"

    @property
    def modules(self) -> list[str] | None:
        """The names in `modules_to_save`."""
        return sorted(self.whole) or None

    def tensors(self) -> dict[str, Stored]:
        """The tensors by their names in the file."""
        found = {
            f"{PREFIX}{module}.{last}": tensor
            for module, tensors in self.whole.items()
            for last, tensor in tensors.items()
        }
        return found | {
            f"{PREFIX}{module}{BASE_LAYER}.bias": tensor
            for module, tensor in self.biases.items()
        }


def rest(
    base: Mapping[str, Stored],
    layout: Layout,
    changed: Mapping[str, Stored],
    adapted: Collection[str],
) -> Rest:
    """Decides where an adapter keeps changed tensors: in whole modules or as biases.

    Modules that are tied to a kept module are kept too, because PEFT's copy of one is
    no longer tied to the other. A tensor is left out if the class joins or transposes
    it, or if every module around it has adapted layers.

    Args:
      base: the tensors of the base.
      layout: the names of these tensors in the model's class.
      changed: the model's tensors by the base's names.
      adapted: the modules that have factors, by the class's names.
    """
    tensors = {layout.names[name]: base[name] for name in base if name in layout.names}
    new = {
        layout.names[name]: tensor
        for name, tensor in changed.items()
        if name in layout.names
    }
    for name, tensor in [*new.items()]:
        new = dict.fromkeys(layout.tied.get(name, ()), tensor) | new
    tensors |= new
    biases = {
        name.removesuffix(".bias"): tensor
        for name, tensor in new.items()
        if name.endswith(".bias") and name.removesuffix(".bias") in adapted
    }
    modules = {
        name.rpartition(".")[0]
        for name in new
        if name.removesuffix(".bias") not in biases
    }
    modules = {
        module
        for module in modules
        if module and not any(_is_in(other, module) for other in adapted)
    }
    # PEFT does not allow a kept module inside another kept module.
    outermost = {
        x for x in modules if not any(x != y and _is_in(x, y) for y in modules)
    }
    whole = {
        module: {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.")
        }
        for module in outermost
    }
    found = Rest(whole, biases, [])
    kept = {name.replace(f"{BASE_LAYER}.", ".") for name in found.tensors()}
    left = [
        name for name in changed if PREFIX + layout.names.get(name, " ") not in kept
    ]
    return found._replace(left=left)


def _is_in(module: str, other: str) -> bool:
    return f"{module}.".startswith(f"{other}.")
