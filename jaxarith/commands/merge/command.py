"""`jaxarith merge`: merges checkpoint folders into a new one."""

import argparse
import contextlib
import shlex
import sys
import tempfile
from pathlib import Path

import jax

from jaxarith import hub, stream
from jaxarith.commands.merge import flags, mergekit_yaml, output
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.mergekit_methods import MERGEKIT


def add(commands):
    """Adds the subcommand to what `add_subparsers` returned."""
    flags.add(commands).set_defaults(run=_run)


def _run(args: argparse.Namespace):
    out = _out(args)
    stream.check_out(out, args.overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(
            f"{out} has files but no config.json, so it is no model that could be "
            "replaced; name another folder."
        )
    if args.config is not None:
        flags.check_alone(args)
        recipe = mergekit_yaml.read(args.config, seed=args.seed)
    else:
        recipe = merge_recipe.build(flags.settings(args), seed=args.seed)
    notes = list(recipe.notes)
    if args.method in MERGEKIT and args.preset is None and MERGEKIT[args.method].note:
        notes.append(
            f"{args.method} is its paper's; --preset mergekit takes mergekit's"
        )
    dtype = args.dtype or recipe.dtype
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device(args.device))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        named = [name for name in (recipe.base, *recipe.models) if name is not None]
        places = [_in_safetensors(*pair, temporary) for pair in enumerate(named)]
        opened = stream.open_models(
            None if recipe.base is None else places[0],
            places[len(places) - len(recipe.models) :],
            vocabulary=args.vocabulary,
            missing=args.missing,
        )
        for folder in map(Path.resolve, opened.folders):
            if folder.is_relative_to(out.resolve()):
                raise ValueError(f"{out} holds one of the models; name another folder.")
            if out.resolve().is_relative_to(folder):
                raise ValueError(f"{out} is in one of the models; name another folder.")
        opened.notes.extend(
            f"the filter {part!r} fits no tensor and has no effect"
            for part in recipe.unused_filters(opened.base)
        )
        tokenizer = None if recipe.tokenizer is None else hub.find(recipe.tokenizer)
        finish = output.finisher(
            recipe,
            opened,
            name=out.resolve().name,
            dtype=dtype,
            tokenizer=tokenizer,
            seed=args.seed,
            command=shlex.join(["jaxarith", *args.arguments]),
        )
        plan = stream.plan(opened, dtype=dtype, shard_bytes=args.shard_size)
        if args.dry_run:
            recipe.check(opened.params_0, opened.taus)
            print(output.planned(recipe, opened, plan, dtype))
            return
        if not args.quiet:
            for note in (*notes, *opened.notes):
                print(f"note: {note}", file=sys.stderr)
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
            f"{recipe.method} of {len(recipe.models)} models: {out} "
            f"({report.bytes_read / 1e9:.2f} GB read, {report.bytes_written / 1e9:.2f} "
            f"GB written, {report.seconds:.1f} s)"
        )


def _out(args) -> Path:
    if args.out is not None and args.folder is not None:
        raise ValueError(f"there are two new folders, {args.folder} and {args.out}.")
    out = args.out or args.folder
    if out is None:
        raise ValueError("name the new folder: CONFIG.yaml OUT, or --out OUT.")
    return out.expanduser()


def _in_safetensors(number: int, model: str, temporary: Path) -> str:
    """The model, or a copy of it where a local folder has only Flax weights."""
    folder = Path(model).expanduser()
    kinds = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
    found = [name for name in kinds if (folder / name).is_file()]
    if found != ["flax_model.msgpack"]:
        return model
    copy = temporary / f"{number}"
    hub.write(copy, hub.read(folder), hub.read_json(folder), copy_from=folder)
    return str(copy)


@contextlib.contextmanager
def _device(kind: str | None):
    """Computes on the first device of a kind, in all threads."""
    if kind is None:
        yield
        return
    try:
        device = jax.devices(kind)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX finds no {kind} here; it finds {found}.") from error
    before = jax.config.jax_default_device
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)
