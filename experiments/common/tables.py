"""Tables that show what was measured beside what a paper prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import runs
from jaxarith import report


def beside(
    rows: Sequence[Mapping[str, Any]],
    published: Mapping[Any, Sequence[float | str | None]],
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
            both |= {name: row.get(name), f"{name}, published": value}
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


def _cell(value, digits):
    return f"{value:.{digits}f}" if isinstance(value, float) else value


def write(out: Path, title: str, tables: Mapping[str, str], results: dict, note=""):
    """Writes report.json and report.md, and prints the latter; of several processes the
    first does.

    Args:
      out: the folder.
      title: of report.md.
      tables: Markdown tables by their captions.
      results: what report.json holds, as plain data.
      note: what a reader of the tables must know.
    """
    if not runs.is_first():
        return
    parts = [f"# {title}"]
    for caption, table in tables.items():
        parts += [caption, table]
    text = "\n\n".join([*parts, *([note] if note else [])]) + "\n"
    report.write_json(out / "report.json", results)
    report.write_text(out / "report.md", text)
    print(f"\n{text}\n{out}")
