"""Reads the `models` and the `slices` of mergekit's files."""

from collections.abc import Collection, Sequence

from jaxarith import tree
from jaxarith.commands.merge.methods import Method
from jaxarith.commands.merge.request import Model, Slice, Source
from jaxarith.commands.merge.yaml_lines import Node
from jaxarith.commands.merge.yaml_parameters import parameters


def models(
    entries: Sequence[Node], name: str, method: Method, base: str | None
) -> tuple[tuple[Model, ...], list[str]]:
    """Returns the models of a merge of whole models, and notes.

    Args:
      entries: the entries of the file's `models`.
      name, method: the merge method.
      base: the file's base model.

    Raises:
      ValueError: an entry names no model, or a model is named twice.
    """
    found: list[Model] = []
    notes: list[str] = []
    seen: dict[str, int] = {}
    for entry in entries:
        model, more = _model(entry, ("model", "parameters"), name, method, base)
        if model.name in seen:
            raise entry.error(
                f"{model.name} is listed twice, first in line {seen[model.name]}."
            )
        seen[model.name] = entry.line
        found.append(model)
        notes += more
    return tuple(found), notes


def slices(
    node: Node, name: str, method: Method, base: str | None
) -> tuple[tuple[Slice, ...], list[str]]:
    """Returns the slices of a file, and notes.

    Args:
      node: the file's `slices`.
      name, method: the merge method.
      base: the file's base model.

    Raises:
      ValueError: a slice has no sources, or its ranges are invalid or differ in length.
    """
    found, notes = [], []
    for entry in node.items("slices"):
        fields = entry.fields(("sources", "parameters", "base_model"), "a slice")
        if "sources" not in fields:
            raise entry.error("the slice names no sources.")
        own = fields.get("base_model")
        own_base = None if own is None else own.text("base_model")
        sources = []
        for item in fields["sources"].items("sources"):
            source, more = _source(item, name, method, own_base or base)
            sources.append(source)
            notes += more
            if _length(source) != _length(sources[0]):
                raise item.error(
                    f"layer_range is [{source.start}, {source.stop}], of "
                    f"{tree.counted(_length(source), 'layer')}, but that of "
                    f"{sources[0].model.name} has {_length(sources[0])}. All sources "
                    "of a slice need the same length."
                )
        if method.models not in (None, len(sources)):
            raise fields["sources"].error(
                f"{name} takes {method.models} source in a slice; found {len(sources)}."
            )
        of_slice = parameters(fields.get("parameters"), name, method, None)
        found.append(Slice(tuple(sources), of_slice, own_base, entry.place))
    if not any(_length(one.sources[0]) for one in found):
        raise node.error("the slices have no layers. Give ranges that are not empty.")
    return tuple(found), notes


def whole(found: Sequence[Slice], base: str | None) -> int | None:
    """Returns the number of layers if the slices may be whole models; else None.

    They may be if there is only one slice, with the first layers of different models.
    """
    [first, *more] = found
    names = [source.model.name for source in first.sources]
    apart = first.base not in (None, base) or len(set(names)) < len(names)
    if more or apart or any(source.start for source in first.sources):
        return None
    return first.sources[0].stop


def _length(source):
    return source.stop - source.start


def _source(
    entry: Node, name: str, method: Method, base: str | None
) -> tuple[Source, list[str]]:
    known = ("model", "parameters", "layer_range")
    model, notes = _model(entry, known, name, method, base)
    if (found := entry.mapping("a source").get("layer_range")) is None:
        raise entry.error("a source needs a layer_range.")
    values = [item.value for item in found.items("layer_range")]
    if len(values) != 2 or not all(type(value) is int for value in values):
        raise found.error(
            f"layer_range is {values}; it must be [first layer, layer after the last]."
        )
    start, stop = values
    if not 0 <= start <= stop:
        raise found.error(
            f"layer_range is {values}; it must be [first layer, layer after the last], "
            "with 0 <= first layer <= layer after the last."
        )
    return Source(model, start, stop, found.place), notes


def _model(
    entry: Node, known: Collection[str], name: str, method: Method, base: str | None
) -> tuple[Model, list[str]]:
    fields = entry.fields(known, "the entry of a model")
    if "model" not in fields:
        raise entry.error("this entry names no model.")
    model = fields["model"].text("model")
    own = parameters(fields.get("parameters"), name, method, model)
    notes = []
    if own and model == base and method.base in ("needed", "optional"):
        line = fields["parameters"].line
        notes.append(
            f"the parameters of the base model, in line {line}, have no effect: its "
            "task vector is zero"
        )
    return Model(model, own), notes
