"""`jaxarith merge`: merges checkpoint folders into a new one."""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax

from jaxarith import hub, stream
from jaxarith.commands.adapters import to_adapter
from jaxarith.commands.merge import (
    flags,
    mergekit_yaml,
    model_card,
    output,
    slices,
    vocabulary,
)
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.mergekit_methods import MERGEKIT
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.slices import SlicedRecipe
from jaxarith.report import printable, shown
from jaxarith.stream.inputs import read_config


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    flags.add(commands).set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    out = _out(args)
    recipes = [] if args.config is None else [args.config]
    stream.check_out(out, args.overwrite, recipes)
    if args.to_adapter:
        with _device(args.device):
            to_adapter.run(args, out)
        return
    if args.adapter_rank is not None:
        raise ValueError("--adapter-rank is the rank of a --to-adapter; add that flag.")
    if args.config is not None:
        flags.check_alone(args)
        recipe = mergekit_yaml.read(args.config, seed=args.seed)
    else:
        recipe = merge_recipe.build(flags.request(args), seed=args.seed)
    if isinstance(recipe, MergeRecipe):
        recipe = slices.settled(recipe, seed=args.seed)
    dtype = args.dtype or recipe.dtype
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device(args.device))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = _places(recipe, temporary)
        tokenizer = vocabulary.plan(recipe.request, places)
        opened = _opened(recipe, args, places, tokenizer.rerowing)
        if opened.narrowed:
            stack.enter_context(_float64())
            opened = _opened(recipe, args, places, tokenizer.rerowing)
        _check_apart(out, opened.folders)
        config = read_config(opened.folders[0])
        if isinstance(recipe, SlicedRecipe):
            recipe = recipe.of(opened, config)
        else:
            recipe = dataclasses.replace(recipe, config=config)
        unused = [
            f"the filter {part!r} fits no tensor and has no effect"
            for part in recipe.unused_filters(opened.base)
        ]
        beside = output.beside(opened, dtype, tokenizer)
        notes = (*recipe.notes, *tokenizer.notes, *opened.notes)
        notes = (*notes, *unused, *beside.notes)
        plan = stream.plan(opened, dtype=dtype, shard_bytes=args.shard_size)
        if args.dry_run:
            recipe.check(opened.params_0, opened.taus)
            print(printable(output.planned(recipe, plan, dtype, notes)))
            return
        if not args.quiet:
            for note in (*_hints(args), *notes):
                print(shown(f"note: {note}"), file=sys.stderr)

        def finish(folder: Path, report: stream.Report) -> None:
            facts = model_card.data(
                recipe.request,
                output.inputs(recipe, opened, report),
                shlex.join(["jaxarith", *args.arguments]),
                notes,
                dtype=dtype,
                seed=args.seed,
            )
            output.write(folder, beside, out.resolve().name, facts)

        report = stream.merge(
            recipe.merge,
            opened,
            out,
            dtype=dtype,
            shard_bytes=args.shard_size,
            hashes=args.hashes,
            overwrite=args.overwrite,
            quiet=args.quiet,
            finish=finish,
        )
    if not args.quiet:
        print(
            f"{recipe.request.method} of {len(recipe.models)} models: {out} "
            f"({report.bytes_read / 1e9:.2f} GB read, {report.bytes_written / 1e9:.2f} "
            f"GB written, {report.seconds:.1f} s)"
        )


def _places(recipe: MergeRecipe | SlicedRecipe, temporary: Path) -> dict[str, str]:
    """Where all models are, by their names, the base first."""
    named = [name for name in (recipe.base, *recipe.models) if name is not None]
    if isinstance(recipe, SlicedRecipe):
        return {name: name for name in named}
    return {name: _in_safetensors(i, name, temporary) for i, name in enumerate(named)}


def _opened(
    recipe: MergeRecipe | SlicedRecipe,
    args: argparse.Namespace,
    places: Mapping[str, str],
    rerowing: stream.Rerowing | None,
) -> stream.Opened:
    dequantize = None
    if args.dequantize:
        in_bfloat16 = (args.dtype or recipe.dtype) in (None, "bfloat16")
        dequantize = "bfloat16" if in_bfloat16 else "float32"
    if isinstance(recipe, SlicedRecipe):
        return stream.open_slices(
            recipe.slices,
            recipe.models,
            base=recipe.base,
            vocabulary=args.vocabulary,
            missing=args.missing,
            rerowing=rerowing,
            dequantize=dequantize,
        )
    return stream.open_models(
        None if recipe.base is None else places[recipe.base],
        [places[name] for name in recipe.models],
        vocabulary=args.vocabulary,
        missing=args.missing,
        rerowing=rerowing,
        dequantize=dequantize,
    )


def _check_apart(out: Path, folders: Iterable[Path]) -> None:
    """Raises a ValueError if the new folder is in one of the models, or holds one."""
    for folder in map(Path.resolve, folders):
        if folder.is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds one of the models; name another folder.")
        if out.resolve().is_relative_to(folder):
            raise ValueError(f"{out} is in one of the models; name another folder.")


def _hints(args: argparse.Namespace) -> Iterator[str]:
    """What the user may not know of the flags."""
    if args.method in MERGEKIT and args.preset is None and MERGEKIT[args.method].note:
        yield f"{args.method} is that of its paper; --preset mergekit uses mergekit's"


def _out(args: argparse.Namespace) -> Path:
    if args.out is not None and args.folder is not None:
        raise ValueError(
            f"there are two new folders, {args.folder} and {args.out}; name one."
        )
    out = args.out or args.folder
    if out is None:
        raise ValueError("name the new folder: CONFIG.yaml OUT, or --out OUT.")
    return out.expanduser()


def _in_safetensors(number: int, model: str, temporary: Path) -> str:
    """The model, or a copy of it where a local folder has only Flax weights."""
    folder = Path(model).expanduser()
    kinds = (hub.WEIGHTS, hub.INDEX, hub.MSGPACK)
    found = [name for name in kinds if (folder / name).is_file()]
    if found != [hub.MSGPACK]:
        return model
    copy = temporary / f"{number}"
    if not copy.exists():
        hub.write(copy, hub.read(folder), hub.read_json(folder), copy_from=folder)
    return str(copy)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Computes with float64 where tensors have it, in all threads."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@contextlib.contextmanager
def _device(kind: str | None) -> Iterator[None]:
    """Computes on the first device of a kind, in all threads."""
    if kind is None:
        yield
        return
    try:
        device = jax.devices(kind)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX finds no {kind} here; it finds {found}.") from error
    # JAX defines its options at run time.
    before = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)
