"""Saves scores while they are computed, so that a restarted run reuses them."""

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
    """Returns the score of every row of coefficients; reuses scores from a file.

    Equal rows are scored once. The file must be in a folder that all processes see.

    Args:
      file: a JSON file; it is written again after every call of `score`.
      of: everything the scores depend on besides the rows, as plain data. A file with
        another `of` is ignored.
      rows: coefficients `[n, K]`.
      score: function from rows `[m, K]` to their scores `[m]`.
      together: the largest m.
      resume: whether to read the file.

    Returns:
      The scores, `f64[n]`.
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
