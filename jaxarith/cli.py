"""The `jaxarith` command: `jaxarith merge`, and `jaxarith data check`."""

import argparse
import sys
from pathlib import Path

import numpy as np

import jaxarith
from jaxarith import hub, merge, task_vectors

_METHODS = {
    "average": (merge.average, ()),
    "task_arithmetic": (merge.task_arithmetic, ("coef",)),
    "ties": (merge.ties, ("coef", "density")),
    "awd": (merge.awd, ("coef", "alpha", "step_size", "steps")),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxarith", description="Merges models, and checks data."
    )
    parser.add_argument("--version", action="version", version=jaxarith.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "merge",
        help="merge fine-tuned checkpoints of one base into a new checkpoint",
        description=(
            "Merges fine-tuned checkpoints of one base. All are folders or hub ids "
            "with safetensors weights, of any architecture; the output is a folder "
            "with the base's configuration and tokenizer that transformers loads."
        ),
    )
    command.set_defaults(run=_merge)
    command.add_argument("--method", required=True, choices=_METHODS)
    command.add_argument("--base", required=True, help="the pre-trained checkpoint")
    command.add_argument(
        "--model",
        required=True,
        action="append",
        dest="models",
        help="a fine-tuned checkpoint; give it once for each",
    )
    command.add_argument("--out", required=True, type=Path, help="the new folder")
    owners = {
        option: [name for name, (_, options) in _METHODS.items() if option in options]
        for _, options in _METHODS.values()
        for option in options
    }
    for option, methods in owners.items():
        command.add_argument(
            f"--{option.replace('_', '-')}",
            type=int if option == "steps" else float,
            help=f"of {', '.join(methods)}; the method's default where it is not given",
        )
    _add_data(commands)
    return parser


def _add_data(commands):
    data = commands.add_parser("data", help="the image tasks of the papers")
    command = data.add_subparsers(dest="action", required=True).add_parser(
        "check",
        help="what is there of a task's data, and what prepares what is missing",
        description=(
            "Tells where the data of a task was found, compares its sizes and class "
            "names with the papers', and prints the commands that prepare what is "
            "missing. Nothing is downloaded. The exit status is 0 if all is well."
        ),
    )
    command.set_defaults(run=_check_data)
    command.add_argument("name", help='a task, "all", or an image folder of your own')
    command.add_argument(
        "--data-dir",
        help="folder with image folders by name, and of prepared TFDS sets",
    )
    command.add_argument("--source", choices=("folder", "tfds", "hub"))
    command.add_argument(
        "--images", action="store_true", help="decode every image; takes minutes"
    )


def _check_data(args: argparse.Namespace) -> int:
    from jaxarith.data import check

    fine = check.main(args.name, args.data_dir, args.source, args.images)
    return 0 if fine else 1


def _merge(args: argparse.Namespace):
    method, allowed = _METHODS[args.method]
    options = {name for _, names in _METHODS.values() for name in names}
    given = {k: v for k, v in vars(args).items() if k in options and v is not None}
    if wrong := sorted(set(given) - set(allowed)):
        raise ValueError(
            f"{args.method} has no option --{wrong[0].replace('_', '-')}; "
            f"it has {', '.join(allowed) or 'none'}."
        )
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name a new folder, or remove it first.")
    base = hub.find(args.base)
    params_0 = hub.read(base)
    taus = [_task_vector(hub.find(model), params_0) for model in args.models]
    merged = method(params_0, taus, **given)
    # JAX computes in float32; a file of float64 stays one.
    merged = {k: np.asarray(v, params_0[k].dtype) for k, v in merged.items()}
    hub.write(args.out, merged, hub.read_json(base), copy_from=base)
    print(f"{args.method} of {len(taus)} models: {args.out}")


def _task_vector(folder: Path, params_0: dict) -> dict:
    params = hub.read(folder)
    if missing := sorted(params_0.keys() - params.keys()):
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of the base, such as {missing[0]}."
        )
    try:
        return task_vectors.difference(params, params_0)
    except ValueError as error:
        raise ValueError(f"{folder} is no fine-tune of the base: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"jaxarith {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
