"""Reads YAML files of mergekit's form.

A file states `merge_method` and `models` or `slices`. It may also state `base_model`,
`parameters`, `dtype`, `out_dtype`, `tokenizer_source` or `tokenizer`, and
`chat_template`. If mergekit has the method, mergekit's version is used, unless the file
says `preset: paper`. Other methods are those of `jaxarith.merge`, with their options
under `parameters`. Two keys are not mergekit's: `after` lists wrappers of the merged
vector, and `name` is the name of the result for other documents of the file. Anything
unsupported is an error that names its line.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping

from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge import slices as sliced
from jaxarith.commands.merge import wrappers, yaml_lines, yaml_slices, yaml_tokenizer
from jaxarith.commands.merge.located import located
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.request import (
    DTYPES,
    PRESETS,
    Dtype,
    MergeRequest,
    Model,
    Slice,
)
from jaxarith.commands.merge.slices import SlicedRecipe
from jaxarith.commands.merge.yaml_lines import Node
from jaxarith.commands.merge.yaml_parameters import parameters

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
    "chat_template",
    "preset",
    "after",
    "name",
)

_REFUSED = {
    "modules": "parts of a model, such as language and images, are merged alike. Give "
    "a filter with a weight of 0 for those that stay as they are.",
    "out_path": "the new folder is named on the command line. If other documents merge "
    "this result, give the document a name, and refer to it by that name.",
    "align_weights": "weights are merged as they are, and not permuted. Leave it out.",
    "metric_method": "this file only measures models. `jaxarith inspect` shows norms "
    "and cosines.",
    "genome": "this file searches for a merge by evolution, which is not supported.",
}


def read(path: str | os.PathLike, *, seed: int = 0) -> MergeRecipe | SlicedRecipe:
    """Reads the recipe of a merge from a file of one document.

    Parameters may be gradients over the layers and have filters, as in `gradients`. A
    parameter in the entry of the model comes first, then one in the slice, then one at
    the top.

    Args:
      path: a YAML file.
      seed: seed of random methods.

    Raises:
      OSError: the file does not exist.
      ValueError: the file is not YAML, or something in it is unknown, missing or not
        supported; the message has the name of the file and the line.
    """
    return build(yaml_lines.read(path), seed=seed)


def build(
    root: Node, *, seed: int = 0, folder_of: Callable[[str], str] = str
) -> MergeRecipe | SlicedRecipe:
    """Returns the recipe of a document, as `read` does.

    Args:
      root: the document.
      seed: seed of random methods.
      folder_of: returns the folder to open for the name of a model, or the name itself.

    Raises:
      ValueError: as for `read`.
    """
    keys = fields(root)
    if "merge_method" not in keys:
        raise root.error("the file states no merge_method. Add one.")
    request, notes = _request(root, keys)
    request = located(request, folder_of)
    try:
        if request.slices:
            recipe = sliced.build(request, seed=seed)
        else:
            recipe = merge_recipe.build(request, seed=seed)
    except ValueError as error:
        if str(error).startswith(root.file):
            raise
        raise keys["merge_method"].error(str(error)) from error
    notes = (*recipe.notes, *notes, *_dtype_notes(request.dtype))
    return dataclasses.replace(recipe, notes=notes)


def fields(root: Node) -> dict[str, Node]:
    """Returns the entries of a document.

    Raises:
      ValueError: the document is not a mapping, or has a key that is not supported.
    """
    given = root.mapping("the file")
    for key, why in _REFUSED.items():
        if key in given:
            raise given[key].error(
                f"the key {key!r} of the file is not supported: {why}"
            )
    return root.fields(_KEYS, "the file")


def _request(root: Node, keys: Mapping[str, Node]) -> tuple[MergeRequest, list[str]]:
    """Returns the merge that the file asks for, and notes."""
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
    models: tuple[Model, ...] = ()
    slices: tuple[Slice, ...] = ()
    layers, place = None, ""
    if "models" in keys:
        entries = keys["models"].items("models")
        models, notes = yaml_slices.models(entries, name, method, base)
    else:
        slices, notes = yaml_slices.slices(keys["slices"], name, method, base)
        layers, place = yaml_slices.whole(slices, base), slices[0].place
        if layers is not None:
            one, slices = slices[0], ()
            models = tuple(source.model for source in one.sources)
            for key, setting in one.parameters.items():
                shared[key] = setting + shared.get(key, ())  # the slice's count first
    request = MergeRequest(
        method=name,
        models=models,
        base=base,
        parameters=shared,
        preset=preset,
        dtype=_dtype(keys, "dtype"),
        out_dtype=_dtype(keys, "out_dtype"),
        **yaml_tokenizer.tokenizer(keys),
        chat_template=yaml_tokenizer.chat_template(keys.get("chat_template")),
        layers=layers,
        after=_afters(keys.get("after")),
        slices=slices,
        place=place,
    )
    return request, notes


def _afters(node: Node | None) -> tuple[wrappers.After, ...]:
    return () if node is None else tuple(map(_after, node.items("after")))


def _after(node: Node) -> wrappers.After:
    """Reads an entry of `after`: a name, or a mapping from a name to options."""
    name, given = node.value, {}
    if isinstance(name, dict):
        if len(name) != 1:
            raise node.error(
                "an entry of after must be one wrapper, for example svc: {alpha: 1}."
            )
        [(name, options)] = name.items()
        fields = options.mapping("the options of a wrapper")
        given = {key: option.value for key, option in fields.items()}
    try:
        return wrappers.after(str(name), given)
    except ValueError as error:
        raise node.error(str(error)) from error


def _dtype(keys: Mapping[str, Node], key: str) -> Dtype | None:
    return keys[key].word(DTYPES, key) if key in keys else None


def _dtype_notes(dtype: Dtype | None) -> Iterator[str]:
    if dtype not in (None, "float32"):
        yield f"sums are taken in float32 and cast once (mergekit computes in {dtype})"
