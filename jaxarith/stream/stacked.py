"""Reads models as stacks of layers, from which slices are taken.

All names are those of one model, the template, even if another model has a prefix. A
star replaces the number of a layer.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from jax.typing import DTypeLike

from jaxarith import tree
from jaxarith.hub import Stored, lora
from jaxarith.stream import inputs, names, policies, tying
from jaxarith.stream.rerowed import Rerowing
from jaxarith.stream.stacks import LAYER, layers, stacks

# Tensors by name and number of the layer; None outside the layers.
Found: TypeAlias = dict[tuple[str, int | None], Stored]

_STAR = ".*."
# Tensors outside the layers that are used before them; all others are used after them.
_ENCODER = re.compile(r"vis(ion|ual)|audio|projector|connector")
_BEFORE = re.compile(r"embed|wte|wpe|project_in|pre_layr?norm|(^|\.)shared\.")
_AFTER = re.compile(r"embed_out|head")
# One layer holds these for all layers.
_SHARED = re.compile(r"relative_attention_bias")


class Layers(NamedTuple):
    """A range of layers of a model.

    Attributes:
      model: a folder, an id on the Hub, an adapter, or `model+adapter`.
      start, stop: the first layer, and the layer after the last.
      place: the start of error messages about them, for example the line of a file.
    """

    model: str
    start: int
    stop: int
    place: str = ""


class Stacked(NamedTuple):
    """A model as a stack of layers, not read yet.

    Attributes:
      tensors: the tensors of the model.
      deltas, replaced: the changes that an adapter or a task vector makes to them.
      config: the content of its `config.json`.
      count: its number of layers.
      tied: the names of embedding and head, if they are one matrix.
      untied: whether the model has a head of its own.
      was_packed: whether it is a whole checkpoint with packed weights; None for an
        adapter or a task vector alone.
    """

    tensors: Found
    deltas: Found
    replaced: Found
    config: Mapping[str, Any]
    count: int
    tied: tying.Pair | None
    untied: bool
    was_packed: bool | None

    def with_head(self) -> "Stacked":
        """Returns the model with a tied head as a tensor of its own."""
        if self.tied is None:
            return self
        embedding, head = (self.tied.embedding, None), (self.tied.head, None)
        tensors = {**self.tensors, head: self.tensors[embedding]}
        return self._replace(tensors=tensors)

    def without_head(self) -> "Stacked":
        """Returns the model without a tied head; the embedding stands for both."""
        if self.tied is None:
            return self
        tensors = {k: x for k, x in self.tensors.items() if k[0] != self.tied.head}
        return self._replace(tensors=tensors)


class Template(NamedTuple):
    """The model whose names, shapes and configuration the new model gets.

    Attributes:
      stack: the part of names before a layer's number.
      count: its number of layers.
      config: the content of its `config.json`.
      names: all names.
      outside: the tensors outside the layers.
      inside: the names and shapes of a layer's tensors, for each kind of layer.
    """

    stack: str
    count: int
    config: Mapping[str, Any]
    names: set[str]
    outside: dict[str, Stored]
    inside: list[dict[str, tuple[int, ...]]]

    @classmethod
    def of(cls, tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> "Template":
        """Returns the template for a model's tensors and configuration.

        Raises:
          ValueError: the model is not a single stack of layers.
        """
        stack, count = main_stack(tensors, config)
        found = {_starred(name, stack): x for name, x in tensors.items()}
        kinds: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
        for (name, index), tensor in found.items():
            if index is not None and index < count:
                kinds[index] |= _shape(name, tensor)
        inside = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
        outside = _outside(found)
        return cls(stack, count, config, {n for n, _ in found}, outside, inside)

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder of images or sounds beside the layers."""
        return any(map(_ENCODER.search, self.outside))

    def check(self, tensors: Mapping[str, Stored], of: Layers) -> None:
        """Raises a ValueError unless the configuration fits layers of a slice."""
        kinds: dict[int, dict[str, tuple[int, ...]]] = {}
        lines = []
        for name, tensor in tensors.items():
            starred, index = _starred(name, self.stack)
            if index is not None:
                kinds.setdefault(index, {}).update(_shape(starred, tensor))
            elif starred in self.outside:
                ours = self.outside[starred].shape
                cut = 1 if policies.is_of_tokens(name) else 0
                if ours[cut:] != tensor.shape[cut:]:
                    lines.append(f"! {name}: {list(tensor.shape)}, not {list(ours)}")
        for kind in kinds.values():
            if kind not in self.inside and not lines:
                known = {name: shape for x in self.inside for name, shape in x.items()}
                lines = [
                    f"{name} {list(shape)}"
                    for name, shape in kind.items()
                    if shape != known.get(name)
                ]
                lines += [f"no {name}" for name in known.keys() - kind.keys()]
        if lines:
            raise ValueError(
                f"{of.place}: {of.model} has other tensors than the configuration of "
                f"the new model states: {'; '.join(tree.first_few(lines, most=3))}. "
                "Take layers of models of one kind and size."
            )


def _shape(name, tensor):
    return {} if names.is_buffer(name, tensor) else {name: tensor.shape}


def main_stack(found: Iterable[str], config: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the name of a model's one stack of layers, and the number of layers.

    An encoder of images or sounds beside a language model is not part of the stack.

    Args:
      found: the names of all tensors.
      config: the content of `config.json`.

    Raises:
      ValueError: the model has no stack, or more than one.
    """
    found = list(found)
    counts = stacks(found, config)
    rest = {n: x for n, x in counts.items() if not _ENCODER.search(n)} or counts
    if len(rest) != 1 or config.get("is_encoder_decoder"):
        raise ValueError(
            "slices need a model that is one stack of layers; found "
            f"{', '.join(tree.first_few(list(rest), most=4)) or 'none'}."
        )
    [stack] = rest
    count = layers(found, config)
    shared = [n for n in found if n.startswith(f"{stack}.") and _SHARED.search(n)]
    if shared or count != rest[stack]:
        what = shared[0] if shared else f"{rest[stack]} layers of {stack}"
        raise ValueError(f"slices cannot take this model apart, because of {what}.")
    return stack, count


def read(
    label: str,
    place: inputs.Place,
    base: inputs.Place | None,
    template: Template,
    missing: policies.Missing,
    dequantize: DTypeLike | None = None,
) -> tuple[Stacked, list[str]]:
    """Opens a model as a stack with the names of the template, and returns notes.

    Args:
      label: the name of the model in notes and errors.
      place: the paths of the model.
      base: the paths of the model that an adapter or a task vector alone moves.
      template: the model whose names are used.
      missing: what to do if a task vector has tensors that its base lacks.
      dequantize: dtype in which packed weights are read; None refuses them.

    Raises:
      FileNotFoundError: the checkpoint or a part of it does not exist.
      ValueError: a file is corrupt, or the model is not a single stack of layers.
    """
    folder = place.folder if base is None or place.folder else base.folder
    if folder is None:
        raise ValueError(
            f"{label} is an adapter or a task vector, which needs a model. Give a "
            "base, or model+adapter."
        )
    checkpoint = inputs.open_checkpoint(folder, dequantize)
    tensors = checkpoint.tensors
    config = inputs.read_config(folder)
    stack, count = main_stack(tensors, config)
    under = {label: tensors}
    changes, parted, notes = inputs.changes_of(tensors, under, [place], config, missing)
    if parted is not None:
        raise ValueError(
            f"{label} moves {parted.embedding} and {parted.head} apart, which slices "
            "do not support. Merge the adapter into its model first."
        )
    change: lora.Adapter = changes[label]
    pair, stored = tying.pair(tensors, config), tying.stored_pair(tensors)
    every = [*tensors, *change.deltas, *change.replaced, *(pair or ())]
    starred = {name: _starred(name, stack) for name in every}
    ours, more = names.match(template.names, {n for n, _ in starred.values()}, label)

    def renamed(found: Mapping[str, Stored]) -> Found:
        return {(ours[starred[n][0]], starred[n][1]): x for n, x in found.items()}

    tied = None if pair is None else tying.Pair(*(ours[starred[x][0]] for x in pair))
    model = Stacked(
        tensors=renamed(tensors),
        deltas=renamed(change.deltas),
        replaced=renamed(change.replaced),
        config=config,
        count=count,
        tied=tied,
        untied=pair is None and stored is not None,
        was_packed=bool(checkpoint.notes) if place.folder else None,
    )
    return model, [*checkpoint.notes, *notes, *more]


def rerowed(stacks: Mapping[str, Stacked], rerowing: Rerowing) -> dict[str, Stacked]:
    """Returns the models with new rows for tokens."""
    found = {name: _outside(model.tensors) for name, model in stacks.items()}
    changes = {
        name: lora.Adapter(_outside(model.deltas), _outside(model.replaced))
        for name, model in stacks.items()
    }
    new, rest = rerowing.apply(found, changes)
    return {
        name: model._replace(
            tensors=_inside(model.tensors) | _back(new[name]),
            deltas=_inside(model.deltas) | _back(rest[name].deltas),
            replaced=_inside(model.replaced) | _back(rest[name].replaced),
        )
        for name, model in stacks.items()
    }


def _outside(found: Found) -> dict[str, Stored]:
    return {name: x for (name, index), x in found.items() if index is None}


def _inside(found: Found) -> Found:
    return {key: x for key, x in found.items() if key[1] is not None}


def _back(found: Mapping[str, Stored]) -> Found:
    return {(name, None): x for name, x in found.items()}


def taken(
    found: Found, of: Layers, at: int, *, first: bool, last: bool
) -> dict[str, Stored]:
    """Returns the tensors of a slice, by their names in the new model.

    Args:
      found: tensors of a whole model.
      of: the range of layers to take.
      at: the new number of the first of these layers.
      first, last: whether the slice is the first of all, and the last of all.
    """
    tensors = {}
    for (name, index), tensor in found.items():
        if index is None:
            if first if _is_before(name) else last:
                tensors[name] = tensor
        elif of.start <= index < of.stop:
            number = at + index - of.start
            tensors[name.replace(_STAR, f".{number}.", 1)] = tensor
    return tensors


def depths(found: Iterable[str], stack: str, at: int, count: int) -> dict[str, float]:
    """Returns the depth of each tensor in a slice: 0 in its first layer, 1 in its last.

    Outside the layers the depth is 0. The only layer of a slice has the depth 1, as in
    mergekit.

    Args:
      found: the names.
      stack: the part of names before a layer's number.
      at: the number of the first layer.
      count: the number of layers in the slice.
    """
    result = {}
    for name in found:
        _, index = _starred(name, stack)
        inside = 1.0 if count == 1 else ((index or 0) - at) / max(count - 1, 1)
        result[name] = 0.0 if index is None else inside
    return result


def rows(tensors: Mapping[str, Stored]) -> int | None:
    """Returns the number of rows of the embedding; None if it is unknown."""
    found = tying.rows(tensors)
    return None if math.isinf(found) else int(found)


def _is_before(name):
    before = _BEFORE.search(name) and not _AFTER.search(name)
    return bool(_ENCODER.search(name) or before)


def _starred(name: str, stack: str) -> tuple[str, int | None]:
    found = LAYER.search(name)
    if found is None or name[: found.start()] != stack:
        return name, None
    return f"{stack}{_STAR}{name[found.end() :]}", int(found[1])
