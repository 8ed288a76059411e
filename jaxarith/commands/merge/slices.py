"""Recipes of merges whose layers come from slices of models."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxarith import stream, tree
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.methods import Method
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.request import Dtype, MergeRequest, Slice, Source
from jaxarith.stream import Layers, Opened, inputs
from jaxarith.typing import Params, Taus


@dataclasses.dataclass(frozen=True)
class SlicedRecipe:
    """A merge of slices that can be run; each slice is a separate merge.

    Attributes:
      request: the merge that was asked for.
      parts: the merge of each slice.
      slices: the layers of each slice's base and models.
      base: the model whose files the new model gets, if it is named as the base.
      models: all other models.
      notes: notes for the user.
      config: the content of the base's `config.json`; `stream` makes the new one.
      depths: the depths of each slice's tensors, once models are opened.
    """

    request: MergeRequest
    parts: tuple[MergeRecipe, ...]
    slices: tuple[stream.Slice, ...]
    base: str | None
    models: tuple[str, ...]
    notes: tuple[str, ...]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    depths: tuple[Mapping[str, float], ...] = ()

    @property
    def dtype(self) -> Dtype | None:
        """The dtype of the new weights; None is that of the base."""
        return self.request.out_dtype or self.request.dtype

    @property
    def function(self) -> Method:
        """The method."""
        return self.parts[0].function

    def of(self, opened: Opened, config: Mapping[str, Any]) -> "SlicedRecipe":
        """Returns the recipe for opened models."""
        return dataclasses.replace(self, config=config, depths=opened.slices)

    def merge(self, params_0: Params, taus: Taus) -> Params:
        """Merges the leaves of all slices, one slice after the other.

        Args:
          params_0: the leaves of the bases, or zero, by their new names.
          taus: task vectors, or models; a slice may have fewer than another.
        """
        merged = {}
        for part, depths in self._filled():
            of_slice = _of_slice(params_0, taus, part, depths)
            merged |= part.function.merge(*of_slice, **part.options_at(depths))
        return merged

    def check(self, params_0: Params, taus: Taus) -> None:
        """Raises the errors that `merge` would raise for its options."""
        for part, depths in self._filled():
            leaves, vectors = _of_slice(params_0, taus, part, depths)
            floating = tree.flatten(tree.floating(leaves))
            part.check_options(part.options_at(depths), floating, vectors)

    def _filled(self) -> Iterator[tuple[MergeRecipe, Mapping[str, float]]]:
        """Yields the merges of slices that have tensors; a slice may have no layers."""
        return filter(lambda pair: pair[1], zip(self.parts, self.depths, strict=True))

    def unused_filters(self, names: Collection[str]) -> list[str]:
        """The filters that fit none of the tensors."""
        return merge_recipe.unused_filters(self.request, names)


def _of_slice(params_0, taus, part, depths):
    return {name: params_0[name] for name in depths}, [
        {name: tau[name] for name in depths if name in tau}
        for tau in taus[: len(part.models)]
    ]


def build(request: MergeRequest, *, seed: int = 0) -> SlicedRecipe:
    """Makes the recipe of a request of slices.

    Args:
      request: what is asked for.
      seed: seed of random methods.

    Raises:
      ValueError: a slice lacks its base, a model or a parameter; the message names it.
    """
    method = merge_recipe.find(request.method, request.preset)
    if request.after:
        raise ValueError(
            f"{request.after[0].name} changes the vector of whole models, but slices "
            "have none. Merge the slices first, then whole models with --after."
        )
    parts, slices = [], []
    for one in request.slices:
        try:
            part, layers = _part(request, method, one, seed)
        except ValueError as error:
            raise ValueError(f"{one.place}: {error}") from error
        parts.append(part)
        slices.append(layers)
    if len({one.base is None for one in slices}) > 1:
        lacking = next(one for one in slices if one.base is None)
        raise ValueError(
            f"{lacking.first.place}: this slice has no base model, but others have "
            "one. Name a base_model for all."
        )
    every = dict.fromkeys(x.model.name for one in request.slices for x in one.sources)
    every |= dict.fromkeys(one.base for one in request.slices if one.base is not None)
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    if request.preset == "paper" and len(slices) > 1:
        notes["each slice is merged separately, with its own statistics of vectors"] = (
            None
        )
    return SlicedRecipe(
        request=request,
        parts=tuple(parts),
        slices=tuple(slices),
        base=request.base,
        models=tuple(model for model in every if model != request.base),
        notes=tuple(notes),
    )


def _part(
    request: MergeRequest, method: Method, one: Slice, seed: int
) -> tuple[MergeRecipe, stream.Slice]:
    """Returns the merge of a slice, and the layers that it takes."""
    base = one.base or request.base
    own = [x for x in one.sources if base is not None and _is(x, base)][:1]
    rest = [x for x in one.sources if not any(x is y for y in own)]
    of_base = None
    if method.base in ("needed", "optional") and base is not None:
        of_base = own[0] if own else _beside(base, one)
    elif method.base == "needed":
        raise ValueError(f"{request.method} merges task vectors. Name a base_model.")
    else:
        rest = [*own, *rest]  # in mergekit the base is the first of the models
    shared = dict(request.parameters)
    for key, setting in one.parameters.items():
        shared[key] = setting + shared.get(key, ())  # the slice's count first
    asked = dataclasses.replace(request, parameters=shared, slices=())
    models = [source.model for source in rest]
    name = None if of_base is None else of_base.model.name
    part = merge_recipe.of_models(asked, method, models, name, seed=seed)
    base_layers = None if of_base is None else _layers(of_base)
    return part, stream.Slice(base_layers, tuple(map(_layers, rest)))


def _is(source: Source, base: str) -> bool:
    return merge_recipe.place(source.model.name) == merge_recipe.place(base)


def _beside(base: str, one: Slice) -> Source:
    """Returns the layers of a base that is not a source: those of the models."""
    first = one.sources[0]
    if any((x.start, x.stop) != (first.start, first.stop) for x in one.sources):
        raise ValueError(
            f"the base model {base} is not one of the sources, and their ranges "
            "differ. List it with its layer_range."
        )
    return first._replace(model=first.model._replace(name=base, parameters={}))


def _layers(source: Source) -> Layers:
    return Layers(source.model.name, source.start, source.stop, source.place)


def settled(recipe: MergeRecipe, *, seed: int) -> MergeRecipe | SlicedRecipe:
    """Returns the recipe, or one of a slice if it has fewer layers than the models.

    Args:
      recipe: a recipe of whole models, with or without the number of layers from the
        file.
      seed: seed of random methods.
    """
    request = recipe.request
    if request.layers is None:
        return recipe
    named = [*([] if request.base is None else [request.base]), *recipe.models]
    counts = {inputs.layers_of(model) for model in named} - {None}
    if counts <= {request.layers}:
        return recipe
    sources = [
        Source(model, 0, request.layers, request.place) for model in request.models
    ]
    one = Slice(tuple(sources), {}, None, request.place)
    return build(
        dataclasses.replace(request, models=(), layers=None, slices=(one,)), seed=seed
    )
