"""Models whose layers come from slices of others.

A slice takes a range of layers from each of some models, which are merged as whole
models are; the layers of the next slice come after them. What stands before all layers,
the embeddings, comes from the first slice, and what stands after them, the last norm
and the head, from the last one. So a new tensor has a name and, for each model of its
slice, the name that it has there. Nothing is read before the merge wants it, and a
layer that is taken twice is written twice.
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
    """Layers of some models that are merged.

    Attributes:
      base: those from which task vectors are measured, if there are any.
      models: those of the models.
    """

    base: Layers | None
    models: tuple[Layers, ...]

    @property
    def first(self) -> Layers:
        """Those whose shapes, dtypes, buffers and configuration are used."""
        return self.models[0] if self.base is None else self.base

    @property
    def every(self) -> tuple[Layers, ...]:
        """All of them, the base first."""
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
      slices: the slices, of which all have a base or none has.
      models: all models of slices but `base`, each once.
      base: the model whose files and configuration the new one has, and which adapters
        and task vectors alone move; None is the first of `models`.
      vocabulary: what to do where numbers of tokens differ in a slice, as for
        `policies.rows`.
      missing: what to do where models of a slice lack tensors of its first one, as for
        `policies.fit`.
      rerowing: where rows of embeddings and heads come from, by the names of models;
        None leaves them where they are.
      dequantize: dtype in which packed (quantised) weights are read, such as
        `"bfloat16"`; None refuses them.

    Raises:
      FileNotFoundError: a checkpoint or a part of one does not exist.
      ValueError: a file is corrupt, a range goes beyond the layers of its model, or the
        layers do not make one model.
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
            f"the base model {base} is no whole model; merge the adapter first."
        )
    if (folder := places[named[0]].folder) is None:
        raise ValueError(
            f"{named[0]} is an adapter or a task vector, whose configuration is that "
            "of a model: give a base model first."
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
        notes.append("the head is not the embedding of the first slice: it is written")
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
    """All models as stacks, which are compared with the first one, and notes."""
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
    """The configuration of a model, which must have one.

    Raises:
      ValueError: it has none.
    """
    if not (config := inputs.read_config(folder)):
        raise ValueError(
            f"{label} has no config.json, by which slices know what its layers are. "
            "Copy that of the model from which it was trained."
        )
    return config


def _rounding(stacks: Mapping[str, Stacked], base: str | None) -> list[str]:
    """Notes on models that were packed apart from their base."""
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
    """The slice whose first layer gets the number `at`."""
    for of in one.every:
        if of.stop > stacks[of.model].count:
            raise ValueError(
                f"{of.place}: layer_range is [{of.start}, {of.stop}], and {of.model} "
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
    """Errors begin with the line that names the model."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if not place or str(error).startswith(place):
            raise
        raise type(error)(f"{place}: {error}") from error


def _union(found):
    return {name: x for each in found for name, x in each.items()}


def _columns(parts):
    """By position, what the lists of all slices have there; they differ in length."""
    return [_union(column) for column in itertools.zip_longest(*parts, fillvalue={})]


def _with_heads(stacks: Mapping[str, Stacked]) -> dict[str, Stacked]:
    """Heads of all models, or of none where all are tied to their embeddings."""
    if any(model.untied for model in stacks.values()):
        return {name: model.with_head() for name, model in stacks.items()}
    return {name: model.without_head() for name, model in stacks.items()}


def _config(
    slices: Sequence[Slice], stacks: Mapping[str, Stacked], template: Template
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the new model, and notes."""
    layers = [
        [_layer(of, stacks[of.model], i) for of in one.every]
        for one in slices
        for i in range(one.first.stop - one.first.start)
    ]
    if not layers:
        raise ValueError("the slices have no layers; give ranges that are not empty.")
    config, notes = layer_configs.restacked(
        template.config, template.count, [row[0] for row in layers]
    )
    count = tree.counted(len(layers), "layer")
    notes.append(f"config.json counts and lists the {count} of the slices")
    first, last = slices[0].first.model, slices[-1].first.model
    if template.has_encoder:
        notes.append(
            f"layers of {template.stack} are sliced; the encoder beside them is that "
            f"of {first}"
        )
    if stacks[first].tied and first != last and not stacks[last].untied:
        notes.append(f"the head is tied to the embedding, which is that of {first}")
    return config, [*notes, *layer_configs.disagreements(layers)]


def _layer(of: Layers, model: Stacked, i: int) -> Layer:
    return Layer(model.config, model.count, of.start + i, of.model)


def _resized(of_base: Mapping[str, Stored], template: Template) -> dict[int, int]:
    """The rows of the template's embedding with those of the new one, if they differ.

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
            f"the embedding of the first slice has {new} rows, and {lines[0]}: the "
            "vocabularies differ. Take first and last layers of models of one "
            "vocabulary, or give a tokenizer_source."
        )
    return {} if old == new else {old: new}
