"""Scores that are kept as they are found: a second start does not find them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxarith import files, report
from jaxarith.sharding import processes


def scored(
    file: Path,
    of: dict[str, Any],
    rows: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    *,
    together: int,
    resume: bool = True,
) -> np.ndarray:
    """The score of every row of coefficients, from a file as far as it has them.

    Rows that are equal are scored once. The file is in the folder of a run, which all
    processes see.

    Args:
      file: a JSON file; it is written anew after every call of `score`.
      of: what the scores depend on besides the rows, as plain data; a file with
        something else is not read.
      rows: coefficients `[n, K]`.
      score: from rows `[m, K]` to their scores `[m]`.
      together: the largest m.
      resume: whether the file is read.

    Returns:
      `f64[n]`.
    """
    content = files.read_json(file) if resume and file.exists() else {}
    known = content["scores"] if content.get("of") == of else {}
    by_name = {json.dumps(row.tolist()): row for row in rows}
    missing = [name for name in by_name if name not in known]
    for first in range(0, len(missing), together):
        part = missing[first : first + together]
        found = score(np.array([by_name[name] for name in part]))
        known |= dict(zip(part, map(float, found), strict=True))
        content = {"of": of, "scores": known}
        processes.on_first(lambda content=content: _write(file, content))
    return np.array([known[json.dumps(row.tolist())] for row in rows])


def _write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(file, content)
