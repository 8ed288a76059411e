"""Reads text files that options of scripts name: tasks, prompts, rows to keep."""

import csv
import dataclasses
import functools
import io
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxarith import files, report
from jaxarith.data import prompts, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all scripts that read text files."""

    encoding: str = "utf-8-sig"
    """Encoding of the files, for example latin-1. No other is tried."""
    skip_bad: bool = False
    """Leave out malformed lines, and count them in a warning."""


def task_files(option: str) -> tuple[str, list[Path]]:
    """Returns the name and the files of a task.

    Raises:
      ValueError: the option has no name, no file, or more than three files.

    Example:
      >>> task_files("trec=a.txt,b.txt")
      ('trec', [PosixPath('a.txt'), PosixPath('b.txt')])
    """
    name, equals, given = option.partition("=")
    paths = [Path(file) for file in given.split(",") if file]
    if not (name and equals and 1 <= len(paths) <= 3):
        raise ValueError(
            f"task {option!r}: expected NAME=FILE, NAME=TRAIN,TEST or "
            "NAME=TRAIN,VALIDATION,TEST."
        )
    return name, paths


def read_task(option: str, options: Options) -> text.TextTask:
    """Reads the files of a task; parts without a file come from the training file.

    Args:
      option: see `task_files`.
      options: how the files are read.
    """
    name, paths = task_files(option)
    train, *others = [
        text.read(path, encoding=options.encoding, skip_bad=options.skip_bad)
        for path in paths
    ]
    validation, test = [None] * (2 - len(others)) + others
    return text.task(name, train, validation, test)


def read_prompt(option: str) -> tuple[str, prompts.Prompt]:
    """Returns the name of the task and the prompt of a --prompt option.

    Raises:
      ValueError: the option is not NAME=TEMPLATE|CLASS:WORD,CLASS:WORD.

    Example:
      >>> read_prompt("mr={text} It was {mask}.|0:terrible,1:great")[1].words
      {'0': 'terrible', '1': 'great'}
    """
    name, equals, rest = option.partition("=")
    template, bar, words = rest.rpartition("|")
    # Split at the last colon: the name of a class may have one.
    pairs = [pair.rpartition(":") for pair in words.split(",")]
    if not (name and equals and bar and all(c and word for c, _, word in pairs)):
        raise ValueError(
            f"--prompt {option!r}: expected NAME=TEMPLATE|CLASS:WORD,CLASS:WORD, for "
            "example 'mr={text} It was {mask}.|0:terrible,1:great'."
        )
    words = {label.strip(): word.strip() for label, _, word in pairs}
    return name, prompts.Prompt(template, words)


def read(file: Path) -> str:
    """Reads a text file.

    Raises:
      ValueError: the file does not exist, or is not UTF-8.
    """
    if not file.exists():
        raise ValueError(f"{file}: no such file. Check the path.")
    raw = files.read(file)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file} is not text in UTF-8: line {line}, {error.reason}. Convert it to "
            "UTF-8."
        ) from error


def read_table(file: Path, columns: Sequence[str] = ()) -> list[dict]:
    """Reads the rows of a .csv with a header, or the objects of JSON lines.

    Args:
      file: a .csv; with any other suffix a file of JSON lines.
      columns: fields that every row must have.

    Raises:
      ValueError: the file does not exist, a line is not a JSON object, or a row lacks a
        column.
    """
    content = read(file)
    if file.suffix.lower() == ".csv":
        rows = _csv(file, content)
    else:
        lines = [pair for pair in enumerate(content.split("\n"), 1) if pair[1].strip()]
        rows = [(number, _object(file, number, line)) for number, line in lines]
    for number, row in rows:
        if missing := sorted(set(columns) - row.keys()):
            raise ValueError(
                f"{file}, line {number} has no column {' and no '.join(missing)}; the "
                f"columns are {report.listed(list(row))}. Rename or add them."
            )
    return [row for _, row in rows]


def _csv(file, content) -> list[tuple[int, dict]]:
    """Returns (line number, row) pairs of a .csv; cells may have any length."""
    before = csv.field_size_limit(max(len(content), 1))
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        names = reader.fieldnames or []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{file} has the column {report.listed(twice)} twice. Rename one."
            )
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(before)
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"{file}, line {line} has more or fewer cells than the header; "
                f"expected {len(names)}."
            )
    return rows


def _object(file, number, line) -> dict:
    try:
        row = files.parse_json(line, unique=True)
    except ValueError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{file}, line {number} is {report.cut(row)}; expected a JSON object."
        )
    return row


def condition(keep: str) -> tuple[str, Callable[[str], bool]]:
    """Returns the column that `--keep` names, and a function `kept(value) -> bool`.

    Raises:
      ValueError: expected COLUMN>NUMBER, COLUMN<NUMBER or COLUMN=VALUE,VALUE.

    Example:
      >>> column, kept = condition("class=0,1")
      >>> column, kept("1"), kept("2")
      ('class', True, False)
      >>> condition("toxicity>0.8")[1]("0.8")
      False
    """
    for sign, kept in ((">", operator.gt), ("<", operator.lt)):
        column, found, number = keep.partition(sign)
        if found and column:
            try:
                bound = float(number)
            except ValueError:
                continue
            return column, functools.partial(_compared, kept, bound)
    column, equals, values = keep.partition("=")
    if column and equals and values:
        return column, lambda value: value in values.split(",")
    raise ValueError(
        f"--keep {keep!r}: expected COLUMN>NUMBER or COLUMN<NUMBER, for example "
        "'toxicity>0.8', or COLUMN=VALUE,VALUE, for example 'class=0,1'."
    )


def _compared(kept, bound, value):
    return kept(float(value), bound)


def kept_texts(file: Path, keep: str, column: str = "text") -> list[str]:
    """Reads the texts of a file that match `keep`, in order, without blank ones.

    Args:
      file: a .csv or .jsonl file; with any other suffix, each line is a text.
      keep: the rows of a .csv or .jsonl to keep, see `condition`.
      column: the column that holds the texts.

    Raises:
      ValueError: the file does not exist, lacks a column, or has no matching text.
    """
    if file.suffix.lower() in (".csv", ".jsonl"):
        tested, kept = condition(keep)
        rows = read_table(file, (column, tested))
        try:
            lines = [row[column] for row in rows if kept(str(row[tested]))]
        except ValueError as error:
            raise ValueError(f"{file}: --keep {keep!r}: {error}.") from error
    else:
        lines = read(file).split("\n")
    texts = [line.strip() for line in lines if line and line.strip()]
    if not texts:
        raise ValueError(
            f"no text of {file} is kept: it is empty, or no row matches --keep "
            f"{keep!r}. Check the file and --keep."
        )
    return texts
