"""Reports: JSON and Markdown files. A file is written completely or not at all."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Control characters other than line ends and tabs, characters that change the direction
# of writing, and surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file under a temporary name and renames it.

    Args:
      path: path of the file; an older file is replaced.
      text: content of the file, written in UTF-8.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if path.exists():  # the old file must survive until the new one is on disk
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes plain data as JSON.

    Args:
      path: path of the file; an older file is replaced.
      content: dicts, lists, texts, numbers, booleans and None.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def listed(names: Sequence[Any], most: int = 8) -> str:
    """Returns the first names for a message, and how many more there are.

    Args:
      names: items of any type.
      most: largest number of names to show.

    Example:
      >>> listed("abc", most=2)
      'a, b and 1 more'
    """
    shown = ", ".join(map(str, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def cut(value: Any, most: int = 80) -> str:
    """Returns a value as text for a message; a long text is cut.

    Args:
      value: a text, or a value of any other type, which is shown as Python writes it.
      most: largest number of characters.

    Example:
      >>> cut(list(range(100)), most=10)
      '[0, 1, 2, …'
    """
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def printable(text: str) -> str:
    r"""Returns a text whose control characters are replaced by escapes.

    A terminal would obey them as commands. Surrogates, which cannot be printed, become
    escapes too. Line ends and tabs stay.

    Example:
      >>> print(printable("clear\x1b[2J"))
      clear\x1b[2J
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(message: str, most: int = 4000) -> str:
    """Returns a message for a terminal: printable, and cut in the middle if long.

    Args:
      message: the text.
      most: largest number of characters before the middle is cut.

    Example:
      >>> shown("a" * 50 + "b" * 50, most=20)
      'aaaaaaaaaa … bbbbbbbbbb'
    """
    if len(message) > most:
        message = f"{message[: most // 2]} … {message[-most // 2 :]}"
    return printable(message)


def markdown_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[bool] | None = None,
) -> str:
    """Returns a Markdown table that also reads well as plain text.

    Floats are shown with three decimals.

    Args:
      header: names of the columns.
      rows: cells of each row, one per column; None leaves a cell empty.
      right: whether each column is aligned to the right; by default those with a number
        are.

    Example:
      >>> print(markdown_table(["merge", "accuracy"], [["ties", 0.5], ["awd", None]]))
      | merge | accuracy |
      |:------|---------:|
      | ties  |    0.500 |
      | awd   |          |
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    if right is None:
        right = [
            any(isinstance(row[i], int | float) for row in rows)
            for i in range(len(header))
        ]

    def line(values):
        padded = (
            value.rjust(width) if is_right else value.ljust(width)
            for value, width, is_right in zip(values, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rules = (
        "-" * (width + 1) + ":" if is_right else ":" + "-" * (width + 1)
        for width, is_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(header), f"|{'|'.join(rules)}|", *map(line, cells)])


def _cell(value):
    if value is None:
        return ""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return printable(text).replace("\n", "\\n")
