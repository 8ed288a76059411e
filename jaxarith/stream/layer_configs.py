"""Makes the configuration of a model whose layers come from other models.

`config.json` counts the layers. It may also list the kind of each layer, for example in
`layer_types`. Such lists are put together from the lists of the layers' own models.
Some keys hold numbers of layers, or rules that derive a layer's kind from its number.
Known keys change with the layers, and a new order that breaks a rule is refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxarith.hub.config import parts
from jaxarith.stream import configs
from jaxarith.stream.stacks import MAIN

_TYPES, _MLP_TYPES = "layer_types", "mlp_layer_types"
# Keys that list numbers of layers.
_INDICES = {
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "full_attn_idxs",
    "attn_layer_indices",
    "global_attention_layers",
}
# Keys that state how many of the first layers differ from the others.
_FIRST = {"max_window_layers", "first_k_dense_replace", "num_dense_layers"}
# Keys that make the kind of a layer its number modulo the value.
_PERIODS = {
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "attn_layer_period",
    "expert_layer_period",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "moe_layer_freq",
}
# The second key states the same as the first, and models read it first.
_SAID_BY = {
    "sliding_window_pattern": _TYPES,
    "_sliding_window_pattern": _TYPES,
    "full_attention_interval": _TYPES,
    "global_attn_every_n_layers": _TYPES,
    "max_window_layers": _TYPES,
    "first_k_dense_replace": _MLP_TYPES,
    "num_dense_layers": _MLP_TYPES,
    "decoder_sparse_step": _MLP_TYPES,
    "moe_layer_freq": _MLP_TYPES,
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
# Classes that alternate kinds of attention if the configuration lists none.
_ALTERNATING = {
    "gemma2": 2,
    "gpt_oss": 2,
    "gemma3_text": 6,
    "cohere2": 4,
    "modernbert": 3,
    "qwen3_next": 4,
}
# Keys that make layers depend on others, or on their number, in a way no list shows.
_REFUSED = {
    "num_kv_shared_layers": "layers share keys and values",
    "hidden_size_per_layer_input": "embeddings have a part for each layer",
    "attention_types": "it lists layers by repetition",
    "scale_attn_by_inverse_layer_idx": "attention is divided by the layer's number",
    "num_nextn_predict_layers": "there are layers that predict further tokens",
    "layer_group_size": "layers come in groups",
    "num_hidden_groups": "layers share weights",
    "moe_layer_end_index": "it is the number of a layer",
    "loop_layer_index_end": "it is the number of a layer",
    "n_layers_per_attn_res_block": "layers come in groups",
    "num_layers_per_stack": "layers come in groups",
    "n_recurrent_layers": "layers are of three kinds in order",
}
_NOT_OF_LAYERS = re.compile(r"architectures|.*token.*|rope_.*|.*_sections?|.*_factors?")
_OF_INDICES = re.compile(r".*(layer|block|idx|indices|indexes).*")
# Keys that list numbers of layers, even if they have an entry for each layer.
_NUMBERS = re.compile(r".*(source|target).*layer.*|.*(_ids|idxs?|indices|indexes)")
_KNOWN_NUMBERS = {*MAIN, *_FIRST, *_PERIODS, *_REFUSED}
_KNOWN_NUMBERS |= {"attn_layer_offset", "expert_layer_offset"}  # beside a period


class Layer(NamedTuple):
    """A layer of a model that becomes a layer of the new model.

    Attributes:
      config: the content of its model's `config.json`.
      count: the number of layers of that model.
      index: the number of the layer in that model.
      label: the name of that model in errors.
    """

    config: Mapping[str, Any]
    count: int
    index: int
    label: str


def restacked(
    config: Mapping[str, Any], count: int, layers: Sequence[Layer]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the configuration of a model that is made of these layers, and notes.

    Args:
      config: the content of the `config.json` that is changed.
      count: the number of layers that it states.
      layers: the layers of the new model, in order.

    Raises:
      ValueError: `config` does not count the layers; or a key depends on the numbers
        of layers in an unknown way, or in a way that the new order breaks.

    Example:
      >>> old = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
      >>> restacked(old, 2, [Layer(old, 2, i, "A") for i in (0, 1, 1)])[0]
      {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding']}
    """
    name, part = _part(config, count, "config.json of the new model's files")
    owns = [_part(x.config, x.count, f"config.json of {x.label}")[1] for x in layers]
    for own, layer in zip(owns, layers, strict=True):
        _check(own, layer.label)
    new, notes = dict(part), []
    for key, value in part.items():
        if key in MAIN and value == count:
            new[key] = len(layers)
        elif _is_per_layer(key, value, count):
            new[key], more = _listed(key, value, layers, owns)
            notes += more
        elif key in _INDICES and isinstance(value, list):
            new[key] = [
                i
                for i, (own, layer) in enumerate(zip(owns, layers, strict=True))
                if layer.index in (own.get(key) or ())
            ]
        elif key in _FIRST and isinstance(value, int):
            new[key] = _first(key, part, layers, owns)
        elif isinstance(value, list) and _holds_indices(key, value, count):
            raise ValueError(
                f"{key} of config.json is {value}, which look like numbers of layers. "
                "It is not known how they change with the layers. Take whole models, "
                "or files (base_model) whose config.json has no such key."
            )
    unknown = [
        key
        for key, value in part.items()
        if type(value) is int and value > 1 and "layer" in key
        if key not in _KNOWN_NUMBERS
    ]
    if unknown:
        notes.append(
            f"config.json keeps {', '.join(unknown)}: it is not known whether they "
            "count or number the layers that changed"
        )
    _check_periods(part, layers, owns)
    for layer, own in zip(layers, owns, strict=True):
        _check_lacking(part, own, layer)
    if name is None:
        return new, notes
    top = {k: v for k, v in config.items() if k in MAIN and v == count}
    return {**config, **dict.fromkeys(top, len(layers)), name: new}, notes


def _part(
    config: Mapping[str, Any], count: int, label: str
) -> tuple[str | None, Mapping[str, Any]]:
    """Returns the part of a configuration that counts the layers, with its key."""
    inner = parts(config)
    text = {"text_config": inner["text_config"]} if "text_config" in inner else {}
    places: dict[str | None, Mapping[str, Any]] = {**text, None: config, **inner}
    for name, part in places.items():
        if any(part.get(key) == count for key in MAIN):
            return name, part
    raise ValueError(
        f"{label} does not state the {count} layers that its weights have: none of "
        f"{', '.join(MAIN)} does. Slices must change that number: add the right key."
    )


def _check(config, label):
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ValueError(
                f"{key} of config.json of {label} is {config[key]}: {why}, so its "
                "layers cannot be taken apart. Take whole models."
            )


def _is_per_layer(key, value, count):
    if key in _INDICES or _NOT_OF_LAYERS.fullmatch(key) or _NUMBERS.fullmatch(key):
        return False
    if value == [*range(count)] and count > 3:  # numbers of layers, and no switches
        return False
    if isinstance(value, str):
        return key == "hybrid_override_pattern"
    return isinstance(value, list) and len(value) == count


def _holds_indices(key, value, count):
    whole = all(type(x) is int for x in value)
    inside = whole and all(0 <= x < count for x in value)
    return bool(value) and bool(_OF_INDICES.fullmatch(key)) and inside


def _listed(key, value, layers, owns):
    """Returns a list with an entry for each new layer, and notes."""
    entries, notes = [], []
    for layer, own in zip(layers, owns, strict=True):
        found = own.get(key)
        if found is not None and len(found) == layer.count:
            entries.append(found[layer.index])
        elif all(x == value[0] for x in value):
            entries.append(value[0])
            notes.append(
                f"config.json of {layer.label} has no {key}; its layers count as "
                f"{value[0]!r}, like all others"
            )
        else:
            raise ValueError(
                f"config.json of {layer.label} has no list {key} of {layer.count} "
                f"layers, but the new model's needs one. Load and save {layer.label} "
                "with a current transformers, which writes it."
            )
    whole = "".join(entries) if isinstance(value, str) else entries
    return whole, list(dict.fromkeys(notes))


def _first(key, part, layers, owns):
    """Returns how many layers at the beginning are of the first kind."""
    value = part[key]
    kinds = [
        layer.index < own.get(key, value)
        for layer, own in zip(layers, owns, strict=True)
    ]
    if all(kinds):
        return max(value, len(layers))
    if kinds == sorted(kinds, reverse=True):
        return sum(kinds)
    if _is_said(key, part) or part.get("use_sliding_window", True) is False:
        return value
    raise ValueError(
        f"{key} of config.json is {value}: the first layers differ from the others, "
        "but in the new order they do not come first. Choose other ranges of layers."
    )


def _is_said(key, part):
    return bool(part.get(_SAID_BY.get(key, "")))


def _check_periods(part, layers, owns):
    for key in _PERIODS:
        for i, (layer, own) in enumerate(zip(layers, owns, strict=True)):
            period = own.get(key, part.get(key))
            if type(period) is not int or period < 1 or _is_said(key, part):
                continue
            if i % period != layer.index % period or period != part.get(key, period):
                raise ValueError(_broken(key, period, i, layer))
    kind = part.get("model_type")
    if kind in _ALTERNATING and not part.get(_TYPES):
        for i, layer in enumerate(layers):
            if i % _ALTERNATING[kind] != layer.index % _ALTERNATING[kind]:
                raise ValueError(
                    f"config.json has no {_TYPES}, and layers of {kind} alternate by "
                    f"their numbers: layer {layer.index} of {layer.label} cannot be "
                    f"layer {i}. Load and save the models with a current transformers, "
                    "which writes the list."
                )


def _broken(key, period, i, layer):
    return (
        f"{key} of config.json of {layer.label} is {period}: the kind of a layer "
        f"follows from its number, so layer {layer.index} cannot become layer {i}. "
        f"Choose ranges of layers that keep their numbers modulo {period}."
    )


def _check_lacking(part, own, layer):
    """Raises a ValueError if a list that tells layers apart would be lost."""
    for key, value in own.items():
        if key in part or not _is_per_layer(key, value, layer.count):
            continue
        if isinstance(value, str) or any(x != value[0] for x in value):
            raise ValueError(
                f"{key} of config.json of {layer.label} differs between its layers, "
                "but the config.json of the new model's files has no such list. Name "
                f"{layer.label} as base_model, or save that model with a current "
                "transformers."
            )


def compare(
    config: Mapping[str, Any],
    count: int,
    model: Mapping[str, Any],
    of_model: int,
    label: str,
) -> list[str]:
    """Returns the notes of `configs.compare`, without keys about single layers.

    Args:
      config, count: the content of the base's `config.json`, and its number of layers.
      model, of_model: the same two for a model.
      label: the name of the model in errors and notes.
    """
    ours, theirs = _without_layers(config, count), _without_layers(model, of_model)
    return configs.compare(ours, theirs, label)


def _without_layers(config, count):
    name, part = _part(config, count, "config.json")
    rest = {
        key: value
        for key, value in part.items()
        if not (key in MAIN and value == count or _is_per_layer(key, value, count))
    }
    return rest if name is None else {**config, name: rest}


def disagreements(layers: Sequence[Sequence[Layer]]) -> list[str]:
    """Returns notes on layers that are merged with layers of another kind.

    Args:
      layers: for each new layer, the layers that are merged into it. The new layer has
        the kind of the first.
    """
    notes = []
    for i, row in enumerate(layers):
        kinds = [_kinds(layer) for layer in row]
        for layer, kind in zip(row[1:], kinds[1:], strict=True):
            notes += [
                f"layer {i}: {key} is {ours!r} in {row[0].label} and {kind[key]!r} in "
                f"{layer.label}; the first is used"
                for key, ours in kinds[0].items()
                if key in kind and kind[key] != ours
            ]
    return notes


def _kinds(layer: Layer) -> dict[str, Any]:
    part = _part(layer.config, layer.count, f"config.json of {layer.label}")[1]
    return {
        key: value[layer.index]
        for key, value in part.items()
        if _is_per_layer(key, value, layer.count)
    }
