"""Tables of what was measured beside what a paper prints.

The printed numbers of a script stand once, as tables in its docstring, which `--help`
shows and `published` and `published_by_column` read. A table is indented, its cells are
separated by two or more spaces, its first line names the columns, and an empty line
ends it:

    method       coefficient  ViT-B-32     ViT-B-16
    Pre-trained  -            47.3 / -     54.5 / -
    Ours         1.0          84.2 / 97.2  87.5 / 98.4
    Ours         searched     84.5 / 97.6  -

The first columns name a row. A value is a number, `-` where the paper has none, or
several of either with ` / ` between them. Brackets around numbers mean something to the
reader alone.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import runs
from jaxarith import report

Value = float | str | None


def published(
    text: str | None, *keys: str, value: Callable[[str], Any] | None = None
) -> dict[Any, tuple]:
    """The values of a paper by row, from a table in a docstring.

    Args:
      text: the docstring.
      keys: the names of the first columns, by which the table is found and which name a
        row; whole numbers in them are read as numbers, and `-` as nothing.
      value: from the text of a cell to its value; by default numbers are read.

    Returns:
      By the key of a row (a tuple where there are several), all its values in order.

    Raises:
      ValueError: not exactly one table has these columns, or a row cannot be read.

    Example:
      >>> text = '''Published, absolute / normalised accuracy:
      ...
      ...     method     coefficient  accuracy     seconds
      ...     Linear FT  1            55.4 / 61.7  3
      ...     Linear FT  searched     74.3 / -     -
      ... '''
      >>> published(text, "method", "coefficient")["Linear FT", 1]
      (55.4, 61.7, 3)
      >>> published(text, "method", "coefficient")["Linear FT", "searched"]
      (74.3, None, None)
    """
    _, rows = _table(text, keys)
    return _even(
        {
            key: tuple(x for cell in cells for x in _values(cell, value))
            for key, cells in rows.items()
        }
    )


def published_by_column(
    text: str | None, *keys: str, value: Callable[[str], Any] | None = None
) -> dict[Any, tuple]:
    """The values of a paper by column and row; arguments and errors as for `published`.

    Returns:
      By the name of a column and the key of a row, in one tuple, the values of the
      cell. A cell that is `-` as a whole has no entry.

    Example:
      >>> text = '''
      ...     method  ViT-B-32     ViT-B-16
      ...     MTL     87.8 / -     -
      ...     Ours    84.5 / 97.6  87.6 / 98.5
      ... '''
      >>> found = published_by_column(text, "method")
      >>> found["ViT-B-32", "MTL"], found["ViT-B-16", "Ours"], len(found)
      ((87.8, None), (87.6, 98.5), 3)
    """
    columns, rows = _table(text, keys)
    return _even(
        {
            (column, *(key if isinstance(key, tuple) else (key,))): _values(cell, value)
            for key, cells in rows.items()
            for column, cell in zip(columns, cells, strict=True)
            if cell != "-"
        }
    )


def beside(
    rows: Sequence[Mapping[str, Any]],
    published: Mapping[Any, Sequence[Value]],
    *,
    keys: Sequence[str],
    values: Sequence[str],
    published_keys: Sequence[str] | None = None,
) -> list[dict]:
    """The rows with the published values, `"<value>, published"`, beside ours.

    Args:
      rows: plain data; every row has the keys, and those of the values that exist.
      published: by the key of a row (a tuple where there are several keys), the paper's
        values in the order of `values`; a row without an entry has none.
      keys: the fields that name a row.
      values: the fields that are measured.
      published_keys: those of the keys that `published` has; by default all.

    Raises:
      ValueError: an entry of `published` has another number of values.

    Example:
      >>> rows = [{"method": "linear", "abs": 73.9}]
      >>> beside(rows, {"linear": [74.3]}, keys=["method"], values=["abs"])
      [{'method': 'linear', 'abs': 73.9, 'abs, published': 74.3}]
    """
    found = []
    for row in rows:
        key = tuple(row[name] for name in published_keys or keys)
        theirs = published.get(key[0] if len(key) == 1 else key, [None] * len(values))
        if len(theirs) != len(values):
            raise ValueError(f"{len(theirs)} published values of {key} for {values}.")
        both = {name: row[name] for name in keys}
        for name, value in zip(values, theirs, strict=True):
            both |= {name: row.get(name)}
            if f"{name} ±" in row:  # of several seeds
                both |= {f"{name} ±": row[f"{name} ±"]}
            both |= {f"{name}, published": value}
        found.append(both)
    return found


def markdown(rows: Sequence[Mapping[str, Any]], digits: int = 1) -> str:
    """Rows of the same fields as a Markdown table, without columns that are empty.

    Example:
      >>> print(markdown([{"method": "linear", "abs": 73.94, "norm": None}]))
      | method |  abs |
      |:-------|-----:|
      | linear | 73.9 |
    """
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [[_cell(row[name], digits) for name in names] for row in rows]
    numeric = [
        all(isinstance(row[name], int | float | None) for row in rows) for name in names
    ]
    return report.markdown_table(names, cells, right=numeric)


def compared(
    out: Path,
    title: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    published: Mapping[Any, Sequence[Value]],
    *,
    keys: Sequence[str],
    values: Sequence[str],
    published_keys: Sequence[str] | None = None,
    digits: int = 1,
    results: Mapping[str, Any] | None = None,
    note: str = "",
) -> dict:
    """The end of a script with one table: `beside`, `markdown` and `write`.

    Args:
      out, title: as for `write`.
      caption: caption of the table.
      rows, published, keys, values, published_keys: as for `beside`.
      digits: as for `markdown`.
      results: what report.json holds besides the rows.
      note: as for `write`.

    Returns:
      What report.json holds.
    """
    both = beside(
        rows, published, keys=keys, values=values, published_keys=published_keys
    )
    found = {"rows": list(rows)} | dict(results or {})
    return write(out, title, {caption: both}, found, note, digits=digits)


def write(
    out: Path,
    title: str,
    tables: Mapping[str, str | Sequence[Mapping[str, Any]]],
    results: dict,
    note: str = "",
    *,
    digits: int = 1,
) -> dict:
    """Writes report.json and report.md, and prints the latter; of several processes the
    first does. A last line names task vectors that were not trained here.

    Args:
      out: the folder.
      title: title of report.md.
      tables: by their captions rows, see `markdown`, or tables in Markdown.
      results: what report.json holds, as plain data.
      note: what a reader of the tables must know.
      digits: digits of the rows, as for `markdown`.

    Returns:
      The results.
    """
    if not runs.is_first():
        return results
    parts = [f"# {title}"]
    for caption, table in tables.items():
        parts += [caption, table if isinstance(table, str) else markdown(table, digits)]
    parts += filter(None, [note, runs.external(out)])
    text = "\n\n".join(parts) + "\n"
    report.write_json(out / "report.json", results)
    report.write_text(out / "report.md", text)
    print(f"\n{text}\n{out}")
    return results


def _table(text, keys):
    """The names of the other columns, and by key the cells of every row."""
    lines = [_split(line) for line in (text or "").splitlines()]
    heads = [i for i, cells in enumerate(lines) if cells[: len(keys)] == list(keys)]
    if len(heads) != 1:
        raise ValueError(
            f"{len(heads)} tables of the docstring begin with the columns {keys}; "
            "expected one, with two or more spaces between the columns."
        )
    names, rows = lines[heads[0]], {}
    for cells in itertools.takewhile(bool, lines[heads[0] + 1 :]):
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, {cells}, in the columns {names}.")
        key = tuple(_key(cell) for cell in cells[: len(keys)])
        key = key[0] if len(keys) == 1 else key
        if key in rows:
            raise ValueError(f"the row {key} stands twice in the table.")
        rows[key] = cells[len(keys) :]
    return [_key(name) for name in names[len(keys) :]], rows


def _split(line):
    return re.split(r" {2,}", line.strip()) if line.strip() else []


def _key(cell):
    return int(cell) if cell.isdecimal() else "" if cell == "-" else cell


def _values(cell, value):
    if value is not None:
        return (value(cell),)
    return tuple(_number(part) for part in cell.strip("()").split(" / "))


def _number(text):
    text = text.strip()
    if text == "-":
        return None
    if re.fullmatch(r"[<>] ?[\d.e]+", text):  # a bound
        return text
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{text!r} in a published table is no number.") from None


def _even(found):
    if len({len(values) for values in found.values()}) > 1:
        raise ValueError(f"rows with different numbers of values: {found}.")
    return found


def _cell(value, digits):
    return f"{value:.{digits}f}" if isinstance(value, float) else value
