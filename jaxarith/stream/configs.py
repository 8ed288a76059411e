"""Checks whether models with the same tensors also have the same configuration.

The shapes of tensors do not show heads, rotary embeddings, activations and windows. A
merge keeps only the base's `config.json`, so differences in the others would be lost.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxarith import tree
from jaxarith.hub.config import parts

# Keys that say how a matrix is cut into heads. Models with different cuts must not be
# averaged.
_HEADS = re.compile(r"\w*heads?(_kv)?|\w*head_dim|kv_channels|multi_query|d_kv")
# Keys that say where a file came from or how it is run, and keys that other checks use.
_ELSEWHERE = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|use_cache|(quantization|compression)_config|"
    r"tie_word_embeddings|vocab_size|gradient_checkpointing|finetuning_task|model_type|"
    r"output_(attentions|hidden_states)|return_dict|auto_map|\w*dropout\w*|use_return_dict"
)


def compare(base: Mapping[str, Any], model: Mapping[str, Any], label: str) -> list[str]:
    """Returns notes on differences between a model's configuration and the base's.

    Args:
      base, model: the contents of `config.json`; empty if there is none.
      label: the name of the model in errors and notes.

    Raises:
      ValueError: the model has another type, or other numbers of heads.
    """
    if base and not model:
        return [
            f"{label} has no config.json, so heads, positions and activations were not "
            "compared with the base's"
        ]
    base, model, notes = _parts(base, model, label)
    ours, theirs = dict(_entries(base)), dict(_entries(model))
    lines = [
        f"{key} is {_shown(theirs[key])}, but {_shown(ours[key])} in the base"
        for key in ours.keys() & theirs.keys()
        if ours[key] != theirs[key]
    ]
    cuts = [line for line in sorted(lines) if _HEADS.fullmatch(_last(line.split()[0]))]
    if cuts:
        raise ValueError(
            f"{label} has other heads than the base in config.json: {'; '.join(cuts)}. "
            "The same weights compute something else with other heads. Give models of "
            "one base. If one config.json is wrong, correct it."
        )
    notes += [f"{label}: in its config.json {line}" for line in sorted(lines)]
    for more, less, whose in ((theirs, ours, label), (ours, theirs, "the base")):
        # An absent key has a default, which is often false or empty.
        alone = sorted(key for key in more.keys() - less.keys() if more[key])
        if alone and model:
            names = ", ".join(tree.first_few(alone, most=12))
            against = f", not {label}," if whose == "the base" else ""
            notes.append(f"only {whose}{against} states in config.json: {names}")
    return notes


def _parts(base, model, label):
    """Returns the two configurations, or a part of one that is like the other."""
    kinds = base.get("model_type"), model.get("model_type")
    if None in kinds or kinds[0] == kinds[1]:
        return (base, model, []) if base and model else ({}, {}, [])
    for name, part in parts(base).items():
        if part.get("model_type") == kinds[1]:
            return part, model, [f"{label}: compared with {name} of the base"]
    for name, part in parts(model).items():
        if part.get("model_type") == kinds[0]:
            return base, part, [f"{label}: its {name} is compared with the base"]
    texts = [isinstance(c.get("text_config"), Mapping) for c in (base, model)]
    if texts[0] != texts[1]:
        base, model = (c.get("text_config", c) for c in (base, model))
        note = f"{label}: a model_type {kinds[1]!r} beside one {kinds[0]!r}, of which "
        return base, model, [f"{note}only the language models are compared"]
    raise ValueError(
        f"{label} has the model_type {kinds[1]!r} and the base {kinds[0]!r}. They "
        "compute differently, even with equal tensors. Give models of one base. If one "
        "config.json is wrong, correct it."
    )


def _entries(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the entries that may change what is computed, under keys with dots."""
    plain = {k: v for k, v in config.items() if not k.startswith("rope_")}
    for key, value in (plain | _rope(config)).items():
        if _ELSEWHERE.fullmatch(key):
            continue
        if key.endswith(("_config", "rope")) and isinstance(value, Mapping):
            yield from _entries(value, f"{above}{key}.")
        else:
            yield above + key, value


def _rope(config):
    """Returns rotary embeddings in one spelling for all versions of transformers."""
    given = {k: v for k, v in config.items() if k.startswith("rope_")}
    rope = {**(given.pop("rope_scaling", {}) or {})}
    rope |= given.pop("rope_parameters", {}) or {}
    if "rope_theta" in given:
        rope.setdefault("rope_theta", given.pop("rope_theta"))
    kind = rope.pop("type", rope.pop("rope_type", "default"))
    rope = {key.removeprefix("rope_"): value for key, value in rope.items()}
    return given | ({"rope": rope | {"kind": kind}} if rope else {})


def _last(key):
    return key.rpartition(".")[2]


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
