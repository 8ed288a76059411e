"""Tables of measured values beside the published ones.

The published numbers of a script are written once, as tables in its docstring. `--help`
shows them; `published` and `published_by_column` read them. A table is indented. Two or
more spaces separate its cells. Its first line names the columns, and an empty line ends
it:

    method       coefficient  ViT-B-32     ViT-B-16
    Pre-trained  -            47.3 / -     54.5 / -
    Ours         1.0          84.2 / 97.2  87.5 / 98.4
    Ours         searched     84.5 / 97.6  -

The first columns name a row. A value is a number, `-` if the paper has none, or several
of either with ` / ` between them. Brackets around numbers are for the reader and are
ignored.
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
    """Reads the values of a paper from a table in a docstring, row by row.

    Args:
      text: the docstring.
      keys: names of the first columns. They identify the table, and their cells name a
        row; whole numbers in them are read as numbers, and `-` as "".
      value: function from the text of a cell to its value; by default cells are read as
        numbers.

    Returns:
      A dict from the key of a row (a tuple if there are several keys) to all values of
      the row, in order.

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
    """Reads the values of a paper by column and row.

    Arguments and errors are those of `published`.

    Returns:
      A dict from (name of a column, key of a row) to the values of the cell. A cell
      that is only `-` has no entry.

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
    """Returns the rows with the published values, `"<value>, published"`, beside ours.

    Args:
      rows: plain data; every row has all keys, and the values that were measured.
      published: dict from the key of a row (a tuple if there are several keys) to the
        paper's values, in the order of `values`. Rows without an entry have none.
      keys: the fields that name a row.
      values: the fields that are measured.
      published_keys: the keys that `published` uses; by default all.

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
            raise ValueError(
                f"{key} has {len(theirs)} published values; expected {len(values)}, "
                f"for {values}."
            )
        both = {name: row[name] for name in keys}
        for name, value in zip(values, theirs, strict=True):
            both |= {name: row.get(name)}
            if f"{name} ±" in row:  # of several seeds
                both |= {f"{name} ±": row[f"{name} ±"]}
            both |= {f"{name}, published": value}
        found.append(both)
    return found


def markdown(rows: Sequence[Mapping[str, Any]], digits: int = 1) -> str:
    """Returns rows with the same fields as a Markdown table, without empty columns.

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
    """Writes the report of a script with one table: `beside`, then `write`.

    Args:
      out, title: as for `write`.
      caption: caption of the table.
      rows, published, keys, values, published_keys: as for `beside`.
      digits: as for `markdown`.
      results: further entries of report.json.
      note: as for `write`.

    Returns:
      The content of report.json.
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
    """Writes report.json and report.md, and prints the latter.

    Only the first of several processes does. A last line names the task vectors that
    were not trained here.

    Args:
      out: the folder.
      title: title of report.md.
      tables: dict from a caption to rows, see `markdown`, or to a table in Markdown.
      results: content of report.json, as plain data.
      note: a note below the tables.
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
    """Returns the names of the other columns, and the cells of every row by its key."""
    lines = [_split(line) for line in (text or "").splitlines()]
    heads = [i for i, cells in enumerate(lines) if cells[: len(keys)] == list(keys)]
    if len(heads) != 1:
        raise ValueError(
            f"{len(heads)} tables of the docstring begin with the columns {keys}; "
            "expected one. Separate columns by two or more spaces."
        )
    names, rows = lines[heads[0]], {}
    for cells in itertools.takewhile(bool, lines[heads[0] + 1 :]):
        if len(cells) != len(names):
            raise ValueError(
                f"a row has {len(cells)} cells, {cells}; expected {len(names)}, one "
                f"for each of the columns {names}."
            )
        key = tuple(_key(cell) for cell in cells[: len(keys)])
        key = key[0] if len(keys) == 1 else key
        if key in rows:
            raise ValueError(f"the table has the row {key} twice; remove one.")
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
        raise ValueError(
            f"a published table has {text!r}; expected a number or -."
        ) from None


def _even(found):
    if len({len(values) for values in found.values()}) > 1:
        raise ValueError(
            f"the rows have different numbers of values: {found}. All rows need "
            "equally many."
        )
    return found


def _cell(value, digits):
    return f"{value:.{digits}f}" if isinstance(value, float) else value
