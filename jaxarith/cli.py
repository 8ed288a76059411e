"""The `jaxarith` command, with a subcommand for each task."""

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterable

import jaxarith
from jaxarith import report
from jaxarith.commands import completion, signals

# Where the `add` of each subcommand is.
COMMANDS = {
    "merge": "jaxarith.commands.merge",
    "recipe": "jaxarith.commands.recipe",
    "extract": "jaxarith.commands.adapters.extract",
    "verify": "jaxarith.commands.adapters.verify",
    "inspect": "jaxarith.commands.inspect",
    "convert": "jaxarith.commands.convert",
    "data": "jaxarith.commands.data",
}


def _parser(names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxarith", description="Merges and inspects models, and checks data."
    )
    parser.add_argument("--version", action="version", version=jaxarith.__version__)
    parser.add_argument(
        "--print-completion",
        action=completion.PrintCompletion,
        choices=completion.SHELLS,
        help="print a script by which this shell completes the command (needs "
        "jaxarith[completion])",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in names:
        importlib.import_module(COMMANDS[name]).add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The modules of a command take a tenth of a second or more to import.
    asked = [name for name in arguments[:1] if name in COMMANDS]
    args = _parser(asked or COMMANDS).parse_args(arguments)
    args.arguments = arguments
    format_before, warnings.formatwarning = warnings.formatwarning, _note
    try:
        with signals.raised():
            return args.run(args) or 0
    except (ValueError, OSError, ImportError, OverflowError, RecursionError) as error:
        return _failed(args.command, str(error))
    except MemoryError as error:
        return _failed(args.command, f"out of memory. {error}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # as JAX says it
            raise
        return _failed(args.command, f"out of memory. {error}")
    except KeyboardInterrupt:
        _failed(args.command, "stopped")
        return 130
    except signals.Stopped as stopped:
        _failed(args.command, str(stopped))
        return stopped.status
    finally:
        warnings.formatwarning = format_before


def _failed(command, message):
    print(report.shown(f"jaxarith {command}: {message}"), file=sys.stderr)
    return 1


def _note(message, category, filename, lineno, line=None):
    """A warning in the form of a note."""
    del category, filename, lineno, line
    return report.shown(f"note: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
