"""`jaxarith merge --to-adapter`: merges adapters of one base to one adapter."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxarith import files, hub, resources, stream, tree
from jaxarith.commands.adapters import merging, opened
from jaxarith.commands.adapters.merging import Merged, Whole
from jaxarith.commands.adapters.opened import Adapters
from jaxarith.commands.merge import (
    flags,
    gradients,
    mergekit_yaml,
    model_card,
    output,
)
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.hub import Stored, adapter_names, adapter_writing, safetensors
from jaxarith.hub.adapter_tensors import PREFIX
from jaxarith.report import printable, shown
from jaxarith.stream.inputs import find_base, open_checkpoint

# Methods of both presets that compute weighted sums.
_LINEAR = ("average", "linear", "task_arithmetic")
# Methods that rotate with the bases, so whole deltas give the same result.
_TURNING = ("tsv", "iso_c")
# Methods that need the base's values.
_OF_THE_BASE = ("arcee_fusion",)


def run(args: argparse.Namespace, out: Path) -> None:
    """Merges the adapters in the flags or the YAML file to one adapter in `out`.

    Raises:
      FileNotFoundError: an adapter or one of its files does not exist.
      ValueError: a model is not an adapter, the adapters have different bases, or the
        method merges whole models.
    """
    if args.vocabulary != "error" or args.missing != "error":
        raise ValueError("--vocabulary and --missing are for models, not for adapters.")
    if args.dequantize:
        raise ValueError("--dequantize is for models, not for adapters. Leave it out.")
    recipe = _recipe(args)
    adapters = opened.open_adapters(recipe.models, recipe.base or None)
    out = hub.check_out(out, args.overwrite, adapters.folders)
    before = hub.state(out)
    stamps = {x: files.stamp(x) for f in adapters.folders for x in hub.weight_files(f)}
    recipe, more = _with_config(recipe, adapters)
    copied, left = opened.side_files(adapters.folders)
    named = [f"{module}.weight" for module in adapters.layers]
    unused = [
        f"the filter {part!r} fits no tensor and has no effect"
        for part in recipe.unused_filters(named)
    ]
    notes = [*recipe.notes, *more, *unused, *left]
    method = recipe.request.method
    if not _is_linear(recipe) and method not in _TURNING:
        notes.append(
            f"{method} merges the cores of the adapters; methods that use single "
            "entries have another result there than on whole matrices"
        )
    if args.dry_run:
        print(printable(_planned(recipe, adapters, args.adapter_rank, notes)))
        return
    if not args.quiet:
        for note in notes:
            print(shown(f"note: {note}"), file=sys.stderr)
    dtype = args.dtype or recipe.dtype
    with hub.staging(out.parent) as temporary, jax.enable_x64(True):
        new = temporary / "new"
        new.mkdir()
        with (
            adapter_writing.Spill(temporary / "factors") as spill,
            resources.one_blas_thread(),
        ):
            tensors, rows = _merged(args, recipe, adapters, spill, dtype)
        ranks = {row["module"]: row["rank"] for row in rows}
        config = adapter_writing.config(
            ranks,
            adapters.base,
            task_type=adapters.configs[0].get("task_type"),
            modules_to_save=opened.modules_to_save(adapters.configs),
            fan_in_fan_out=any(x.get("fan_in_fan_out") for x in adapters.configs),
            more={key: value for key, value in adapters.shared.items() if value},
        )
        size = adapter_writing.write(new, tensors, config)
        facts = model_card.data(
            recipe.request,
            _inputs(recipe, adapters, args.hashes),
            shlex.join(["jaxarith", *args.arguments]),
            notes,
            dtype=dtype,
            seed=args.seed,
        )
        summary = _summary(rows)
        facts |= {"kind": "adapter", "adapter": {**summary, "layers": rows}}
        output.write(new, output.Beside(None, copied, {}, ()), out.name, facts)
        safetensors.check_unchanged(stamps)
        hub.publish(new, out, before, temporary / "old")
    if not args.quiet:
        print(
            f"{recipe.request.method} of "
            f"{tree.counted(len(recipe.models), 'adapter')}: {out} "
            f"({size / 1e6:.2f} MB)\n{_told(summary)}"
        )


def _recipe(args: argparse.Namespace) -> MergeRecipe:
    """Returns the recipe, with the adapters' base if the method needs one."""
    if args.config is not None:
        flags.check_alone(args)
        read = mergekit_yaml.read(args.config, seed=args.seed)
        if not isinstance(read, MergeRecipe):
            raise ValueError(
                f"{args.config} has slices of models, but --to-adapter merges whole "
                "adapters. List them under models."
            )
        recipe = read
    else:
        request = flags.request(args)
        method = merge_recipe.find(request.method, request.preset)
        if request.base is None and method.base in ("needed", "optional"):
            # An adapter of a model without a name states no base.
            base = opened.stated_base(request.models[0].name) or ""
            request = dataclasses.replace(request, base=base)
        recipe = merge_recipe.build(request, seed=args.seed)
    request = recipe.request
    for key in ("tokenizer_source", "tokens", "pad_to_multiple_of", "chat_template"):
        if getattr(request, key):
            raise ValueError(
                f"{args.config}: {key} is for models, because an adapter keeps its "
                "base's tokens. Leave it out of a merge --to-adapter."
            )
    name, shared = request.method, request.parameters
    if name in _OF_THE_BASE:
        raise ValueError(
            f"{name} needs the base's weights, which adapters do not have. Choose "
            "another method, or merge into a model: leave out --to-adapter."
        )
    of_vectors = shared.get("between") == gradients.constant("task_vectors")
    if recipe.function.base in ("aside", "input") and name not in _LINEAR:
        if not of_vectors:
            raise ValueError(
                f"{name} merges whole models, but adapters are task vectors. Choose "
                "another method, such as task_arithmetic, ties or tsv."
            )
    return recipe


def _is_linear(recipe: MergeRecipe) -> bool:
    return recipe.request.method in _LINEAR and not recipe.request.after


def _with_config(
    recipe: MergeRecipe, adapters: Adapters
) -> tuple[MergeRecipe, list[str]]:
    """Returns the recipe with the base's configuration, which counts the layers."""
    place = Path(str(recipe.request.base or adapters.base)).expanduser()
    if (place / hub.CONFIG).is_file():
        return dataclasses.replace(recipe, config=hub.read_json(place)), []
    request = recipe.request
    owners = [request.parameters, *(model.parameters for model in request.models)]
    settings = [setting for own in owners for setting in own.values()]
    if request.after or not all(map(gradients.is_constant, settings)):
        note = f"{place} is not a local folder: depths count the adapters' own layers"
        return recipe, [note]
    return recipe, []


def _merged(
    args: argparse.Namespace,
    recipe: MergeRecipe,
    adapters: Adapters,
    spill: adapter_writing.Spill,
    dtype: str | None,
) -> tuple[dict[str, Stored], list[dict[str, Any]]]:
    """Returns the tensors of the merged adapter, and facts about each layer."""
    tensors: dict[str, Stored] = {}
    given = args.base if args.config is None else recipe.request.base
    whole = _whole(adapters, given)

    def place(name: str, merged: np.ndarray) -> None:
        own = next(x for x in whole[name].tensors if x is not None)
        wanted = own.dtype if dtype is None else jnp.dtype(dtype)
        tensors[PREFIX + name] = spill.put(name, merged.astype(wanted))

    if _is_linear(recipe):
        coefs = merging.coefficients(recipe.merge, adapters, whole)
        _check_shares(recipe, coefs)
        for name, leaf in whole.items():
            place(name, merging.weighted(name, leaf, coefs[name]))
        layers = merging.linear(adapters, coefs, args.adapter_rank)
    else:
        for name, leaf in whole.items():
            if leaf.start is None:
                raise ValueError(merging.needs_base(name))
        layers = merging.in_core_space(
            recipe.merge, adapters, whole, args.adapter_rank, place
        )
    rows = []
    for found in _shown(layers, len(adapters.layers), args.quiet):
        layer = adapters.layers[found.module]
        factors = opened.stored(layer, found.product)
        names = adapter_writing.factor_names(found.module, layer.embedding)
        for name, factor in zip(names, factors, strict=True):
            rounded = factor.astype(jnp.dtype(dtype or "float32"))
            tensors[name] = spill.put(found.module, rounded)
        rows.append(_row(found))
    for name, tensor in opened.copies(adapters):
        module, _, last = name.rpartition(".")
        tensors[f"{PREFIX}{module}.base_layer.{last}"] = tensor
    return tensors, rows


def _shown(layers: Iterator[Merged], count: int, quiet: bool) -> Iterator[Merged]:
    return iter(tqdm(layers, total=count, unit="layer", disable=quiet))


def _whole(adapters: Adapters, given: str | None) -> dict[str, Whole]:
    """Returns the tensors that adapters replace, with the base's if it is given."""
    copied = {name for parts in adapters.parts for name in parts.inner}
    found = {n: x for n, x in opened.replaced(adapters).items() if n not in copied}
    if not found:
        return {}
    base = {} if given is None else open_checkpoint(find_base(given)).tensors
    names = adapter_names.fit(adapters.folders[0], found, base)[0] if base else {}
    whole = {}
    for name, tensors in found.items():
        start = base[names[name]] if base else None
        shapes = {tensor.shape for tensor in (*tensors, start) if tensor is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"{name} has the shapes {sorted(shapes)} in the adapters and the base; "
                "expected one shape, because modules_to_save names it."
            )
        whole[name] = Whole(tensors, start)
    return whole


def _check_shares(recipe: MergeRecipe, coefs: Mapping[str, np.ndarray]) -> None:
    """Raises a ValueError if the weights of a mean of models do not sum to 1."""
    if recipe.function.base in ("aside", "input"):
        for name, own in coefs.items():
            if abs(float(np.sum(own)) - 1) > 1e-6:
                raise ValueError(
                    f"{recipe.request.method}: the weights of {name} sum to "
                    f"{float(np.sum(own)):g}, which would scale the base as well, and "
                    "no adapter can. Let them sum to 1, or use task_arithmetic."
                )


def _row(found: Merged) -> dict[str, Any]:
    return {
        "module": found.module,
        "rank": found.product.rank,
        "energy": found.energy,
        "squared_norm": found.squared_norm,
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns rank and kept energy over all layers, and those of the worst layer."""
    kept = sum(row["squared_norm"] for row in rows)
    total = sum(row["squared_norm"] / (row["energy"] or 1) for row in rows)
    worst = min(rows, key=lambda row: row["energy"])
    return {
        "rank": max(row["rank"] for row in rows),
        "energy": kept / total if total else 1.0,
        "worst_energy": worst["energy"],
        "worst_module": worst["module"],
    }


def _told(summary: Mapping[str, Any]) -> str:
    text = f"rank {summary['rank']}, energy kept {summary['energy']:.2%}"
    if summary["worst_energy"] < 1 - 1e-9:
        worst = printable(summary["worst_module"])
        text += f", least {summary['worst_energy']:.2%} in {worst}"
    return text


def _planned(
    recipe: MergeRecipe, adapters: Adapters, rank: int | None, notes: Sequence[str]
) -> str:
    most = max(sum(adapters.ranks(module)) for module in adapters.layers)
    rows = [
        ("method", recipe.request.method),
        ("base", str(adapters.base)),
        *(("adapter", model) for model in recipe.models),
        ("layers", str(len(adapters.layers))),
        ("rank", f"{min(most, rank or most)} (the sum of the ranks is {most})"),
        *(("note", note) for note in notes),
    ]
    return "\n".join(f"{label:<8} {text}" for label, text in rows)


def _inputs(
    recipe: MergeRecipe, adapters: Adapters, hashes: bool
) -> list[model_card.Input]:
    base = model_card.Input(str(adapters.base), "base", _is_local(adapters.base), {})
    of = stream.sha256(adapters.folders) if hashes else {}
    return [
        base,
        *(
            model_card.Input(name, "model", _is_local(name), of.get(str(folder), {}))
            for name, folder in zip(recipe.models, adapters.folders, strict=True)
        ),
    ]


def _is_local(name):
    return Path(str(name)).expanduser().exists()
