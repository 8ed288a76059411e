"""Rows of `jvp_cost`, compiled and timed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.bench import measure
from experiments.bench.jvp_steps import MANY


class Compiled(NamedTuple):
    """A row that is ready to run, how long that took, and what XLA counts of it."""

    run: Callable
    seconds: float
    flops: float
    temporary_bytes: int | None


class Theirs(NamedTuple):
    """A row in PyTorch.

    Attributes:
      eager: the row.
      compiled: the same by `torch.compile`, if it works.
      compile_seconds: seconds of the first call of `compiled`.
      peak_bytes: `peak_bytes(function)`, what a call needs beyond what it starts with
        and what it returns; None where the system does not tell it.
    """

    eager: Callable
    compiled: Callable | None
    compile_seconds: float | None
    peak_bytes: Callable[[Callable], int | None]


def compile_row(name: str, function: Callable, args: tuple) -> Compiled:
    """Compiles a row of `jvp_steps.steps`."""
    if name == MANY[1]:  # several calls of one program
        params, taus, *inputs = args
        jvp = lambda *args: function(args[0], [args[1]], *args[2:])[0]  # noqa: E731
        one = compile_row("", jvp, (params, taus[0], *inputs))
        run = functools.partial(function, *args)
        flops = len(taus) * one.flops
        return Compiled(run, one.seconds, flops, one.temporary_bytes)
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    took = time.perf_counter() - begin
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Compiled(
        functools.partial(compiled, *args),
        took,
        (costs or {})["flops"],
        memory.temp_size_in_bytes if memory else None,
    )


def timed(
    ours: Mapping[str, Compiled], theirs: Mapping[str, Theirs], repetitions: int
) -> list[dict]:
    """Runs all rows in turn, A B A B, and returns them as plain data.

    Args:
      ours: rows by name.
      theirs: the rows that PyTorch has too.
      repetitions: runs that count, after one that does not.
    """
    functions = {("jaxarith", name): row.run for name, row in ours.items()}
    functions |= {("eager", name): row.eager for name, row in theirs.items()}
    functions |= {
        ("compiled", name): row.compiled
        for name, row in theirs.items()
        if row.compiled is not None
    }
    total = len(functions) * (1 + repetitions)
    with tqdm(total=total, unit="run", leave=False) as bar:
        times = measure.alternated(functions, repetitions, bar.update)
    return [
        _row(name, row, theirs.get(name), lambda form, name=name: times[form, name])
        for name, row in ours.items()
    ]


def _row(name, row, other, runs_of):
    runs = runs_of("jaxarith")
    found = {
        "row": name,
        **spread(runs),
        "compile_seconds": row.seconds,
        "flops": row.flops,
        "temporary_bytes": row.temporary_bytes,
        "runs": runs,
        "eager": None,
        "compiled": None,
        "torch_over_jaxarith": None,
    }
    if other is None:
        return found
    found["eager"] = _theirs(runs_of("eager"), other.peak_bytes(other.eager))
    if other.compiled is not None:
        peak = other.peak_bytes(other.compiled)
        found["compiled"] = _theirs(runs_of("compiled"), peak)
        found["compiled"]["compile_seconds"] = other.compile_seconds
    forms = [found[form]["seconds"] for form in ("eager", "compiled") if found[form]]
    return found | {"torch_over_jaxarith": min(forms) / found["seconds"]}


def _theirs(runs, peak):
    return spread(runs) | {"peak_bytes": peak, "runs": runs}


def spread(runs: Sequence[float]) -> dict[str, float]:
    """Median, shortest and longest of some runs.

    Example:
      >>> spread([3.0, 1.0, 2.0])
      {'seconds': 2.0, 'shortest': 1.0, 'longest': 3.0}
    """
    median = float(np.median(runs))
    return {"seconds": median, "shortest": min(runs), "longest": max(runs)}


def with_ratios(rows: Sequence[dict], batch: int, tokens: int) -> list[dict]:
    """Rows of one batch, over its ordinary step, and what they do in a second.

    Args:
      rows: what `timed` returned.
      batch: samples of a step.
      tokens: tokens of a sample.
    """
    base = next((row for row in rows if row["row"] == "ordinary step"), None)

    def over(row, key):
        return row[key] / base[key] if base else None

    return [
        row
        | {
            "ratio": over(row, "seconds"),
            "flop_ratio": over(row, "flops"),
            "samples_per_second": batch / row["seconds"],
            "tokens_per_second": batch * tokens / row["seconds"],
        }
        for row in rows
    ]
