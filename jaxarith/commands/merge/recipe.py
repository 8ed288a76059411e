"""A merge that can be run: which models, by which function, with which options."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxarith import tree
from jaxarith.commands.merge import gradients
from jaxarith.commands.merge.gradients import entries, is_constant, value
from jaxarith.commands.merge.mergekit_methods import MERGEKIT
from jaxarith.commands.merge.methods import PAPER, Method
from jaxarith.typing import Params, Taus

PRESETS = {"paper": PAPER, "mergekit": MERGEKIT}
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MergeRecipe:
    """What a file or flags ask for.

    Attributes:
      method: its name.
      function: the method.
      options: its options by keyword, a function of the names of all tensors.
      base: the model from which task vectors are measured, if there is one.
      models: the others.
      dtype: of the output, or None for that of the base.
      tokenizer: the model whose tokenizer goes along, or None for the base's.
      notes: what the user should know.
      passes: how often the task vectors are read.
      settings: what was asked for, as plain data in the form of a YAML file.
    """

    method: str
    function: Method
    options: Callable[[Iterable[str]], dict[str, Any]]
    base: str | None
    models: tuple[str, ...]
    dtype: str | None
    tokenizer: str | None
    notes: tuple[str, ...]
    passes: int
    settings: Mapping[str, Any]

    def merge(self, params_0: Params, taus: Taus) -> Params:
        """Merges leaves that are named as in PyTorch.

        Args:
          params_0: the base, or zero if there is none.
          taus: task vectors; models if there is no base.
        """
        options = self.options(tree.flatten(tree.floating(params_0)))
        return self.function.merge(params_0, taus, **options)

    def check(self, params_0: Params, taus: Taus):
        """Raises what `merge` would because of its options, from shapes alone.

        The method goes over one leaf of every shape, since tracing takes time.
        """
        leaves = tree.flatten(tree.floating(params_0))
        options = self.options(leaves)
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
        places = [self.settings, *self.settings["models"]]
        values = [x for place in places for x in place.get("parameters", {}).values()]
        parts = {part for value in values for part, _ in entries(value)} - {None, "*"}
        return sorted(part for part in parts if not any(part in name for name in names))


def find(name: str, preset: str | None) -> Method:
    """The method of a name.

    Args:
      name: one that either table has.
      preset: the table that counts where both have it, or None for that of the papers.

    Raises:
      ValueError: neither has it.
    """
    first = PRESETS[preset or "paper"]
    method = first.get(name) or PAPER.get(name) or MERGEKIT.get(name)
    if method is None:
        raise ValueError(
            f"there is no method {name!r}; known are {', '.join(names())}."
        )
    return method


def names() -> list[str]:
    """The names of all methods."""
    return sorted({*PAPER, *MERGEKIT})


def build(settings: Mapping[str, Any], *, seed: int = 0) -> MergeRecipe:
    """Makes the recipe of checked settings.

    Args:
      settings: `merge_method` and `models`, a list of mappings with `model` and perhaps
        `parameters`; perhaps `base_model`, `parameters`, `preset`, `dtype`,
        `out_dtype`, `tokenizer_source`, and `layers`, the number that the largest stack
        must have. A parameter is a value, or one of the settings of `gradients`.
      seed: of random methods.

    Raises:
      ValueError: the method needs a base, or a parameter, that is not there.
    """
    name, base = settings["merge_method"], settings.get("base_model")
    method = find(name, settings.get("preset"))
    shared = settings.get("parameters", {})
    models = [
        (item["model"], item.get("parameters", {})) for item in settings["models"]
    ]
    of_vectors = method.base == "needed" or shared.get("between") == "task_vectors"
    if base is None and of_vectors:
        raise ValueError(f"{name} merges task vectors, so it needs a base model.")
    if method.base != "aside" and base is not None:
        same = {model for model, _ in models if _place(model) == _place(base)}
        of_base = next((own for model, own in models if model in same), {})
        models = [(model, own) for model, own in models if model not in same]
        if method.base == "input":
            models, base = [(base, of_base), *models], None
    if not models:
        raise ValueError("there is no model to merge besides the base.")
    bound = _bound(name, method, models, shared)
    layers = settings.get("layers")

    def options(names):
        names = list(names)
        if layers is not None:
            _check_layers(layers, gradients.stacks(names))
        depths = gradients.depths(names)
        found = {keyword: bind(depths) for keyword, bind in bound.items()}
        if method.random:
            found["key"] = jax.random.key(seed)
        return found

    return MergeRecipe(
        method=name,
        function=method,
        options=options,
        base=base,
        models=tuple(model for model, _ in models),
        dtype=settings.get("out_dtype") or settings.get("dtype"),
        tokenizer=settings.get("tokenizer_source"),
        notes=tuple(_notes(name, method, bound, settings)),
        passes=method.passes,
        settings={key: item for key, item in settings.items() if key != "layers"},
    )


def _place(model):
    """The folder of a local model, however it was written; else its name."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _bound(name, method, models, shared):
    """By keyword, functions of the depths of tensors that give the options."""
    bound = {}
    for key, option in method.options.items():
        owners = models if option.each else [(None, {})]
        chains = _chains(name, key, method, owners, shared)
        if any(chains) and option.keyword != "":
            same = not option.each or not any(key in own for _, own in models)
            labels = [f"{key} of {model}" if model else key for model, _ in owners]
            bind = _binding(labels, chains, same)
            bound[option.keyword or key] = bind
    return bound


def _chains(name, key, method, owners, shared):
    """For each owner the entries that are asked one after another."""
    option = method.options[key]
    chains = [
        [e for place in (own, shared) if key in place for e in entries(place[key])]
        for _, own in owners
    ]
    empty = [
        model for (model, _), chain in zip(owners, chains, strict=True) if not chain
    ]
    if option.required and empty:
        of = f" of {empty[0]}" if empty[0] else ""
        is_input = empty[0] and method.base == "input"
        why = " The base model is one of the models that it merges." * bool(is_input)
        raise ValueError(f"{name} needs {key}{of}, which is not given.{why}")
    if option.default is not None and len(empty) < len(chains):
        return [[*chain, *entries(option.default)] for chain in chains]
    if 0 < len(empty) < len(chains):
        raise ValueError(
            f"{key} is given for {len(chains) - len(empty)} of {len(chains)} models; "
            "give it for each, or once for all."
        )
    return chains


def _binding(labels, chains, same):
    def at(path, depth):
        found = [value(chain, path, depth) for chain in chains]
        if None in found:
            raise ValueError(
                f"no filter of {labels[found.index(None)]} fits the tensor {path}; a "
                "last entry without a filter is for all the rest."
            )
        return found[0] if same else found

    if all(map(is_constant, chains)):
        return lambda depths: at("", 0.0)

    def bind(depths):
        values = {path: at(path, depth) for path, depth in depths.items()}
        return values.__getitem__

    return bind


def _check_layers(expected, stacks):
    found = max(stacks.values(), default=0)
    if found != expected:
        raise ValueError(
            f"the slice has {expected} layers and the models have {found}; slices that "
            "are not whole models are not supported."
        )


def _notes(name, method, bound, settings):
    if method.note:
        yield f"{name}: {method.note}"
    if "int8_mask" in settings.get("parameters", {}):
        yield "int8_mask has no effect: no mask is stored"
    if "in_out" in method.options and "in_out" not in bound:
        yield (
            f"{name} takes matrices as [output, input]; in_out is a pattern for those "
            r"of [input, output], such as GPT-2's: '.*\.c_(attn|fc|proj)\.weight'"
        )
