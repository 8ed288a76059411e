"""The goals, tables and figures of `jvp_cost`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.bench import measure
from experiments.bench.jvp_steps import MANY, linearized_part
from jaxarith import plots, report


def goals(rows: Sequence[dict], with_torch: bool) -> list[dict]:
    """Returns the project's goals for ViT-B/32 on a CPU, and what was reached."""
    by_name = {row["row"]: row for row in rows}
    found = []

    def goal(what, key, above, below, limit, *, least=False):
        if above in by_name and below in by_name:
            high, low = by_name[above][key], by_name[below][key]
            if high and low:
                found.append(measure.goal(what, high / low, limit, least=least))

    linear, ordinary = "linearised step", "ordinary step"
    goal("linearised over ordinary", "seconds", linear, ordinary, 1.75)
    goal("linearised over ordinary, FLOPs", "flops", linear, ordinary, 1.68)
    for mode, limit in {"cyclic": 1.2, "mixed": 1.2, "strict": 2.15}.items():
        goal(f"{mode} over linearised", "seconds", f"+ {mode} τJp", linear, limit)
    part = linearized_part("1")
    goal(f"{part}, over ordinary", "seconds", part, ordinary, 1.35)
    goal("jvps over separate JVPs", "seconds", *MANY, 0.85)
    for step in (ordinary, linear):
        remat = f"{step}, remat"
        goal(f"{remat}: memory saved", "temporary_bytes", step, remat, 4, least=True)
        goal(f"{remat}: time", "seconds", remat, step, 1.35)
    for row in rows:
        if with_torch and row["torch_over_jaxarith"]:
            what = f"{row['row']}: PyTorch's faster time over ours"
            found.append(measure.goal(what, row["torch_over_jaxarith"], 1.0))
    return found


def cost_table(rows: Sequence[dict]) -> str:
    """Returns the table of what a tangent costs: seconds, FLOPs and memory by row."""
    sizes = _sizes(rows)
    header = [*sizes, "row", "s", "shortest to longest", "over ordinary", "GFLOP"]
    header += ["over ordinary", "temporary MB", "compile s", "samples/s", "tokens/s"]

    def cells(row):
        return [
            *(row[size] for size in sizes),
            *(row["row"], row["seconds"], _range(row), row["ratio"]),
            *(row["flops"] / 1e9, row["flop_ratio"], _mb(row["temporary_bytes"])),
            *(row["compile_seconds"], row["samples_per_second"]),
            round(row["tokens_per_second"]),
        ]

    return report.markdown_table(header, [cells(row) for row in rows])


def torch_table(rows: Sequence[dict]) -> str:
    """Returns the table of rows that PyTorch has too: eager and compiled."""
    sizes = _sizes(rows)
    header = [*sizes, "row", "s", "eager s", "shortest to longest", "torch.compile s"]
    header += ["shortest to longest", "faster PyTorch / ours", "temporary MB"]
    header += ["eager peak MB", "torch.compile peak MB", "torch.compile's first call s"]

    def cells(row):
        eager, compiled = row["eager"], row["compiled"] or {}
        return [
            *(row[size] for size in sizes),
            *(row["row"], row["seconds"], eager["seconds"], _range(eager)),
            *(compiled.get("seconds"), _range(compiled), row["torch_over_jaxarith"]),
            *(_mb(row["temporary_bytes"]), _mb(eager["peak_bytes"])),
            *(_mb(compiled.get("peak_bytes")), compiled.get("compile_seconds")),
        ]

    beside = [row for row in rows if row["eager"]]
    return report.markdown_table(header, [cells(row) for row in beside])


def parts_of(results: dict, *, with_goals: bool) -> list[str]:
    """Returns the paragraphs and tables of the report.

    Args:
      results: the content of report.json.
      with_goals: whether to report the goals.
    """
    rows, machine = results["rows"], results["machine"]
    parts = [measure.named(machine), cost_table(rows)]
    if any(row["eager"] for row in rows):
        parts.append(torch_table(rows))
    if with_goals:
        names = ["goal", "reached", "limit", "met"]
        parts.append(measure.table(results["goals"], names))
    parts += [f"{kind}: {measure.named(x)}" for kind, x in results["checks"].items()]
    if small := trial(machine):
        parts.append(small)
    return parts


def trial(machine: dict) -> str:
    """Returns a note about a tiny or shortened model; empty for other models."""
    if machine["model"] != "tiny" and machine["layers"] is None:
        return ""
    return (
        "A tiny or shortened model is for trying the script: its cost says nothing "
        "about a whole model."
    )


def _sizes(rows):
    """Returns which of model, dtype, batch and length differ between rows."""
    names = ("model", "dtype", "batch", "length")
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def _range(row):
    return f"{row['shortest']:.3f} to {row['longest']:.3f}" if row else None


def _mb(count):
    return None if count is None else count / 1e6


def figure(path: Path, rows: Sequence[dict]):
    """Draws cost.png: seconds by row, or how they grow with batch and length."""
    sizes, names = _sizes(rows), list(dict.fromkeys(row["row"] for row in rows))
    if not sizes:
        groups = {"jaxarith": [row["seconds"] for row in rows]}
        for form, label in (("eager", "PyTorch"), ("compiled", "torch.compile")):
            if any(row[form] for row in rows):
                groups[label] = [(row[form] or NONE)["seconds"] for row in rows]
        plots.horizontal_bars(path, groups, names, x="seconds")
        return
    axis, *other = sizes
    lines: dict[str, list] = {}
    for row in rows:
        label = ", ".join([row["row"], *(f"{row[name]} tokens" for name in other)])
        lines.setdefault(label, []).append(row["runs"])
    places = list(dict.fromkeys(row[axis] for row in rows))
    x = {"batch": "samples of a step", "length": "tokens of a text"}[axis]
    plots.repeated(path, places, lines, {}, x=x, y="seconds of a step")


NONE = {"seconds": np.nan}
