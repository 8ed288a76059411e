"""What tangent-space training costs, beside ordinary training and beside PyTorch.

Random weights and inputs of an encoder's true sizes. A step is a loss and its gradient,
without an optimizer. The loss is that of a frozen head of 100 classes on features,
also for language models: what they do besides, the logits of every word, is not in any
row (`encoders`). Every row runs in turn with all others, A B A B; medians, shortest and
longest times are reported. PyTorch runs in eager mode and by `torch.compile`, on every
row where that works. Before anything is timed, the outputs and gradients of the two
libraries are compared. Needs the `bench` extra, or `--no-torch`.

    python -m experiments.bench.jvp_cost --out runs/jvp_cost
    python -m experiments.bench.jvp_cost --model gpt2 --batch 2 4 8 --length 64 128 \\
        --rows "ordinary step" "linearised step" --out runs/jvp_cost_gpt2
    python -m experiments.bench.jvp_cost --model vit-l-14 --batch 128 --device gpu \\
        --dtype bfloat16 --out runs/jvp_cost_l

The tiny model is for trying the script: its numbers say nothing.

Ortiz-Jimenez et al. (2023) for the linearised step; Yoshida et al. (2025) for the
penalty, whose cyclic, mixed and strict forms take batch/8, batch/8 and batch samples of
8 other tasks; Porrello et al. (2026) for the penalty of curvature, by Kronecker factors
without a sketch, which costs the same at every batch; Jin et al. (2025) for the parts
that partial fine-tuning trains.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.bench import encoders, jvp_report, jvp_rows, measure
from experiments.bench.jvp_steps import (
    MANY,
    PENALTY_COEF,
    TASKS,
    DType,
    Point,
    Work,
    prepare,
    steps,
)
from experiments.common import script
from jaxarith import tangent, task_vectors

LINEAR, ROUNDED = "linearised step", "linearised step, products in bfloat16"


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md and cost.png."""
    model: encoders.Name = "vit-b-32"
    """The encoder, at its published size."""
    batch: tuple[int, ...] = (16,)
    """Samples of a step, one or several numbers; at least 8, of which the penalty takes
    an eighth more."""
    length: tuple[int, ...] = ()
    """Tokens of a text, one or several numbers; 128 by default."""
    dtype: DType = "float32"
    """Of weights, inputs and products, in both libraries."""
    device: Literal["cpu", "gpu"] = "cpu"
    torch: bool = True
    """Whether to run PyTorch too."""
    compile: bool = True
    """Whether to try torch.compile on every row of PyTorch's."""
    rows: tuple[str, ...] = ()
    """Measure only these rows; all by default."""
    repetitions: int = 3
    """Runs of each row that count, after one that does not."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""
    goals: bool = False
    """Whether to print the project's goals for ViT-B/32 on a CPU, and what was
    reached. PyTorch's time is that of the faster of its eager and compiled forms."""


def rounding(work: Work, ours: dict[str, jvp_rows.Compiled]) -> dict:
    """How far products in bfloat16 move the linearised logits and the gradient."""

    @functools.partial(jax.jit, static_argnums=0)
    def logits(product_dtype, params, tau, *inputs):
        outputs, moved = tangent.jvp(
            work.encoder.apply_fn, params, tau, *inputs, product_dtype=product_dtype
        )
        return work.logits(outputs + moved), work.logits(outputs)

    args = work.params, work.taus[0], *work.inputs
    (exact, start), (rounded, _) = logits(None, *args), logits(jnp.bfloat16, *args)
    gradient, rounded_gradient = (ours[name].run() for name in (LINEAR, ROUNDED))
    difference = jax.tree.map(jnp.subtract, rounded_gradient, gradient)
    return {
        "largest move of a logit by tau": float(jnp.max(jnp.abs(exact - start))),
        "largest error of a logit": float(jnp.max(jnp.abs(rounded - exact))),
        "relative error of the gradient": float(
            task_vectors.norm(difference) / task_vectors.norm(gradient)
        ),
    }


def measure_point(config: Config, point: Point) -> tuple[list[dict], dict]:
    """All rows of one batch and length, and what was checked of them."""
    many = not config.rows or set(config.rows) & set(MANY)
    work = prepare(point, TASKS if many else 1)
    chosen = steps(work)
    known = [*chosen, *(name for name in MANY if name not in chosen)]
    if unknown := set(config.rows) - set(known):
        raise ValueError(
            f"unknown rows {sorted(unknown)}; the rows are {', '.join(known)}."
        )
    names = list(config.rows or chosen)
    bar = tqdm(names, desc="compile", unit="row")
    ours = {name: jvp_rows.compile_row(name, *chosen[name]) for name in bar}
    theirs, checks = {}, {}
    if config.torch:
        from experiments.bench import torch_tangent

        theirs, checks = torch_tangent.compared_rows(
            torch_tangent.steps(
                work, torch_tangent.device_of(config.device), point.dtype, PENALTY_COEF
            ),
            {name: row.run for name, row in ours.items()},
            point.dtype,
            config.compile,
        )
    if set(names) >= {LINEAR, ROUNDED}:
        checks["products in bfloat16"] = rounding(work, ours)
    tokens = work.encoder.tokens
    rows = jvp_rows.with_ratios(
        jvp_rows.timed(ours, theirs, config.repetitions), point.batch, tokens
    )
    sizes = {"batch": point.batch, "length": point.length or tokens}
    return [sizes | row for row in rows], checks


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    if not config.batch or min(config.batch) < 8:
        raise ValueError(
            f"a batch of {config.batch}; at least 8 are needed, of which the penalty "
            "takes an eighth."
        )
    if config.torch and not importlib.util.find_spec("torch"):
        raise ImportError(
            "PyTorch is not installed: pip install -e '.[bench]', or give --no-torch."
        )
    points = [
        Point(config.model, batch, length, config.dtype, config.layers)
        for length in config.length or (None,)
        for batch in config.batch
    ]
    # What is compiled is timed, so none is kept from an earlier run.
    jax.config.update("jax_enable_compilation_cache", False)
    for point in points:  # before any work
        encoders.encoder(point.model, point.layers, point.length)
    device = jax.devices(config.device)[0]
    rows, checks, goals = [], {}, []
    with (
        jax.default_device(device),
        jax.default_matmul_precision("float32"),
        measure.watched() as others,
    ):
        for point in points:
            found, checked = measure_point(config, point)
            rows += found
            goals += jvp_report.goals(found, config.torch) if config.goals else []
            several = f", batch {point.batch}, length {point.length}"
            where = several if len(points) > 1 else ""
            checks |= {f"{kind}{where}": values for kind, values in checked.items()}
    machine = measure.machine() | others | {"device": device.device_kind}
    machine |= {"model": config.model, "dtype": config.dtype, "layers": config.layers}
    machine |= {"batch": list(config.batch), "length": list(config.length)}
    if config.torch:
        import torch

        machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results = {"machine": machine, "rows": rows, "checks": checks, "goals": goals}
    parts = jvp_report.parts_of(results, with_goals=config.goals)
    measure.write(config.out, "What a tangent costs", parts, results)
    jvp_report.figure(config.out / "cost.png", rows)
    return results


if __name__ == "__main__":
    script.run(Config, main)
