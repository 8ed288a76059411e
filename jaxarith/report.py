"""Reports: JSON and Markdown files from plain rows, written whole or not at all."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes plain data as JSON; numbers must be finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def listed(names: Sequence[Any], most: int = 8) -> str:
    """Names for a message: the first of many, and how many more there are.

    Example:
      >>> listed("abc", most=2)
      'a, b and 1 more'
    """
    shown = ", ".join(map(str, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def cut(value: Any, most: int = 80) -> str:
    """What a value is, for a message: the first characters of a long one.

    Example:
      >>> cut(list(range(100)), most=10)
      '[0, 1, 2, …'
    """
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def markdown_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[bool] | None = None,
) -> str:
    """A Markdown table that also reads well as plain text.

    Floats are shown with three decimals.

    Args:
      header: the names of the columns.
      rows: their cells.
      right: which columns are aligned to the right; by default those with a number.

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
    return f"{value:.3f}" if isinstance(value, float) else str(value)
