"""Opens models whose layers come from slices of other models.

A slice takes a range of layers from each of some models. These layers are merged as
whole models are, and the layers of the next slice come after them. The embeddings come
from the first slice; the last norm and the head come from the last slice. So a new
tensor has a new name, and another name in each model of its slice. Nothing is read
before the merge needs it, and a layer that is taken twice is written twice.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from jaxarith import lazy, tree
from jaxarith.hub import Stored, lora
from jaxarith.stream import inputs, layer_configs, opened, policies, tying
from jaxarith.stream.layer_configs import Layer
from jaxarith.stream.opened import Opened
from jaxarith.stream.rerowed import Rerowing
from jaxarith.stream.stacked import (
    Layers,
    Stacked,
    Template,
    depths,
    read,
    rerowed,
    rows,
    taken,
)


class Slice(NamedTuple):
    """Layers of several models that are merged into new layers.

    Attributes:
      base: the layers from which task vectors are measured; None if there are none.
      models: the layers of the models.

    Example:
      >>> a, b = Layers("a", 0, 4, ""), Layers("b", 0, 4, "")
      >>> Slice(None, (a, b)).first.model
      'a'
    """

    base: Layers | None
    models: tuple[Layers, ...]

    @property
    def first(self) -> Layers:
        """The layers whose shapes, dtypes, buffers and configuration are used."""
        return self.models[0] if self.base is None else self.base

    @property
    def every(self) -> tuple[Layers, ...]:
        """The layers of all models, the base first."""
        return self.models if self.base is None else (self.base, *self.models)


def open_slices(
    slices: Sequence[Slice],
    models: Sequence[str],
    *,
    base: str | None = None,
    vocabulary: policies.Vocabulary = "error",
    missing: policies.Missing = "error",
    rerowing: Rerowing | None = None,
    dequantize: DTypeLike | None = None,
) -> Opened:
    """Opens the models of slices as a base and its task vectors, without reading them.

    Args:
      slices: the slices. Either all have a base, or none has.
      models: all models of slices except `base`, each once.
      base: the model whose files and configuration the new model gets. An adapter or a
        task vector alone moves this model. None means the first of `models`.
      vocabulary: what to do if numbers of tokens differ in a slice, as for
        `policies.rows`.
      missing: what to do if models of a slice lack tensors of its first model, as for
        `policies.fit`.
      rerowing: the sources of rows of embeddings and heads, by the names of models;
        None leaves all rows in place.
      dequantize: dtype in which packed (quantised) weights are read, for example
        `"bfloat16"`; None refuses them.

    Raises:
      FileNotFoundError: a checkpoint or a part of one does not exist.
      ValueError: a file is corrupt, a range goes beyond the layers of its model, or the
        layers do not fit together in one model.

    Example:
      >>> lower, upper = Layers("a", 0, 8, ""), Layers("b", 8, 16, "")
      >>> slices = [Slice(None, (lower,)), Slice(None, (upper,))]
      >>> opened = open_slices(slices, ["a", "b"])  # doctest: +SKIP
    """
    policies.check(vocabulary, missing, slices[0].base is not None)
    named = [*([] if base is None else [base]), *models]
    lines = {of.model: of.place for one in reversed(slices) for of in one.every}
    places = {}
    for model in named:
        with _named(lines.get(model)):
            places[model] = inputs.find(model)
    if base is not None and places[base].adapter is not None:
        raise ValueError(
            f"the base model {base} is not a whole model. Merge the adapter first."
        )
    if (folder := places[named[0]].folder) is None:
        raise ValueError(
            f"{named[0]} is an adapter or a task vector and has no configuration of a "
            "model. Give a base model first."
        )
    checkpoint = inputs.open_checkpoint(folder, dequantize)
    template = Template.of(checkpoint.tensors, _configured(folder, named[0]))
    stacks, notes = _read(places, lines, base, template, missing, dequantize)
    if slices[0].base is not None:
        notes += _rounding(stacks, base)
    if rerowing is not None:
        stacks = rerowed(stacks, rerowing)
    progress = opened.Progress()
    source = opened.sources(progress)
    parts, at = [], 0
    for number, one in enumerate(slices):
        edges = {"first": number == 0, "last": number == len(slices) - 1}
        part = _part(one, at, edges, template, stacks, source, vocabulary, missing)
        parts.append(part)
        at += one.first.stop - one.first.start
    of_base = _union(part.base for part in parts)
    config, more = _config(slices, stacks, template)
    notes += [note for part in parts for note in part.notes] + more
    fitted = enumerate(_columns([part.fitted for part in parts]))
    apart = tying.differ(config, {"": of_base, **{str(i): x for i, x in fitted}})
    if apart:
        notes.append("the head differs from the first slice's embedding: it is written")
    return Opened(
        base=of_base,
        taus=_columns([part.taus for part in parts]),
        has_base=slices[0].base is not None,
        folders=[
            folder,
            *(x for m, place in places.items() if m != base for x in place if x),
        ],
        notes=tuple(dict.fromkeys(notes)),
        narrowed=tuple(name for part in parts for name in part.narrowed),
        resized=_resized(of_base, template),
        untied=bool(apart),
        metadata=checkpoint.metadata,
        progress=progress,
        _source=source,
        config=config,
        slices=tuple(part.depths for part in parts),
    )


def _read(
    places: Mapping[str, inputs.Place],
    lines: Mapping[str, str],
    base: str | None,
    template: Template,
    missing: policies.Missing,
    dequantize: DTypeLike | None,
) -> tuple[dict[str, Stacked], list[str]]:
    """Reads all models as stacks, compares them with the first, and returns notes."""
    stacks, notes = {}, []
    under = None if base is None else places[base]
    for model, place in places.items():
        with _named(lines.get(model)):
            if place.folder is not None:
                _configured(place.folder, model)
            stack, more = read(model, place, under, template, missing, dequantize)
            notes += more
            if stacks:
                notes += layer_configs.compare(
                    template.config, template.count, stack.config, stack.count, model
                )
        stacks[model] = stack
    return _with_heads(stacks), notes


def _configured(folder: Path, label: str) -> dict[str, Any]:
    """Returns the configuration of a model.

    Raises:
      ValueError: the model has no configuration.
    """
    if not (config := inputs.read_config(folder)):
        raise ValueError(
            f"{label} has no config.json. Slices need one to know the kinds of its "
            "layers. Copy it from the model from which this one was trained."
        )
    return config


def _rounding(stacks: Mapping[str, Stacked], base: str | None) -> list[str]:
    """Returns notes on models that were packed separately from their base."""
    if base is None:
        return []
    packed = {
        model: stack.was_packed
        for model, stack in stacks.items()
        if model != base and stack.was_packed is not None
    }
    return inputs.rounding_notes(bool(stacks[base].was_packed), packed)


class _Part(NamedTuple):
    """An opened slice; see `Opened`."""

    base: dict[str, Stored]
    fitted: list[dict[str, Stored]]
    taus: list[dict[str, lazy.Leaf]]
    depths: dict[str, float]
    narrowed: list[str]
    notes: list[str]


def _part(
    one: Slice,
    at: int,
    edges: Mapping[str, bool],
    template: Template,
    stacks: Mapping[str, Stacked],
    source: Callable[[Stored, str], lazy.Source],
    vocabulary: policies.Vocabulary,
    missing: policies.Missing,
) -> _Part:
    """Opens a slice; its first layer gets the number `at`."""
    for of in one.every:
        if of.stop > stacks[of.model].count:
            raise ValueError(
                f"{of.place}: layer_range is [{of.start}, {of.stop}], but {of.model} "
                f"has {stacks[of.model].count} layers."
            )

    def of_slice(of: Layers, found):
        return taken(found, of, at, **edges)

    layout = of_slice(one.first, stacks[one.first.model].tensors)
    template.check(layout, one.first)
    fitted, changes, notes = {}, {}, []
    for i, of in enumerate(one.models):
        label = f"model {i} ({of.model}, layers [{of.start}, {of.stop}])"
        model = stacks[of.model]
        with _named(of.place):
            found = of_slice(of, model.tensors)
            fitted[label], more = policies.fit(layout, found, label, missing)
        deltas, replaced = of_slice(of, model.deltas), of_slice(of, model.replaced)
        changes[label] = lora.Adapter(deltas, replaced)
        notes += more
    with _named(one.first.place):
        kept, skipped, more = policies.rows(layout, fitted, vocabulary)
    of_base = {n: x.rows(kept[n]) if n in kept else x for n, x in layout.items()}
    taus = opened.task_vectors(of_base, fitted, changes, source, one.base is not None)
    moved = [change.deltas for change in changes.values()]
    double, of_double = opened.narrowed([layout, *fitted.values(), *moved])
    return _Part(
        base=of_base,
        fitted=[x | changes[label].replaced for label, x in fitted.items()],
        taus=[{n: x for n, x in tau.items() if n not in skipped} for tau in taus],
        depths=depths(of_base, template.stack, at, one.first.stop - one.first.start),
        narrowed=double,
        notes=[*notes, *more, *of_double],
    )


@contextlib.contextmanager
def _named(place: str | None) -> Iterator[None]:
    """Puts the line that names the model in front of errors."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if not place or str(error).startswith(place):
            raise
        raise type(error)(f"{place}: {error}") from error


def _union(found):
    return {name: x for each in found for name, x in each.items()}


def _columns(parts):
    """Yields the entries of all slices' lists by position; the lengths may differ."""
    return [_union(column) for column in itertools.zip_longest(*parts, fillvalue={})]


def _with_heads(stacks: Mapping[str, Stacked]) -> dict[str, Stacked]:
    """Gives all models a head of their own, or none if all heads are tied."""
    if any(model.untied for model in stacks.values()):
        return {name: model.with_head() for name, model in stacks.items()}
    return {name: model.without_head() for name, model in stacks.items()}


def _config(
    slices: Sequence[Slice], stacks: Mapping[str, Stacked], template: Template
) -> tuple[dict[str, Any], list[str]]:
    """Returns the configuration of the new model, and notes."""
    layers = [
        [_layer(of, stacks[of.model], i) for of in one.every]
        for one in slices
        for i in range(one.first.stop - one.first.start)
    ]
    if not layers:
        raise ValueError("the slices have no layers. Give ranges that are not empty.")
    config, notes = layer_configs.restacked(
        template.config, template.count, [row[0] for row in layers]
    )
    count = tree.counted(len(layers), "layer")
    notes.append(f"config.json counts and lists the {count} of the slices")
    first, last = slices[0].first.model, slices[-1].first.model
    if template.has_encoder:
        notes.append(
            f"layers of {template.stack} are sliced; the encoder beside them comes "
            f"from {first}"
        )
    if stacks[first].tied and first != last and not stacks[last].untied:
        notes.append(f"the head is tied to the embedding, which comes from {first}")
    return config, [*notes, *layer_configs.disagreements(layers)]


def _layer(of: Layers, model: Stacked, i: int) -> Layer:
    return Layer(model.config, model.count, of.start + i, of.model)


def _resized(of_base: Mapping[str, Stored], template: Template) -> dict[int, int]:
    """Returns `{template's rows: new rows}` of the embedding, if they differ.

    Raises:
      ValueError: the embedding and the head differ in rows.
    """
    old, new = rows(template.outside), rows(of_base)
    if old is None or new is None:
        return {}
    lines = [
        f"{name} has {of_base[name].shape[0]} rows"
        for name, tensor in template.outside.items()
        if policies.is_of_tokens(name)
        and tensor.shape[:1] == (old,)
        and name in of_base
        and of_base[name].shape[0] != new
    ]
    if lines:
        raise ValueError(
            f"the embedding of the first slice has {new} rows, but {lines[0]}: the "
            "vocabularies differ. Take the first and the last layers from models with "
            "one vocabulary, or give a tokenizer_source."
        )
    return {} if old == new else {old: new}
