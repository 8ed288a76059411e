"""The tensors in a file of a PEFT adapter, by what they do to a module."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxarith import tree
from jaxarith.hub import folders, packed, safetensors
from jaxarith.hub.stored import Stored

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"  # the layer inside one of PEFT's

# A module's factors are `lora_A.weight` and `lora_B.weight`, or with the name of the
# adapter as in `lora_A.default.weight`; those of embeddings have no `.weight`, and
# neither has the magnitude of DoRA.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|"
    r"lora_(?P<table>embedding_[AB])(?:\.[^.]+)?|"
    r"lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?|"
    r"lora_B(?:\.[^.]+)?\.(?P<bias>bias)|"
    r"token_adapter\.trainable_(?P<tokens>tokens)_delta(?:\.[^.]+)?)"
)
# Words that PEFT puts between the names of modules where it wraps them.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|modules_to_save(\.default)?)\.")
# Where biases are trained, PEFT saves those of `modules_to_save` three times: by their
# own names, by the wrapper's, and as they were.
_SPARE = re.compile(r"(.+)\.(?:original_module|modules_to_save(?:\.default)?)\.(.+)")
_PAIRS = ({"A", "B"}, {"embedding_A", "embedding_B"})
# What factors have beside A and B, by the configuration's key that says so.
_TOLD = {"use_dora": "magnitude_vector", "lora_bias": "bias"}


class Factors(NamedTuple):
    """The factors of one layer.

    Attributes:
      a: `[rank, in, *window]`.
      b: `[out, rank, *ones]`.
      embedding: whether the layer is a table, whose delta is the transpose.
      magnitude: the lengths `[out]` of DoRA, if the adapter is one.
      bias: what is added to the layer's bias, `[out]`, before scaling.
    """

    a: Stored
    b: Stored
    embedding: bool = False
    magnitude: Stored | None = None
    bias: Stored | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Parts(NamedTuple):
    """The tensors of an adapter.

    Attributes:
      factors: by module. Of a module with several trained parameters, the pairs are
        `module`, `module.base_layer`, and so on, from the outermost.
      tokens: by the module of an embedding, the rows of its trained tokens.
      whole: by name, tensors that take the place of the base's.
      inner: the names in `whole` that PEFT saves beside factors of the same module.
    """

    factors: dict[str, Factors]
    tokens: dict[str, Stored]
    whole: dict[str, Stored]
    inner: frozenset[str]


def read(folder: Path, config: Mapping[str, Any]) -> Parts:
    """Finds the tensors of an adapter; none is read.

    Args:
      folder: the adapter.
      config: its configuration, as `adapter_config.read` returns it.

    Raises:
      FileNotFoundError: there is no file of safetensors.
      ValueError: it holds what its configuration does not tell, or is incomplete.
    """
    kinds: dict[str, dict[str, Stored]] = {}
    tokens: dict[str, Stored] = {}
    whole: dict[str, Stored] = {}
    inner, strange = set(), []
    tensors = _open(folder)
    for key, tensor in tensors.items():
        spare = _SPARE.fullmatch(key)
        if spare and f"{spare[1]}.{spare[2]}" in tensors:
            continue
        bare = key.removeprefix(PREFIX)
        name, place = _WRAPPED.sub("", bare), whole
        if found := _FACTOR.fullmatch(bare):
            module, name = _module(found["module"]), found[found.lastgroup or ""]
            place = kinds.setdefault(module, {})
            if name == "tokens":
                name, place = module, tokens
            if not _told(config, module, name, place is tokens):
                strange.append(key)
        elif "lora_" in name:
            strange.append(key)
        elif BASE_LAYER in bare:
            inner.add(name)
        if name in place:
            strange.append(key)
        place[name] = tensor
    if strange or not tensors:
        raise ValueError(
            f"{folder} holds {_some(strange) or 'no tensors'}; expected one LoRA "
            "adapter as its configuration describes it. Other kinds, and several in "
            "one file, are not supported: merge it into a model in PEFT."
        )
    if config.get("trainable_token_indices") and not tokens:
        raise ValueError(
            f"{folder} says trainable_token_indices and holds no trained tokens. The "
            "file is incomplete: save the adapter again."
        )
    factors = {m: _factors(folder, config, m, x) for m, x in kinds.items() if x}
    return Parts(factors, tokens, whole, frozenset(inner))


def _module(name):
    """The name of a module in its model, and one `base_layer` for each layer inside."""
    bare = name
    while bare.endswith(BASE_LAYER):
        bare = bare.removesuffix(BASE_LAYER)
    return _WRAPPED.sub("", bare) + name[len(bare) :]


def _told(config, module, kind, tokens):
    """Whether a configuration speaks of such tensors; PEFT drops them otherwise."""
    key = next((key for key, told in _TOLD.items() if told == kind), None)
    if tokens:
        key = "trainable_token_indices"
    if module.endswith(BASE_LAYER):
        key = "target_parameters"
    return key is None or bool(config.get(key))


def _factors(folder, config, module, found):
    sides = sorted(found.keys() - {"magnitude_vector", "bias"})
    if set(sides) not in _PAIRS:
        raise ValueError(
            f"{folder} holds of {module} lora_{' and lora_'.join(sides)}; expected an "
            "A and a B. The file is incomplete: save the adapter again."
        )
    a, b = (found[side] for side in sides)
    for key, kind in _TOLD.items():
        if config.get(key) and kind not in found:
            raise ValueError(
                f"{folder} says {key} and holds no {kind} of {module}. The file is "
                "incomplete: save the adapter again."
            )
    return Factors(
        a, b, "embedding_A" in found, found.get("magnitude_vector"), found.get("bias")
    )


def _open(folder):
    if not (file := folder / folders.ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {folders.ADAPTER}. jaxarith opens no pickle: if there "
            "is an adapter_model.bin, load the adapter in PEFT and save it again."
        )
    tensors, _ = safetensors.open_file(file)
    packed.check(file, tensors, {})
    return tensors


def _some(names):
    return ", ".join(tree.first_few(names, most=3))
