"""`jaxarith inspect`: shows the content of checkpoints, and compares task vectors."""

import argparse
from pathlib import Path

import numpy as np

from jaxarith import report
from jaxarith.commands.inspect import figures
from jaxarith.commands.inspect import text as inspect_report
from jaxarith.commands.merge import flags

_LABEL = 30  # characters

_DESCRIPTION = """\
Prints the content of a checkpoint: tensors, parameters, dtypes, the largest tensors,
norms by layer, copies of tied tensors, NaN and infinite values, and a fingerprint. The
fingerprint is the same for the same tensors in other files or shards.

With --base, prints the norms of the task vectors of one or several models, and the
cosines between them, for all tensors and by layer. The models may be PEFT adapters, or
files of task vectors, for example from the bank of the experiments.

Several models without --base are compared: names, shapes, dtypes, equal tensors.

Tensors are read one after another, so models may be larger than memory."""

_EXAMPLES = """\
examples:
  jaxarith inspect ./model --tensors
  jaxarith inspect ./math ./code ./my-lora --base ./llama --out ./report
  jaxarith inspect bank/clip/nonlinear/*.safetensors --base ./clip
  jaxarith inspect ./before ./after"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    command = commands.add_parser(
        "inspect",
        help="show tensors and norms of checkpoints, and cosines of task vectors",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folder, hub id, or file of a task vector",
    )
    command.add_argument("--base", help="the checkpoint that the models started from")
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for report.md and report.json and, with --base and several "
        "models, cosines.png",
    )
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    with_base = command.add_argument_group("with --base")
    flags.add_policies(with_base)
    flags.add_dequantize(with_base)


def _run(args: argparse.Namespace) -> None:
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; expected a folder. Name a folder.")
    if args.base is not None:
        found = figures.task_vectors(
            args.base,
            args.models,
            vocabulary=args.vocabulary,
            missing=args.missing,
            dequantize="float32" if args.dequantize else None,
        )
        text = inspect_report.of_task_vectors(found, args.tensors)
    else:
        models = [figures.checkpoint(model) for model in args.models]
        differences = figures.differences(models)
        found = {"models": models, "differences": differences}
        text = inspect_report.of_models(found, args.tensors)
    text = report.printable(text)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        if len(found.get("cosines", ())) > 1:
            try:
                from jaxarith import plots  # here: matplotlib is slow to import
            except ImportError as error:
                raise ImportError(
                    "cosines.png needs matplotlib: pip install 'jaxarith[demo]', or "
                    "leave out --out."
                ) from error

            # Longer names leave no room for the figure.
            names = [model["name"][-_LABEL:] for model in found["models"]]
            plots.matrices(
                args.out / "cosines.png",
                {"task vectors": np.array(found["cosines"])},
                names,
                rows="",
                columns="",
                value="cosine",
            )
        report.write_json(args.out / "report.json", found)
        report.write_text(args.out / "report.md", text + "\n")
