"""`jaxarith merge`: merges checkpoint folders into a new one."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxarith import stream
from jaxarith.commands.merge import documents, flags, mergekit_yaml, steps
from jaxarith.commands.merge import recipe as merge_recipe
from jaxarith.commands.merge.devices import computing_on, with_threads
from jaxarith.commands.merge.mergekit_methods import MERGEKIT
from jaxarith.commands.merge.methods import PAPER
from jaxarith.commands.merge.prepared import prepared
from jaxarith.report import printable, shown


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    flags.add(commands).set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    out = _out(args)
    recipes = [] if args.config is None else [args.config]
    stream.check_out(out, args.overwrite, recipes)
    with with_threads(args.threads), computing_on(args.device):
        if args.to_adapter:
            from jaxarith.commands.adapters import to_adapter  # here: slow to import

            _refuse_intermediates(args)
            to_adapter.run(args, out)
            return
        if args.adapter_rank is not None:
            raise ValueError(
                "--adapter-rank is the rank for --to-adapter. Add that flag."
            )
        _merge(args, out)


def _merge(args: argparse.Namespace, out: Path) -> None:
    found = []
    if args.config is not None:
        flags.check_alone(args)
        found = documents.read(args.config)
    if len(found) > 1:
        _merge_documents(found, args, out)
        return
    _refuse_intermediates(args)
    if found:
        recipe = mergekit_yaml.build(found[0].root, seed=args.seed)
    else:
        recipe = merge_recipe.build(flags.request(args), seed=args.seed)
    with prepared(recipe, args) as ready:
        ready.check_apart(out)
        if args.dry_run:
            print(printable(ready.described()))
            return
        if not args.quiet:
            for note in (*_hints(args), *ready.notes):
                print(shown(f"note: {note}"), file=sys.stderr)
        report = ready.merge(out, overwrite=args.overwrite)
    if not args.quiet:
        print(steps.done(ready, out, report))


def _refuse_intermediates(args: argparse.Namespace) -> None:
    if args.intermediate_dir is not None:
        raise ValueError(
            "--intermediate-dir is for a YAML file with several documents, but this "
            "merge has no intermediate results. Leave it out."
        )


def _merge_documents(
    found: list[documents.Document], args: argparse.Namespace, out: Path
) -> None:
    documents.check_models(found)
    if args.intermediate_dir is not None:
        args.intermediate_dir = args.intermediate_dir.expanduser()
    steps.check_folders(found, args, out)
    if not args.dry_run:
        steps.run(found, args, out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(steps.plans(found, args, Path(temporary)))


def _hints(args: argparse.Namespace) -> Iterator[str]:
    """Yields hints about flags that the user may not know."""
    in_both = args.method in MERGEKIT and args.method in PAPER
    if in_both and args.preset is None and MERGEKIT[args.method].note:
        yield f"{args.method} is that of its paper; --preset mergekit uses mergekit's"


def _out(args: argparse.Namespace) -> Path:
    if args.out is not None and args.folder is not None:
        raise ValueError(
            f"two new folders are given, {args.folder} and {args.out}. Name one."
        )
    out = args.out or args.folder
    if out is None:
        raise ValueError("no new folder is named. Write CONFIG.yaml OUT, or --out OUT.")
    return out.expanduser()
