"""The `jaxarith` command: `merge`, `inspect`, `convert`, and `data check`."""

import argparse
import sys

import jaxarith
from jaxarith.commands import convert, data, inspect, merge


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxarith", description="Merges and inspects models, and checks data."
    )
    parser.add_argument("--version", action="version", version=jaxarith.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (merge, inspect, convert, data):
        command.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    args.arguments = arguments
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxarith {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"jaxarith {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
