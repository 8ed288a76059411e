"""What `tangent_grid` aims at and reports."""

from collections.abc import Sequence

from experiments.bench import measure
from jaxarith import report

XI_SPEEDUP, SEARCH_SPEEDUP, PRECISION = 30, 10, 1e-5


def goals(rows: Sequence[dict]) -> list[dict]:
    """What was aimed at, and what was reached.

    A shared coefficient asks for no more than the tangent of the sum; the tangents of
    all vectors serve whatever else is asked.
    """
    by_way = {row["cached"]: row for row in rows}
    found = [
        {
            "goal": f"{row['what']}, {row['cached']}: speed-up with its making",
            "reached": f"{row['speedup']:.1f}",
            "limit": f"at least {limit}",
            "met": row["speedup"] >= limit,
        }
        for row, limit in (
            (by_way["tangents of both"], XI_SPEEDUP),
            (by_way["tangent of the sum"], SEARCH_SPEEDUP),
        )
    ]
    worst = max(row["outputs_difference"] for row in rows)
    return [
        *found,
        {
            "goal": "outputs: largest difference over the largest output",
            "reached": f"{worst:.1e}",
            "limit": f"at most {PRECISION}",
            "met": worst <= PRECISION,
        },
    ]


def parts_of(results: dict) -> list[str]:
    """The paragraphs and tables of the report."""
    header = ["found", "from", "outputs", "making s", "using s", "passes s"]
    header += ["speed-up", "once made", "outputs differ", "found differs"]
    cells = [
        [
            *(row["what"], row["cached"], row["outputs"], row["making_seconds"]),
            *(row["using_seconds"], row["forward_seconds"], row["speedup"]),
            *(row["speedup_once_made"], f"{row['outputs_difference']:.1e}"),
            f"{row['found_difference']:.1e}",
        ]
        for row in results["rows"]
    ]
    own, step = results["search_per_task"], results["adamerging"]
    changed = ", ".join(f"{share:.2f}" for share in results["changed"])
    return [
        measure.named(results["machine"]),
        f"Share of predictions that a task's own vector changes: {changed}.",
        report.markdown_table(header, cells),
        f"One coefficient per task from the tangents of all: {own['outputs']} "
        f"outputs in {own['sweeps']} sweeps, {own['using_seconds']:.2f} s after "
        f"{own['making_seconds']:.2f} s for the cache; normalised accuracy "
        f"{own['normalized']:.4f}, with a shared coefficient "
        f"{own['normalized_shared']:.4f}.",
        f"AdaMerging, {step['samples_per_task']} samples of each task: "
        f"{step['seconds_per_step']:.4f} s per step after "
        f"{step['making_seconds']:.2f} s for the cache, with passes "
        f"{step['forward_seconds_per_step']:.4f} s per step; entropies differ by "
        f"{step['entropy_difference']:.1e} at most.",
        *([measure.table(results["goals"])] if results["goals"] else []),
    ]
