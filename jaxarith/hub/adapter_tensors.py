"""Sorts the tensors in a file of a PEFT adapter by what they do to a module."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxarith import tree
from jaxarith.hub import folders, packed, safetensors
from jaxarith.hub.stored import Stored

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"  # the layer inside one of PEFT's

# A module's factors are `lora_A.weight` and `lora_B.weight`, or with the adapter's name
# `lora_A.default.weight`. Factors of embeddings and magnitudes of DoRA have no
# `.weight`.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|"
    r"lora_(?P<table>embedding_[AB])(?:\.[^.]+)?|"
    r"lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?|"
    r"lora_B(?:\.[^.]+)?\.(?P<bias>bias)|"
    r"token_adapter\.trainable_(?P<tokens>tokens)_delta(?:\.[^.]+)?)"
)
# Words that PEFT puts between the names of modules where it wraps them.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|modules_to_save(\.default)?)\.")
# If biases are trained, PEFT saves those of `modules_to_save` three times: under their
# own names, under the wrapper's names, and with their original values.
_SPARE = re.compile(r"(.+)\.(?:original_module|modules_to_save(?:\.default)?)\.(.+)")
_PAIRS = ({"A", "B"}, {"embedding_A", "embedding_B"})
# Further tensors beside A and B, by the configuration's key that announces them.
_TOLD = {"use_dora": "magnitude_vector", "lora_bias": "bias"}


class Factors(NamedTuple):
    """The factors of one layer.

    Attributes:
      a: `[rank, in, *window]`.
      b: `[out, rank, *ones]`.
      embedding: whether the layer is an embedding; its delta is then transposed.
      magnitude: DoRA's lengths `[out]`; None for other adapters.
      bias: what is added to the layer's bias, `[out]`, before scaling; None without it.
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
      factors: pairs by module. If a module has several trained parameters, their pairs
        are `module`, `module.base_layer`, and so on, the outermost first.
      tokens: the rows of trained tokens, by the module of their embedding.
      whole: tensors that replace those of the base, by name.
      inner: the names in `whole` that PEFT saves beside factors of the same module.
    """

    factors: dict[str, Factors]
    tokens: dict[str, Stored]
    whole: dict[str, Stored]
    inner: frozenset[str]


def read(folder: Path, config: Mapping[str, Any]) -> Parts:
    """Finds the tensors of an adapter, without reading them.

    Args:
      folder: the adapter.
      config: its configuration, as `adapter_config.read` returns it.

    Raises:
      FileNotFoundError: the adapter has no safetensors file.
      ValueError: the file has tensors that the configuration does not announce, or is
        incomplete.
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
            f"{folder} states trainable_token_indices, but has no trained tokens. The "
            "file is incomplete: save the adapter again."
        )
    factors = {m: _factors(folder, config, m, x) for m, x in kinds.items() if x}
    return Parts(factors, tokens, whole, frozenset(inner))


def _module(name):
    """Returns a module's name in its model, with `base_layer` for each layer inside."""
    bare = name
    while bare.endswith(BASE_LAYER):
        bare = bare.removesuffix(BASE_LAYER)
    return _WRAPPED.sub("", bare) + name[len(bare) :]


def _told(config, module, kind, tokens):
    """Whether a configuration announces such tensors; otherwise PEFT drops them."""
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
            f"{folder} holds lora_{' and lora_'.join(sides)} for {module}; expected "
            "both A and B. The file is incomplete: save the adapter again."
        )
    a, b = (found[side] for side in sides)
    for key, kind in _TOLD.items():
        if config.get(key) and kind not in found:
            raise ValueError(
                f"{folder} states {key}, but has no {kind} of {module}. The file is "
                "incomplete: save the adapter again."
            )
    return Factors(
        a, b, "embedding_A" in found, found.get("magnitude_vector"), found.get("bias")
    )


def _open(folder):
    if not (file := folder / folders.ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {folders.ADAPTER}. jaxarith does not open pickles: if "
            "the folder has an adapter_model.bin, load the adapter in PEFT and save it "
            "again."
        )
    tensors, _ = safetensors.open_file(file)
    packed.check(file, tensors, {})
    return tensors


def _some(names):
    return ", ".join(tree.first_few(names, most=3))
