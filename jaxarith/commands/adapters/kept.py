"""What an extracted adapter keeps whole, and under which names PEFT finds it."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxarith.hub import Stored
from jaxarith.hub.adapter_tensors import BASE_LAYER, PREFIX
from jaxarith.stream import tying

# The module of the trunk in models with a head, by `model_type`, that old files lack.
_OUTER = {
    "gpt2": "transformer",
    "gpt_neo": "transformer",
    "gptj": "transformer",
    "bloom": "transformer",
    "falcon": "transformer",
    **{kind: kind for kind in ("bert", "roberta", "distilbert", "electra", "albert")},
}
_LANGUAGE_MODEL = re.compile(r".*(ForCausalLM|LMHeadModel)")


def outer_name(base: Mapping[str, Stored], config: Mapping[str, Any]) -> str:
    """What the modules of a model with a head have in front of the file's names.

    Files of OpenAI's GPT-2, say, hold `h.0.attn`, and their configuration names a class
    in which that is `transformer.h.0.attn`.
    """
    [architecture, *_] = config.get("architectures") or [""]
    outer = _OUTER.get(str(config.get("model_type")))
    is_trunk = architecture.endswith("Model") and "LMHead" not in architecture
    if outer is None or not architecture or is_trunk:
        return ""
    inside = any(name.startswith(f"{outer}.") for name in base)
    return "" if inside else f"{outer}."


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's name for the task of a language model's class.

    None for classifiers: for theirs PEFT looks for a whole head in every adapter.
    """
    [architecture, *_] = config.get("architectures") or [""]
    if config.get("is_encoder_decoder") and architecture.endswith("Generation"):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if _LANGUAGE_MODEL.fullmatch(architecture) else None


class Rest(NamedTuple):
    """Tensors that an adapter puts in place of the base's.

    Attributes:
      whole: by module, its tensors by their last names.
      biases: by adapted module, its bias.

    Modules have the names of the model's class.
    """

    whole: dict[str, dict[str, Stored]]
    biases: dict[str, Stored]

    @property
    def bias(self) -> str:
        """PEFT's word for the biases in the file."""
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
    config: Mapping[str, Any],
    changed: Mapping[str, Stored],
    adapted: Collection[str],
    outer: str,
) -> Rest:
    """Where an adapter keeps changed tensors: whole modules, and biases of layers.

    A head that is tied to an embedding is kept with it, for PEFT's copy of the one is
    no longer the other.

    Args:
      base: the tensors of the base.
      config: the content of its `config.json`.
      changed: the model's tensors by the base's names.
      adapted: the modules that have factors, by the base's names.
      outer: what the class has in front of the base's names.

    Raises:
      ValueError: a tensor is no module's own, or its module holds adapted ones.
    """
    tied = tying.pair(base, config)
    alone = set() if tied is None or tied.head in base else {tied.head}
    if tied is not None and tied.embedding in changed:
        changed = {tied.head: changed[tied.embedding], **changed}
    whole: dict[str, dict[str, Stored]] = {}
    biases: dict[str, Stored] = {}
    for name in changed:
        module, _, last = name.rpartition(".")
        if module in adapted and last == "bias":
            biases[outer + module] = changed[name]
            continue
        inside = [name, *(x for x in base if x.startswith(f"{module}."))]
        if not module or any(f"{x}.".startswith(f"{module}.") for x in adapted):
            raise ValueError(
                f"{name} changed, and PEFT can keep it only with the whole module "
                f"{module or 'of the model'}, which holds adapted layers. Leave "
                "--keep-rest out."
            )
        whole[module if name in alone else outer + module] = {
            x.removeprefix(f"{module}."): changed[x] if x in changed else base[x]
            for x in inside
        }
    return Rest(whole, biases)
