"""Reads the YAML files in which mergekit's users write their merges.

A file says `merge_method`, `models` (or `slices` that are whole models), and perhaps
`base_model`, `parameters`, `dtype`, `out_dtype` and `tokenizer_source`. Methods that
mergekit has are mergekit's, unless the file says `preset: paper`; all others are those
of `jaxarith.merge`, whose options are `parameters` too. `after` lists wrappers of the
merged vector, which mergekit has not. What is not supported is an error that names its
line.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxarith.commands.merge import methods, wrappers, yaml_lines
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.gradients import Entry, Setting, Value
from jaxarith.commands.merge.methods import Method, Option
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.request import (
    DTYPES,
    PRESETS,
    Dtype,
    MergeRequest,
    Model,
)
from jaxarith.commands.merge.yaml_lines import Node

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "preset",
    "after",
)


def read(path: str | os.PathLike, *, seed: int = 0) -> MergeRecipe:
    """Reads the recipe of a merge from a file.

    Parameters may be gradients over the layers and have filters, as in `gradients`. A
    parameter is looked for in the entry of the model, then in the slice, then at the
    top.

    Args:
      path: a YAML file.
      seed: seed of random methods.

    Raises:
      OSError: there is no such file.
      ValueError: it is no YAML, or something in it is not known, is missing, or is not
        supported; the message has the name of the file and the line.
    """
    root = yaml_lines.read(path)
    keys = root.fields(_KEYS, "the file")
    if "merge_method" not in keys:
        raise root.error("the file names no merge_method.")
    request, notes = _request(root, keys)
    try:
        recipe = merge_recipe.build(request, seed=seed)
    except ValueError as error:
        raise keys["merge_method"].error(str(error)) from error
    notes = (*recipe.notes, *notes, *_dtype_notes(request.dtype))
    return dataclasses.replace(recipe, notes=notes)


def _request(root: Node, keys: Mapping[str, Node]) -> tuple[MergeRequest, list[str]]:
    """What the file asks for, and what to tell about it."""
    name = keys["merge_method"].text("merge_method")
    preset = keys["preset"].word(PRESETS, "preset") if "preset" in keys else "mergekit"
    try:
        method = merge_recipe.find(name, preset)
    except ValueError as error:
        raise keys["merge_method"].error(str(error)) from error
    if ("models" in keys) == ("slices" in keys):
        raise root.error("the file must have either models or slices.")
    base = keys["base_model"].text("base_model") if "base_model" in keys else None
    shared = parameters(keys.get("parameters"), name, method, None)
    layers = None
    if "models" in keys:
        entries, known = keys["models"].items("models"), ("model", "parameters")
    else:
        of_slice, entries = _slice(keys["slices"], base)
        for key, setting in parameters(of_slice, name, method, None).items():
            shared[key] = setting + shared.get(key, ())  # the slice's count first
        layers = _layers(entries)
        known = ("model", "parameters", "layer_range")
    models, notes = _models(entries, known, name, method, base)
    source = _tokenizer(keys)
    if source is not None:
        notes.append(
            "the files of the tokenizer are copied; rows of embeddings stay where they "
            "are, so tokens must have the same ids in all models"
        )
    request = MergeRequest(
        method=name,
        models=models,
        base=base,
        parameters=shared,
        preset=preset,
        dtype=_dtype(keys, "dtype"),
        out_dtype=_dtype(keys, "out_dtype"),
        tokenizer_source=base if source == "base" else source,
        layers=layers,
        after=_afters(keys.get("after")),
    )
    return request, notes


def _afters(node: Node | None) -> tuple[wrappers.After, ...]:
    return () if node is None else tuple(map(_after, node.items("after")))


def _after(node: Node) -> wrappers.After:
    """An entry of `after`: a name, or a mapping from a name to options."""
    name, given = node.value, {}
    if isinstance(name, dict):
        if len(name) != 1:
            raise node.error("an entry of after is one wrapper, as svc: {alpha: 1}.")
        [(name, options)] = name.items()
        fields = options.mapping("the options of a wrapper")
        given = {key: option.value for key, option in fields.items()}
    try:
        return wrappers.after(str(name), given)
    except ValueError as error:
        raise node.error(str(error)) from error


def _dtype(keys: Mapping[str, Node], key: str) -> Dtype | None:
    return keys[key].word(DTYPES, key) if key in keys else None


def _models(
    entries: Sequence[Node],
    known: Collection[str],
    name: str,
    method: Method,
    base: str | None,
) -> tuple[tuple[Model, ...], list[str]]:
    models: list[Model] = []
    notes: list[str] = []
    seen: dict[str, int] = {}
    for entry in entries:
        fields = entry.fields(known, "the entry of a model")
        if "model" not in fields:
            raise entry.error("this entry names no model.")
        model = fields["model"].text("model")
        if model in seen:
            raise entry.error(f"{model} is listed twice, first in line {seen[model]}.")
        seen[model] = entry.line
        own = parameters(fields.get("parameters"), name, method, model)
        if own and model == base and method.base in ("needed", "optional"):
            line = fields["parameters"].line
            notes.append(
                f"the parameters of the base model, in line {line}, have no effect: "
                "its task vector is zero"
            )
        models.append(Model(model, own))
    return tuple(models), notes


def _slice(node: Node, base: str | None) -> tuple[Node | None, list[Node]]:
    """The parameters of the only slice, and its sources."""
    slices = node.items("slices")
    if len(slices) > 1:
        raise slices[1].error(
            "there is a second slice; slices that are not whole models are not "
            "supported."
        )
    fields = slices[0].fields(("sources", "parameters", "base_model"), "a slice")
    if "sources" not in fields:
        raise slices[0].error("the slice names no sources.")
    own_base = fields.get("base_model")
    if own_base is not None and own_base.text("base_model") != base:
        raise own_base.error("a slice has no base model other than that of the file.")
    return fields.get("parameters"), fields["sources"].items("sources")


def _layers(entries: Sequence[Node]) -> int:
    """The number of layers that the sources of a slice say the models have."""
    lengths: set[int] = set()
    for entry in entries:
        found = entry.mapping("a source").get("layer_range")
        if found is None:
            raise entry.error("a source needs a layer_range.")
        values = [item.value for item in found.items("layer_range")]
        if len(values) != 2 or not all(type(value) is int for value in values):
            raise found.error("layer_range must be [0, number of layers].")
        lengths.add(values[1])
        if values[0] != 0 or values[1] < 1 or len(lengths) > 1:
            raise found.error(
                f"layer_range is {values}; slices that are not whole models are not "
                "supported."
            )
    return lengths.pop()


def _tokenizer(keys: Mapping[str, Node]) -> str | None:
    if "tokenizer_source" in keys and "tokenizer" in keys:
        raise keys["tokenizer"].error("there is a tokenizer_source as well.")
    node = keys.get("tokenizer_source")
    if "tokenizer" in keys:
        fields = keys["tokenizer"].fields(("source",), "tokenizer")
        node = fields.get("source")
        if node is None:
            raise keys["tokenizer"].error("the tokenizer has no source.")
    if node is None:
        return None
    source = node.text("the source of the tokenizer")
    if source == "union":
        raise node.error(
            "a union of vocabularies is not supported; the source of the tokenizer is "
            '"base" or the path of a model.'
        )
    if source == "base" and "base_model" not in keys:
        raise node.error('the source of the tokenizer is "base"; there is none.')
    return source


def _dtype_notes(dtype: Dtype | None) -> Iterator[str]:
    if dtype not in (None, "float32"):
        yield f"sums are taken in float32 and cast once (mergekit computes in {dtype})"


def parameters(
    node: Node | None, name: str, method: Method, model: str | None
) -> dict[str, Setting]:
    """The settings under a `parameters`; none without it.

    Args:
      node: the mapping.
      name, method: the merge method.
      model: the model that has the mapping in its entry; None at the top and in a
        slice.

    Raises:
      ValueError: a parameter is not known, is one for all models, or has a wrong value.
    """
    if node is None:
        return {}
    fields = node.fields(method.options, f"parameters of {name}")
    for key, found in fields.items():
        if model is not None and not method.options[key].each:
            raise found.error(
                f"{key} of {name} is one for all models; it belongs under the "
                "parameters at the top."
            )
    return {
        key: _setting(found, key, method.options[key]) for key, found in fields.items()
    }


def _setting(node: Node, key: str, option: Option) -> Setting:
    if isinstance(node.value, dict):
        return (_entry(node, key, option),)
    if isinstance(node.value, list):
        items = node.items(key)
        if any(isinstance(item.value, dict) for item in items):
            return tuple(_entry(item, key, option) for item in items)
    return (Entry(_value(node, key, option)),)


def _entry(node: Node, key: str, option: Option) -> Entry:
    fields = node.fields(("filter", "value"), key)
    if "value" not in fields:
        raise node.error(f"this entry of {key} has no value.")
    value = _value(fields["value"], key, option)
    part = fields.get("filter")
    if part is None or part.value is None:
        return Entry(value)
    if not option.by_path:
        raise part.error(f"{key} is one for all tensors; it has no filter.")
    return Entry(value, part.text("filter"))


def _value(node: Node, key: str, option: Option) -> Value | tuple[Value, ...]:
    """One value, or the values of a gradient."""
    if not isinstance(node.value, list):
        return _scalar(node, key, option)
    if not option.by_path:
        raise node.error(f"{key} is one for all tensors; found a list.")
    return tuple(_scalar(item, key, option) for item in node.items(key))


def _scalar(node: Node, key: str, option: Option) -> Value:
    if node.value is None or isinstance(node.value, dict | list):
        raise node.error(f"{key} must be one value; found {node.shown()}.")
    try:
        return methods.converted(node.value, option)
    except ValueError as error:
        raise node.error(f"{key} {error}") from error
