"""What `jvp_cost` aims at and reports."""

from experiments.bench import measure
from jaxarith import report

TASKS = 8


def part_name(paradigm: str) -> str:
    return f"linearised, paradigm ({paradigm})"


def goals(rows: list[dict], with_torch: bool) -> list[dict]:
    """The goals of the project for ViT-B/32 on a CPU, and what was reached."""
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
    goal("paradigm (1) over ordinary", "seconds", part_name("1"), ordinary, 1.35)
    many, separate = f"{TASKS} tangents by jvps", f"{TASKS} JVPs"
    goal("jvps over separate JVPs", "seconds", many, separate, 0.85)
    for step in (ordinary, linear):
        remat = f"{step}, remat"
        goal(f"{remat}: memory saved", "temporary_bytes", step, remat, 4, least=True)
        goal(f"{remat}: time", "seconds", remat, step, 1.35)
    for row in rows:
        if with_torch and row["torch_over_jaxarith"]:
            what = f"{row['row']}: PyTorch's faster time over ours"
            found.append(measure.goal(what, row["torch_over_jaxarith"], 1.0))
    return found


HEADER = ["row", "s", "shortest to longest", "over ordinary", "GFLOP"]
HEADER += ["over ordinary", "temporary MB", "compile s", "samples/s"]
HEADER += ["PyTorch s", "torch.compile s", "faster PyTorch / ours"]


def table(rows) -> str:
    def cells(row):
        bytes_ = row["temporary_bytes"]
        return [
            *(row["row"], row["seconds"]),
            f"{row['shortest']:.3f} to {row['longest']:.3f}",
            *(row["ratio"], row["flops"] / 1e9, row["flop_ratio"]),
            *(None if bytes_ is None else bytes_ / 1e6, row["compile_seconds"]),
            *(row["samples_per_second"], row["torch_seconds"]),
            *(row["torch_compile_seconds"], row["torch_over_jaxarith"]),
        ]

    return report.markdown_table(HEADER, [cells(row) for row in rows])
