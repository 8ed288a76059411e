"""`jaxarith --print-completion`: prints a script for completion in a shell."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script of a shell, and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        del namespace, option_string
        try:
            text = script(parser, str(values))
        except ImportError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        print(text)
        parser.exit(0)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the script that completes a command.

    Subcommands, flags and the words that a flag accepts come from the parser. Every
    other text is completed as the name of a file.

    Args:
      parser: the parser of the command, with all subcommands.
      shell: one of `SHELLS`.

    Raises:
      ImportError: shtab is not installed.
    """
    try:
        import shtab  # here: no other command needs it
    except ImportError as error:
        raise ImportError(
            "completion scripts need shtab: pip install 'jaxarith[completion]'."
        ) from error
    for action in _actions(parser):
        if _may_be_a_file(action):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of all its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _may_be_a_file(action: argparse.Action) -> bool:
    takes_text = action.nargs != 0 and action.type in (None, Path)
    # The options of methods are numbers and words.
    return takes_text and action.choices is None and " " not in action.dest
