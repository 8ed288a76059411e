"""What the penalty of curvature costs: to collect, to compute, and in a step.

XLA's counts of compiled programs of an encoder of `encoders`; nothing is run, unless
--repetitions asks for seconds. Steps are a loss and its gradient, without an optimizer.

    python -m experiments.bench.curvature --out runs/curvature_cost --model vit-b-16
    python -m experiments.bench.curvature --out runs/curvature_cost --repetitions 5

The penalty is computed once in a step, whatever the batch, its tokens and the number of
tasks. The code of Porrello et al. (2026) writes it as tr(B W A Wᵀ) for automatic
differentiation, which takes about 3.5 times the products; with --repetitions that is
timed in PyTorch on the same matrices.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
from tqdm import tqdm

from experiments.bench import encoders, factors, jvp_rows, measure
from experiments.bench.curvature_rows import ALONE, programs, released_penalty, sketched
from experiments.bench.jvp_steps import DType
from experiments.common import script

UNTIMED: dict[str, float | None] = {"seconds": None, "shortest": None, "longest": None}
LIMITS = {
    "vit-b-32": 1.12,
    "vit-b-16": 1.03,
    "vit-l-14": 1.03,
}  # over a linearised step


@dataclasses.dataclass(frozen=True)
class Config:
    """Count what the penalty of curvature costs."""

    out: Path
    """Folder for report.json and report.md."""
    model: encoders.Name = "vit-b-32"
    batch: int = 128
    """Samples of a step; at least 8, of which cyclic τJp takes an eighth more."""
    dtype: DType = "float32"
    """Of weights, inputs and products; factors are in float32."""
    rank: int = 16
    """Rows of the sketch."""
    repetitions: int = 0
    """Timed runs of each program; 0 for none."""
    torch: bool = True
    """Whether the released penalty is timed in PyTorch too."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""
    goals: bool = False
    """Whether to print what was aimed at, and what was reached."""


@script.full_precision
def main(config: Config) -> dict:
    """Counts, prints and writes; returns what `report.json` holds."""
    if config.batch < 8 or min(config.rank, config.repetitions) < 0:
        raise ValueError(
            f"--batch {config.batch} --rank {config.rank} --repetitions "
            f"{config.repetitions}; a batch of at least 8, and a rank and repetitions "
            "of at least 0 are needed."
        )
    if config.layers is not None and config.layers < 1:
        raise ValueError(f"--layers {config.layers}; at least 1 is needed.")
    encoder = encoders.encoder(config.model, config.layers)
    compiled, functions, others = {}, {}, {}
    rows_of = programs(
        encoder, batch=config.batch, dtype=config.dtype, rank=config.rank
    )
    for name, (function, shapes) in tqdm(
        rows_of.items(), desc="compile", unit="program"
    ):
        compiled[name] = jax.jit(function).lower(*shapes).compile()
        if config.repetitions:
            functions[name] = functools.partial(compiled[name], *factors.filled(shapes))
    if config.repetitions and config.torch:
        if importlib.util.find_spec("torch") is None:
            raise ValueError("PyTorch is not installed; install it, or add --no-torch.")
        _, (tau, measured) = rows_of[ALONE]
        name = "released penalty, PyTorch"
        functions[name] = released_penalty(
            factors.filled(tau), factors.filled(measured)
        )
    times = {}
    if functions:
        with measure.watched() as others:
            times = measure.alternated(functions, config.repetitions)
    seconds = {name: jvp_rows.spread(each) for name, each in times.items()}
    counts = {name: row.cost_analysis()["flops"] for name, row in compiled.items()}
    base = "linearised step"
    rows = [
        {
            "program": name,
            "GFLOP": counts[name] / 1e9 if name in counts else None,
            "over a linearised step": (
                counts[name] / counts[base] if name in counts else None
            ),
            **seconds.get(name, UNTIMED),
        }
        for name in {**counts, **seconds}
    ]
    row = sketched(config.rank)
    ratio = counts[row] / counts[base]
    # The limits are those of whole models.
    limit = LIMITS.get(config.model) if config.layers is None else None
    what = f"{row[2:]}, over a linearised step, FLOPs"
    goals = []
    if config.goals and limit is not None:
        goals.append(measure.goal(what, ratio, limit, least=False))
    where = measure.machine() | others | {"model": config.model, "batch": config.batch}
    where |= {"dtype": config.dtype}
    return measure.write(
        config.out,
        "What the penalty of curvature costs",
        [measure.named(where), *map(measure.table, filter(None, (rows, goals)))],
        {"machine": where, "rows": rows, "goals": goals},
    )


if __name__ == "__main__":
    script.run(Config, main)
