"""Tables over several seeds (`--seeds`): mean and spread of every number.

A seed sets the order of samples and the random draws of penalties. The vectors of all
seeds train side by side.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.common.vision.options import Seeded
from experiments.common.vision.setups import Setup, each


def rows(
    options: Seeded, rows_of: Callable[[Setup], list[dict]], *, control: bool = True
) -> list[dict]:
    """Returns the rows of all models in turn; each row is the mean over the seeds.

    Args:
      options: options of the script.
      rows_of: function from the setup of a model and a seed to its rows.
      control: as for `setups.load`.
    """
    found = []
    for setup in each(options, options.models, control=control):
        # The setup with all seeds comes first: it trains the vectors of all of them.
        runs = [rows_of(own) for own in (setup, *setups(setup)[1:])]
        found += averaged(runs) if len(runs) > 1 else runs[0]
    return found


def setups(setup: Setup) -> list[Setup]:
    """Returns the setup of each seed."""
    options = setup.options
    if not isinstance(options, Seeded):
        return [setup]
    numbers = range(options.seed, options.seed + options.seeds)
    own = [dataclasses.replace(options, seed=seed, seeds=1) for seed in numbers]
    return [setup._replace(options=one) for one in own]


def suffix(seed: int) -> str:
    """Returns the ending of a method's folder for a seed; "" for seed 0.

    Example:
      >>> suffix(0), suffix(2)
      ('', '_seed_2')
    """
    return f"_seed_{seed}" if seed else ""


def averaged(runs: Sequence[Sequence[dict]]) -> list[dict]:
    """Combines the rows of several seeds into one table.

    Args:
      runs: the same rows for each seed.

    Returns:
      Rows with the means of numbers. The field "n ±" has the sample standard deviation
      of the field "n". A number that one seed lacks has no mean. Different words are
      joined by "/".

    Example:
      >>> averaged([[{"abs": 70.0, "kept": "yes"}], [{"abs": 72.0, "kept": "no"}]])
      [{'abs': 71.0, 'abs ±': 1.4142135623730951, 'kept': 'yes/no'}]
    """
    return [_merged(list(same)) for same in zip(*runs, strict=True)]


def _merged(rows: list[dict]) -> dict:
    merged: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        merged[name] = _mean(values)
        if isinstance(merged[name], float):
            merged[f"{name} ±"] = statistics.stdev(values)
    return merged


def _mean(values: list) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return _merged(values)
    if isinstance(first, list):
        return [_mean(list(same)) for same in zip(*values, strict=True)]
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        return statistics.fmean(values)
    if any(x is None for x in values):
        return None
    return "/".join(dict.fromkeys(map(str, values)))
