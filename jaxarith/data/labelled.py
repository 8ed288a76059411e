"""Parses the lines of a file to records of labelled texts.

Every parser yields `(line, record)`, or `(line, problem)`. The problem is a text that
continues "line 3".
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxarith import files, report, tree

Row = dict[str, str] | str  # a record, or its problem

# Names for the columns of a text, or of a text and its pair. The first that a file has
# are used.
COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("question",),
)
# "surrogateescape" turns bytes that are not in the encoding into these characters.
_UNDECODED = re.compile("[\udc80-\udcff]")


def records(content: str, path: Path) -> list[tuple[int, Row]]:
    """Returns the records of a file, or their problems, with the numbers of lines.

    Args:
      content: the text of the file.
      path: the path of the file; its suffix states the format, see `text.read`.

    Raises:
      ValueError: the file has no columns for label and text, or has a column twice.
    """
    parse = _FORMATS.get(path.suffix.lower(), _labelled_lines)
    return [(line, _checked(row)) for line, row in parse(content, path)]


def _checked(row):
    if isinstance(row, str):
        return row
    if any(map(_UNDECODED.search, row.values())):
        return " has bytes that are not in the encoding."
    fields = {"text", "label", *row}
    missing = [name for name in sorted(fields) if not row.get(name, "").strip()]
    # pandas and JSON write a missing value as NaN.
    if row.get("label", "").lower() == "nan":
        missing.insert(0, "label")
    return f" has no {' and no '.join(missing)}." if missing else row


def _tabs(content, path):
    lines = (
        (number, line.rstrip("\r").split("\t"))
        for number, line in enumerate(content.split("\n"), 1)
    )
    return _table(lines, path)


def _commas(content, path):
    before = csv.field_size_limit(max(len(content), 1))  # the default is 128 KiB
    try:
        return list(_table(_cells(content), path))
    finally:
        csv.field_size_limit(before)


def _cells(content):
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f": {error}."
        else:
            yield reader.line_num, cells


def _table(
    lines: Iterable[tuple[int, list[str] | str]], path: Path
) -> Iterator[tuple[int, Row]]:
    header, columns = [], {}
    for line, cells in lines:
        if isinstance(cells, str):
            yield line, cells
        elif not any(cell.strip() for cell in cells):
            continue
        elif not header:
            header = [cell.strip() for cell in cells]
            columns = _columns(header, path)
        elif len(cells) != len(header):
            count = tree.counted(len(cells), "cell")
            yield line, f" has {count}, but the header has {len(header)}."
        else:
            values = dict(zip(header, cells, strict=True))
            yield line, {f: values[name].strip() for f, name in columns.items()}


def _objects(content, path):
    columns = None
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            values = files.parse_json(text, unique=True)
        except ValueError as error:
            yield line, f" is not JSON: {error}."
            continue
        if not isinstance(values, dict):
            yield line, " is not a JSON object."
            continue
        columns = columns or _columns(list(values), path)
        found = {field: values.get(name) for field, name in columns.items()}
        lists = [field for field, x in found.items() if isinstance(x, list | dict)]
        if lists:
            yield line, f" has a {lists[0]} of {report.cut(found[lists[0]])}."
        else:
            yield line, {f: "" if v is None else str(v) for f, v in found.items()}


def _labelled_lines(content, path):
    del path
    for line, text in enumerate(content.split("\n"), 1):
        if text.strip():
            label, *rest = text.strip().split(maxsplit=1)
            yield line, {"text": "".join(rest), "label": label}


_FORMATS = {".tsv": _tabs, ".csv": _commas}
_FORMATS |= dict.fromkeys((".jsonl", ".json", ".ndjson"), _objects)


def _columns(header: Sequence[str], path: Path) -> dict[str, str]:
    """Returns the column for each field of a record."""
    there = {name for name in header if name}
    if len(there) < sum(map(bool, header)):
        seen: set[str] = set()
        twice = [name for name in header if name in seen or seen.add(name)]
        raise ValueError(
            f"{path} has the column {report.cut(next(filter(None, twice)))} twice. "
            "Rename or remove one of them."
        )
    if "label" in there:
        for names in COLUMNS:
            if there.issuperset(names):
                fields = dict(zip(("text", "text_pair"), names, strict=False))
                return {**fields, "label": "label"}
    known = "; ".join(" and ".join(names) for names in COLUMNS)
    raise ValueError(
        f"{path} has the columns {report.listed([report.cut(x) for x in header])}. It "
        f"needs label, and one of: {known}. Rename its columns. If the file has no "
        "header and `label text` on every line, give it the suffix .txt."
    )
