"""`jaxarith data check`: which files of a task were found, and how to get the rest."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    data = commands.add_parser("data", help="the image tasks of the papers")
    command = data.add_subparsers(dest="action", required=True).add_parser(
        "check",
        help="report which files of a task were found, and how to get the rest",
        description=(
            "Reports where the data of a task was found, compares its sizes and class "
            "names with the papers', and prints the commands that prepare what is "
            "missing. Nothing is downloaded. The exit status is 0 if all is well."
        ),
    )
    command.set_defaults(run=_run)
    command.add_argument("name", help='a task, "all", or an image folder of your own')
    command.add_argument(
        "--data-dir",
        help="folder that holds image folders by name and prepared TFDS data sets",
    )
    command.add_argument("--source", choices=("folder", "tfds", "hub"))
    command.add_argument(
        "--images", action="store_true", help="decode every image; takes minutes"
    )


def _run(args: argparse.Namespace) -> int:
    try:
        from jaxarith.data import check
    except ImportError as error:
        raise ImportError(
            "the data of tasks needs an extra that is not installed: pip install "
            f"'jaxarith[data]' ({error})."
        ) from error
    if "/" in args.name and not Path(args.name).is_dir():
        raise ValueError(
            f"{args.name} is not a folder; expected the name of a task, or an image "
            "folder with train/<class>/ and test/<class>/."
        )
    fine = check.main(args.name, args.data_dir, args.source, args.images)
    return 0 if fine else 1
