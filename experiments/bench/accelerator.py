"""What is asked of an accelerator, in one command and in a fixed time.

The rows of `jvp_cost` and of `curvature` for CLIP's image encoders and GPT-2, at batch
128, in float32 and bfloat16, beside PyTorch in eager mode and by `torch.compile`:

    pip install -e '.[bench,cuda]'
    python -m experiments.bench.accelerator --out runs/accelerator

Every model and dtype gets its share of the minutes, and takes its rows in the order of
their importance. A row starts only if the longest row so far would still end in time,
so the script stops between rows; what was left out is named, and what failed, with its
error. report.json is written after every row. To try it without an accelerator:

    python -m experiments.bench.accelerator --device cpu --models tiny --batch 8 \\
        --layers 1 --minutes 1 --no-compile --out runs/accelerator_tiny
"""

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from experiments.bench import curvature_rows, encoders, factors, jvp_report, measure
from experiments.bench.curvature_rows import ALONE, COLLECTION
from experiments.bench.jvp_rows import Theirs, compile_row, timed, with_ratios
from experiments.bench.jvp_steps import (
    PENALTY_COEF,
    DType,
    Point,
    Work,
    linearized_part,
    ordinary_part,
    prepare,
    steps,
)
from experiments.common import script
from jaxarith import report

RANK = 16
SKETCHED = curvature_rows.sketched(RANK)
ROWS = ("ordinary step", "linearised step", "+ cyclic τJp", "JVP", "forward")
ROWS += ("+ curvature", ALONE, ordinary_part("1"), linearized_part("1"), SKETCHED)
ROWS += ("linearised step, remat", "ordinary step, remat", "+ strict τJp")
ROWS += (COLLECTION,)
OF_CURVATURE = (ALONE, SKETCHED, COLLECTION)


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json and report.md."""
    models: tuple[encoders.Name, ...] = ("vit-b-32", "gpt2", "vit-b-16", "vit-l-14")
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    batch: int = 128
    minutes: float = 8
    """The time that the script may take."""
    device: Literal["cpu", "gpu"] = "gpu"
    torch: bool = True
    """Whether to run PyTorch too."""
    compile: bool = True
    """Whether to try torch.compile on every row of PyTorch's."""
    rows: tuple[str, ...] = ROWS
    """The rows, the most important first."""
    repetitions: int = 5
    """Runs of each row that count, after one that does not."""
    layers: int | None = None
    """Fewer transformer blocks than the models have, to try the script."""


Measure = Callable[[str], dict]


def case(config: Config, model: encoders.Name, dtype: DType) -> Measure:
    """`measured(row)`: a row of one model and dtype, compiled, compared and timed."""
    point = Point(model, config.batch, None, dtype, config.layers)
    work = prepare(point, tasks=1)
    chosen: dict[str, tuple] = dict(steps(work))
    programs = curvature_rows.programs(
        work.encoder, batch=config.batch, dtype=dtype, rank=RANK
    )
    theirs = beside(config, work, dtype)

    def measured(name):
        if name not in chosen and name not in programs:
            raise ValueError(f"{model} has no such row.")
        if name in OF_CURVATURE:
            function, shapes = programs[name]
            args = factors.filled(shapes)
        else:
            function, args = chosen[name]
        ours = compile_row(name, function, args)
        others, checks = theirs(name, ours, args)
        [row] = timed({name: ours}, others, config.repetitions)
        sizes = {"model": model, "dtype": dtype, "batch": config.batch}
        sizes |= {"length": work.encoder.tokens}
        return sizes | row | {"checks": checks}

    return measured


def beside(config: Config, work: Work, dtype: DType) -> Callable:
    """`theirs(name, ours, args)`: a row of PyTorch, if there is one, and its checks."""
    if not config.torch:
        return lambda name, ours, args: ({}, {})
    from experiments.bench import torch_tangent

    device = torch_tangent.device_of(config.device)
    rows = torch_tangent.steps(work, device, dtype, PENALTY_COEF)

    def theirs(name, ours, args):
        if name == ALONE:
            run = curvature_rows.released_penalty(*args, device=device)
            return {name: Theirs(run, None, None, torch_tangent.peak_bytes)}, {}
        if name not in rows:
            return {}, {}
        return torch_tangent.compared_rows(
            {name: rows[name]}, {name: ours.run}, dtype, config.compile
        )

    return theirs


@dataclasses.dataclass
class Clock:
    """Says whether there is time for another row.

    Attributes:
      end: when the script must have ended, as `time.perf_counter` counts.
      longest: seconds of the longest row so far.
    """

    end: float
    longest: float = 0.0

    def share(self, cases: int) -> float:
        """When the first of several cases must have ended."""
        now = time.perf_counter()
        return now + (self.end - now) / cases

    def has_time(self, deadline: float) -> bool:
        return time.perf_counter() + self.longest < deadline


def run_case(
    names: Sequence[str], start: Callable[[], Measure], clock: Clock, deadline: float
) -> Iterator[tuple[str, dict | str]]:
    """Every row of a case, or why it was left out.

    Args:
      names: the rows.
      start: what makes the case, which takes time and memory too.
      clock: the time of the script.
      deadline: when this case must have ended.
    """
    measured = None
    for name in names:
        if not clock.has_time(deadline):
            yield name, "no time"
            continue
        begin = time.perf_counter()
        try:
            measured = measured or start()
            found = measured(name)
        except Exception as error:  # too little memory, and whatever else
            found = script.one_line(error)[:300]
        clock.longest = max(clock.longest, time.perf_counter() - begin)
        yield name, found


def completed(rows: list[dict]) -> list[dict]:
    """Rows with what they are over the ordinary step of their model and dtype."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["dtype"]), []).append(row)
    return [
        row
        for of_case in cases.values()
        for row in with_ratios(of_case, of_case[0]["batch"], of_case[0]["length"])
    ]


def parts_of(results: dict) -> list[str]:
    """The paragraphs and tables of the report."""
    parts = [measure.named(results["machine"])]
    if rows := results["rows"]:
        parts.append(jvp_report.cost_table(rows))
        if any(row["eager"] for row in rows):
            parts.append(jvp_report.torch_table(rows))
    failed = [row for row in rows if "torch.compile" in row["checks"]]
    parts += [
        f"torch.compile, {row['model']}, {row['dtype']}: "
        f"{measure.named(row['checks']['torch.compile'])}"
        for row in failed
    ]
    if left := results["left_out"]:
        parts += [f"{len(left)} rows were not measured:", measure.table(left)]
    if small := jvp_report.trial(results["machine"]):
        parts.append(small)
    return parts


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    begin = time.perf_counter()
    if config.batch < 8:
        raise ValueError(f"a batch of {config.batch}; at least 8 are needed.")
    if unknown := set(config.rows) - set(ROWS):
        raise ValueError(
            f"unknown rows {sorted(unknown)}; the rows are {', '.join(ROWS)}."
        )
    if config.torch and not importlib.util.find_spec("torch"):
        raise ImportError(
            "PyTorch is not installed: pip install -e '.[bench]', or give --no-torch."
        )
    # Two libraries share the memory; none is to take it all at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What is compiled is timed, so none is kept from an earlier run.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices(config.device)[0]
    machine = measure.machine() | {"device": device.device_kind}
    machine |= {"model": ", ".join(config.models), "layers": config.layers}
    machine |= {"minutes": config.minutes}
    clock = Clock(begin + 60 * config.minutes)
    cases: list[tuple[encoders.Name, DType]] = [
        (model, dtype) for model in config.models for dtype in config.dtypes
    ]
    bar = tqdm(total=len(cases) * len(config.rows), unit="row")
    rows, left_out, results = [], [], {}
    config.out.mkdir(parents=True, exist_ok=True)
    with jax.default_device(device), measure.watched() as others:
        for number, (model, dtype) in enumerate(cases):
            bar.set_postfix_str(f"{model}, {dtype}")
            deadline = clock.share(len(cases) - number)
            start = functools.partial(case, config, model, dtype)
            for name, found in run_case(config.rows, start, clock, deadline):
                if isinstance(found, dict):
                    rows.append(found)
                else:
                    of = {"model": model, "dtype": dtype, "row": name}
                    left_out.append(of | {"why": found})
                results = {"machine": machine, "rows": completed(rows)}
                results |= {"left_out": left_out}
                report.write_json(config.out / "report.json", results)
                bar.update()
    bar.close()
    results["machine"] = machine | others
    results["seconds"] = time.perf_counter() - begin
    title = "On an accelerator"
    return measure.write(config.out, title, parts_of(results), results)


if __name__ == "__main__":
    script.run(Config, main)
