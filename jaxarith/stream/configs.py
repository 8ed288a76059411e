"""Whether configurations of models with the same tensors compute the same.

Heads, rotary embeddings, activations and windows leave no trace in the shapes of
tensors. Only the base's `config.json` goes with a merge, so what others say is lost.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxarith import tree
from jaxarith.hub.config import parts

# How a matrix is cut into heads: a mean over other cuts is of no model.
_HEADS = re.compile(r"\w*heads?(_kv)?|\w*head_dim|kv_channels|multi_query|d_kv")
# What says where a file came from or how it is run, and what other checks look at.
_ELSEWHERE = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|use_cache|(quantization|compression)_config|"
    r"tie_word_embeddings|vocab_size|gradient_checkpointing|finetuning_task|model_type|"
    r"output_(attentions|hidden_states)|return_dict|auto_map|\w*dropout\w*|use_return_dict"
)


def compare(base: Mapping[str, Any], model: Mapping[str, Any], label: str) -> list[str]:
    """Notes on what the configuration of a model says otherwise than the base's.

    Args:
      base, model: the contents of `config.json`; empty where there is none.
      label: what errors and notes call the model.

    Raises:
      ValueError: the model is of another type, or has other numbers of heads.
    """
    if base and not model:
        return [
            f"{label} has no config.json, so heads, positions and activations were not "
            "compared with the base's"
        ]
    base, model, notes = _parts(base, model, label)
    ours, theirs = dict(_entries(base)), dict(_entries(model))
    lines = [
        f"{key} is {_shown(theirs[key])}, in the base {_shown(ours[key])}"
        for key in ours.keys() & theirs.keys()
        if ours[key] != theirs[key]
    ]
    cuts = [line for line in sorted(lines) if _HEADS.fullmatch(_last(line.split()[0]))]
    if cuts:
        raise ValueError(
            f"{label} has other heads than the base by config.json: {'; '.join(cuts)}. "
            "The same weights compute differently there. Give models of one base; if "
            "one config.json is wrong, correct it."
        )
    notes += [f"{label}: by its config.json {line}" for line in sorted(lines)]
    for more, less, whose in ((theirs, ours, label), (ours, theirs, "the base")):
        # An absent key has a default, which false or nothing often is.
        alone = sorted(key for key in more.keys() - less.keys() if more[key])
        if alone and model:
            names = ", ".join(tree.first_few(alone, most=12))
            against = f", beside {label}" if whose == "the base" else ""
            notes.append(f"{whose} alone gives in config.json{against}: {names}")
    return notes


def _parts(base, model, label):
    """The two configurations, or a part of one of them that is like the other."""
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
        f"{label} is of model_type {kinds[1]!r} and the base of {kinds[0]!r}, which "
        "compute differently, even with equal tensors. Give models of one base; if one "
        "config.json is wrong, correct it."
    )


def _entries(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The entries that may change what is computed, by keys with dots."""
    plain = {k: v for k, v in config.items() if not k.startswith("rope_")}
    for key, value in (plain | _rope(config)).items():
        if _ELSEWHERE.fullmatch(key):
            continue
        if key.endswith(("_config", "rope")) and isinstance(value, Mapping):
            yield from _entries(value, f"{above}{key}.")
        else:
            yield above + key, value


def _rope(config):
    """Rotary embeddings, in one spelling for all versions of transformers."""
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
