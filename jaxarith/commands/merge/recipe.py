"""Recipes: merges that can be run, with their models, functions and options."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxarith import tree
from jaxarith.commands.merge import gradients, wrappers
from jaxarith.commands.merge.gradients import Setting
from jaxarith.commands.merge.mergekit_methods import MERGEKIT
from jaxarith.commands.merge.methods import PAPER, Method
from jaxarith.commands.merge.request import Dtype, MergeRequest, Model, Preset
from jaxarith.merge import wrapped
from jaxarith.stream import stacks
from jaxarith.typing import Params, Taus

PRESETS: dict[Preset, dict[str, Method]] = {"paper": PAPER, "mergekit": MERGEKIT}

# Maps the depths of all tensors to the value of an option.
_Bind = Callable[[Mapping[str, float]], Any]


@dataclasses.dataclass(frozen=True)
class MergeRecipe:
    """A merge that can be run, made from a request.

    Attributes:
      request: the merge that was asked for.
      function: the method.
      options: `options(names, config)` returns the method's options by keyword, for the
        names of all tensors and a configuration.
      options_at: `options_at(depths)` returns the same for the depths of tensors.
      base: the model from which task vectors are measured, if there is one.
      models: the other models, or all models if the method merges models.
      notes: notes for the user.
      config: the content of the base's `config.json`, which counts the layers.
    """

    request: MergeRequest
    function: Method
    options: Callable[[Iterable[str], Mapping[str, Any]], dict[str, Any]]
    options_at: Callable[[Mapping[str, float]], dict[str, Any]]
    base: str | None
    models: tuple[str, ...]
    notes: tuple[str, ...]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> Dtype | None:
        """The dtype of the new weights; None is that of the base."""
        return self.request.out_dtype or self.request.dtype

    def merge(self, params_0: Params, taus: Taus) -> Params:
        """Merges leaves that are named as in PyTorch.

        Args:
          params_0: the base, or zero if there is none.
          taus: task vectors; models if there is no base.
        """
        names = tree.flatten(tree.floating(params_0))
        options = self.options(names, self.config)
        method = functools.partial(self.function.merge, **options)
        method = wrappers.then(method, self.request.after, self.config)
        return method(params_0, taus)

    def check(self, params_0: Params, taus: Taus) -> None:
        """Raises the errors that `merge` would raise for its options, from shapes only.

        The method is traced with one leaf of every shape, because tracing takes time.
        """
        leaves = tree.flatten(tree.floating(params_0))
        options = self.options(leaves, self.config)
        rows = wrapped.rows(params_0, taus) if self.request.after else {}
        for one in self.request.after:
            one.planned(self.config)(rows)
        self.check_options(options, leaves, taus)

    def check_options(
        self, options: Mapping[str, Any], leaves: Mapping[str, Any], taus: Taus
    ) -> None:
        """Raises the errors that the method would raise for these options."""
        if not self.function.by_shape:
            return
        of_shape = {
            (leaf.shape, str(leaf.dtype)): path for path, leaf in leaves.items()
        }
        few = [
            {
                path: jax.ShapeDtypeStruct(vector[path].shape, vector[path].dtype)
                for path in of_shape.values()
                if path in vector
            }
            for vector in (leaves, *map(tree.flatten, taus))
        ]
        method = functools.partial(self.function.merge, **options)
        jax.eval_shape(method, few[0], few[1:])

    def unused_filters(self, names: Collection[str]) -> list[str]:
        """The filters that fit none of the tensors."""
        return unused_filters(self.request, names)


def unused_filters(request: MergeRequest, names: Collection[str]) -> list[str]:
    """Returns the filters of a request that fit none of the tensors."""
    places = [request.parameters, *(own for _, own in request.models)]
    for one in request.slices:
        places += [one.parameters, *(x.model.parameters for x in one.sources)]
    settings = [setting for place in places for setting in place.values()]
    return gradients.unused(settings, names)


def find(name: str, preset: Preset | None) -> Method:
    """Returns the method with a name.

    Args:
      name: the name of a method in one of the two tables.
      preset: the table to use if both have the name; None means that of the papers.

    Raises:
      ValueError: neither table has the name.
    """
    first = PRESETS[preset or "paper"]
    method = first.get(name) or PAPER.get(name) or MERGEKIT.get(name)
    if method is None:
        raise ValueError(
            f"there is no method {name!r}; known are {', '.join(names())}."
        )
    return method


def names() -> list[str]:
    """Returns the names of all methods."""
    return sorted({*PAPER, *MERGEKIT})


def build(request: MergeRequest, *, seed: int = 0) -> MergeRecipe:
    """Makes the recipe of a request.

    Args:
      request: what is asked for.
      seed: seed of random methods.

    Raises:
      ValueError: a base, a model or a parameter that the method needs is missing.
    """
    name, base = request.method, request.base
    method = find(name, request.preset)
    of_vectors = request.parameters.get("between") == gradients.constant("task_vectors")
    if base is None and (method.base == "needed" or of_vectors):
        raise ValueError(f"{name} merges task vectors, so it needs a base model.")
    if base is None and request.after:
        raise ValueError(
            f"{request.after[0].name} changes a merged task vector, which is measured "
            "from a base model. Name the base."
        )
    models = request.models
    if method.base != "aside" and base is not None:
        same = [model for model in models if place(model.name) == place(base)]
        models = tuple(model for model in models if model not in same)
        if method.base == "input":
            own = same[0].parameters if same else {}
            models, base = (Model(base, own), *models), None
    recipe = of_models(request, method, models, base, seed=seed)
    return dataclasses.replace(recipe, notes=(*recipe.notes, *_twice(recipe.models)))


def of_models(
    request: MergeRequest,
    method: Method,
    models: Sequence[Model],
    base: str | None,
    *,
    seed: int = 0,
) -> MergeRecipe:
    """Returns the recipe of a request whose base and models are separated.

    Args:
      request: the merge that is asked for.
      method: the method of the request.
      models: the models to merge, without the base.
      base: the model from which task vectors are measured, if there is one.
      seed: seed of random methods.

    Raises:
      ValueError: a model or a parameter that the method needs is missing.
    """
    if not models:
        raise ValueError("there is no model to merge besides the base. Name one.")
    if method.models not in (None, len(models)):
        raise ValueError(
            f"{request.method} takes {method.models} model; found "
            f"{', '.join(model.name for model in models)}."
        )
    bound = _bound(request.method, method, models, request.parameters)

    def options(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
        names = list(names)
        if request.layers is not None:
            _check_layers(request.layers, stacks.layers(names, config))
        return at(gradients.depths(names, config))

    def at(depths: Mapping[str, float]) -> dict[str, Any]:
        found = {keyword: bind(depths) for keyword, bind in bound.items()}
        if method.random:
            found["key"] = jax.random.key(seed)
        return found

    return MergeRecipe(
        request=request,
        function=method,
        options=options,
        options_at=at,
        base=base,
        models=tuple(model.name for model in models),
        notes=tuple(_notes(request, method, bound)),
    )


def place(model: str) -> str:
    """Returns the absolute folder of a local model, or else the model's name."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _twice(models: Sequence[str]) -> Iterator[str]:
    """Yields notes on models that are given twice, also under two names."""
    seen: dict[str, str] = {}
    for model in models:
        first = seen.get(place(model))
        if first is not None:
            names = model if first == model else f"{first} and {model}"
            yield f"{names}: this model is given twice, and counts twice"
        seen[place(model)] = model


def _bound(
    name: str, method: Method, models: Sequence[Model], shared: Mapping[str, Setting]
) -> dict[str, _Bind]:
    """Returns, by keyword, functions from the depths of tensors to the options."""
    bound = {}
    for key, option in method.options.items():
        owners = models if option.each else [Model("", {})]
        settings = _settings(name, key, method, owners, shared)
        if any(settings) and option.keyword != "":
            same = not option.each or not any(key in own for _, own in models)
            labels = [f"{key} of {model}" if model else key for model, _ in owners]
            bound[option.keyword or key] = _binding(labels, settings, same)
    return bound


def _settings(
    name: str,
    key: str,
    method: Method,
    owners: Sequence[Model],
    shared: Mapping[str, Setting],
) -> list[Setting]:
    """Returns each owner's setting of an option: its own, shared, or the default."""
    option = method.options[key]
    settings = [own.get(key, ()) + shared.get(key, ()) for _, own in owners]
    empty = [
        model for (model, _), found in zip(owners, settings, strict=True) if not found
    ]
    if option.required and empty:
        of = f" of {empty[0]}" if empty[0] else ""
        is_input = empty[0] and method.base == "input"
        why = " The base model is one of the models that it merges." * bool(is_input)
        raise ValueError(f"{name} needs {key}{of}, which is not given.{why}")
    if option.default is not None and len(empty) < len(settings):
        return [found + gradients.constant(option.default) for found in settings]
    if 0 < len(empty) < len(settings):
        raise ValueError(
            f"{key} is given for {len(settings) - len(empty)} of {len(settings)} "
            "models. Give it for each, or once for all."
        )
    return settings


def _binding(labels: Sequence[str], settings: Sequence[Setting], same: bool) -> _Bind:
    def at(path, depth):
        found = [gradients.value(setting, path, depth) for setting in settings]
        if None in found:
            raise ValueError(
                f"no filter of {labels[found.index(None)]} fits the tensor {path}. Add "
                "a last entry without a filter, for all other tensors."
            )
        return found[0] if same else found

    if all(map(gradients.is_constant, settings)):
        return lambda depths: at("", 0.0)

    def bind(depths):
        values = {path: at(path, depth) for path, depth in depths.items()}
        return values.__getitem__

    return bind


def _check_layers(expected: int, found: int) -> None:
    if found != expected:
        raise ValueError(
            f"the slice has {tree.counted(expected, 'layer')} and the models have "
            f"{found}; this recipe is one of whole models."
        )


def _notes(
    request: MergeRequest, method: Method, bound: Collection[str]
) -> Iterator[str]:
    if method.note:
        yield f"{request.method}: {method.note}"
    if "int8_mask" in request.parameters:
        yield "int8_mask has no effect: no mask is stored"
    if "in_out" in method.options and "in_out" not in bound:
        yield (
            f"{request.method} takes matrices as [output, input]; set in_out to a "
            "pattern for those that are [input, output], for example GPT-2's: "
            r"'.*\.c_(attn|fc|proj)\.weight'"
        )
