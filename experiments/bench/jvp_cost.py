"""What tangent-space training costs, beside ordinary training and beside PyTorch.

Random weights and inputs of an encoder's true sizes. A step is a loss and its gradient,
without an optimizer. The loss is that of a frozen head of 100 classes on features, also
for language models: what they do besides, the logits of every word, is not in any row
(`encoders`). Every row runs in turn with all others, A B A B, and medians are reported.
Before anything is timed, the outputs and gradients of the two libraries are compared.
Needs the `bench` extra, or `--no-torch`. The tiny model is for trying the script: its
numbers say nothing.

    python -m experiments.bench.jvp_cost --out runs/jvp_cost
    python -m experiments.bench.jvp_cost --model gpt2 --out runs/jvp_cost_gpt2
    python -m experiments.bench.jvp_cost --model vit-l-14 --batch 128 --device gpu \\
        --dtype bfloat16 --out runs/jvp_cost_l

Ortiz-Jimenez et al. (2023) for the linearised step; Yoshida et al. (2025) for the
penalty, whose cyclic, mixed and strict forms take batch/8, batch/8 and batch samples of
8 other tasks; Porrello et al. (2026) for the penalty of curvature, by Kronecker factors
without a sketch, which costs the same at every batch; Jin et al. (2025) for the parts
that partial fine-tuning trains.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import encoders, factors, jvp_report, measure
from experiments.bench.jvp_report import TASKS, part_name
from experiments.common import script
from jaxarith import (
    curvature,
    losses,
    plots,
    tangent,
    task_vectors,
    tau_jp,
    tree,
)
from jaxarith.typing import Params, Tree

CLASSES = 100
PENALTY_COEF = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md and cost.png."""
    model: encoders.Name = "vit-b-32"
    """The encoder, at its published size."""
    batch: int = 16
    """Samples of a step; at least 8, of which the penalty takes an eighth more."""
    dtype: Literal["float32", "bfloat16"] = "float32"
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


class Work(NamedTuple):
    """What the rows are made of.

    Attributes:
      encoder: the model.
      params, taus: its parameters and 8 directions.
      inputs: arrays `[B, ...]`.
      parts: for every paradigm of partial fine-tuning, its part of a direction.
      penalties: for every kind of penalty, arrays `[P, ...]` of other tasks.
      factors: curvature of other tasks, in float32.
      labels: `[B]`.
      head: `[classes, D]`, rows of length 1.
    """

    encoder: encoders.Encoder
    params: Params
    taus: list[Tree]
    inputs: tuple
    parts: dict[str, Tree]
    penalties: dict[str, tuple]
    factors: curvature.Factors
    labels: jax.Array
    head: jax.Array

    def logits(self, features):
        """Of a frozen head on normalised features, as in CLIP."""
        features = features.astype(jnp.float32)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return 100 * features @ self.head.T

    def loss(self, features):
        return losses.cross_entropy(self.logits(features), self.labels)


def prepare(config: Config) -> Work:
    """Random weights, directions, samples and labels."""
    encoder = encoders.encoder(config.model, config.layers)
    params = encoders.random_params(encoder.layout, 0, config.dtype)
    taus = [encoders.random_tau(params, 1 + task) for task in range(TASKS)]
    rng = np.random.default_rng(0)

    def samples(count):
        arrays = encoder.make_inputs(rng, count)
        cast = lambda x: jnp.asarray(x, config.dtype if x.dtype.kind == "f" else None)  # noqa: E731
        return tuple(map(cast, arrays))

    eighth = config.batch // 8
    inputs = samples(config.batch)
    penalties = {"cyclic": eighth, "mixed": eighth, "strict": TASKS * eighth}
    width = jax.eval_shape(encoder.apply_fn, params, *inputs).shape[-1]
    head = rng.standard_normal((CLASSES, width), np.float32)
    return Work(
        encoder,
        params,
        taus,
        inputs,
        {part_name(p): tree.select(taus[0], w) for p, w in encoder.paradigms.items()},
        {f"+ {mode} τJp": samples(count) for mode, count in penalties.items()},
        factors.filled(factors.shapes(encoder, inputs, 0)),
        jnp.asarray(rng.integers(CLASSES, size=config.batch)),
        jnp.asarray(head / np.linalg.norm(head, axis=-1, keepdims=True)),
    )


def linearized_step(work: Work, apply_fn=None, product_dtype=None) -> Callable:
    """`step(params, tau, *inputs) -> gradient`, forward mode inside reverse mode."""
    apply_fn = apply_fn or work.encoder.apply_fn

    def step(params, tau, *inputs):
        def total(tau):
            outputs, moved = tangent.jvp(
                apply_fn, params, tau, *inputs, product_dtype=product_dtype
            )
            return work.loss(outputs + moved)

        return jax.grad(total)(tau)

    return step


def transposed_step(work: Work) -> Callable:
    """The same by `jax.linearize` and the transpose of its tangent function."""

    def step(params, tau, *inputs):
        apply = lambda params: work.encoder.apply_fn(params, *inputs)  # noqa: E731
        outputs, push_forward = jax.linearize(apply, params)
        slope = jax.grad(work.loss)(outputs + push_forward(tau))
        return jax.linear_transpose(push_forward, params)(slope)[0]

    return step


def penalized_step(work: Work) -> Callable:
    def step(params, tau, inputs, penalty_inputs):
        def total(tau):
            outputs, penalty = tau_jp.linearized_and_penalty(
                work.encoder.apply_fn, params, tau, inputs, penalty_inputs
            )
            return work.loss(outputs) + PENALTY_COEF * penalty

        return jax.grad(total)(tau)

    return step


def curved_step(work: Work) -> Callable:
    """`step(params, tau, measured, *inputs)`: the gradient with that of a penalty."""
    task = linearized_step(work)

    def step(params, tau, measured, *inputs):
        slope = jax.grad(curvature.penalty)(tau, measured)
        return jax.tree.map(
            lambda g, s: g + (PENALTY_COEF * s).astype(g.dtype),
            task(params, tau, *inputs),
            slope,
        )

    return step


def ordinary_step(work: Work, apply_fn: Callable) -> Callable:
    def step(params, *inputs):
        return jax.grad(lambda params: work.loss(apply_fn(params, *inputs)))(params)

    return step


def steps(work: Work) -> dict[str, tuple[Callable, tuple]]:
    """Every row's function and its arguments."""
    encoder, params, tau, inputs = work.encoder, work.params, work.taus[0], work.inputs
    jvp = functools.partial(tangent.jvp, encoder.apply_fn)
    jvps = functools.partial(tangent.jvps, encoder.apply_fn)

    def one_by_one(params, taus, *inputs):
        # Outside one `jit` XLA cannot share what the calls have in common.
        return [compiled_jvp(params, tau, *inputs) for tau in taus]

    def at(tau, params, *inputs):
        return encoder.apply_fn(task_vectors.apply(params, tau), *inputs)

    compiled_jvp = jax.jit(jvp)
    rows = {
        "forward": (encoder.apply_fn, (params, *inputs)),
        "ordinary step": (
            ordinary_step(work, encoder.apply_fn),
            (params, *inputs),
        ),
        "JVP": (jvp, (params, tau, *inputs)),
        "linearised step": (linearized_step(work), (params, tau, *inputs)),
        "linearised step, transposed": (transposed_step(work), (params, tau, *inputs)),
        "linearised step, products in bfloat16": (
            linearized_step(work, product_dtype=jnp.bfloat16),
            (params, tau, *inputs),
        ),
    }
    for name, part in work.parts.items():
        rows[name] = linearized_step(work), (params, part, *inputs)
        rows[f"{name}, ordinary"] = ordinary_step(work, at), (part, params, *inputs)
    for name, penalty_inputs in work.penalties.items():
        rows[name] = penalized_step(work), (params, tau, inputs, penalty_inputs)
    rows["+ curvature"] = curved_step(work), (params, tau, work.factors, *inputs)
    rows[f"{TASKS} tangents by jvps"] = jvps, (params, work.taus, *inputs)
    rows[f"{TASKS} JVPs"] = one_by_one, (params, work.taus, *inputs)
    if remat := encoder.rematerialized:
        rows["ordinary step, remat"] = ordinary_step(work, remat), (params, *inputs)
        rows["linearised step, remat"] = (
            linearized_step(work, remat),
            (params, tau, *inputs),
        )
    return rows


class Compiled(NamedTuple):
    """A row that is ready to run, how long that took, and what XLA counts of it."""

    run: Callable
    seconds: float
    flops: float
    temporary_bytes: int | None


def compile_row(name: str, function: Callable, args: tuple) -> Compiled:
    if name == f"{TASKS} JVPs":  # several calls of one program
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


def rounding(work: Work, ours: dict[str, Compiled]) -> dict:
    """How far products in bfloat16 move the linearised logits and the gradient."""

    @functools.partial(jax.jit, static_argnums=0)
    def logits(product_dtype, params, tau, *inputs):
        outputs, moved = tangent.jvp(
            work.encoder.apply_fn, params, tau, *inputs, product_dtype=product_dtype
        )
        return work.logits(outputs + moved), work.logits(outputs)

    args = work.params, work.taus[0], *work.inputs
    (exact, start), (rounded, _) = logits(None, *args), logits(jnp.bfloat16, *args)
    names = ("linearised step", "linearised step, products in bfloat16")
    gradient, rounded_gradient = (ours[name].run() for name in names)
    difference = jax.tree.map(jnp.subtract, rounded_gradient, gradient)
    return {
        "largest move of a logit by tau": float(jnp.max(jnp.abs(exact - start))),
        "largest error of a logit": float(jnp.max(jnp.abs(rounded - exact))),
        "relative error of the gradient": float(
            task_vectors.norm(difference) / task_vectors.norm(gradient)
        ),
    }


def measure_rows(config: Config, work: Work):
    """All rows, and what else the report holds."""
    chosen = steps(work)
    if unknown := set(config.rows) - set(chosen):
        raise ValueError(
            f"unknown rows {sorted(unknown)}; the rows are {', '.join(chosen)}."
        )
    names = list(config.rows or chosen)
    bar = tqdm(names, desc="compile", unit="row")
    ours = {name: compile_row(name, *chosen[name]) for name in bar}
    functions, checks = {("jaxarith", name): row.run for name, row in ours.items()}, {}
    if config.torch:
        from experiments.bench import torch_tangent

        theirs, checks = torch_tangent.compared_steps(
            work,
            {name: row.run for name, row in ours.items()},
            "cuda" if config.device == "gpu" else "cpu",
            config.dtype,
            PENALTY_COEF,
            config.compile,
        )
        functions |= theirs
    if set(names) >= {"linearised step", "linearised step, products in bfloat16"}:
        checks["products in bfloat16"] = rounding(work, ours)
    with tqdm(total=len(functions) * (1 + config.repetitions), unit="run") as bar:
        times = measure.alternated(functions, config.repetitions, bar.update)
    medians = {key: float(np.median(values)) for key, values in times.items()}
    base = medians.get(("jaxarith", "ordinary step"))
    base_flops = ours["ordinary step"].flops if "ordinary step" in ours else None
    rows = []
    for name, row in ours.items():
        took = medians["jaxarith", name]
        eager = medians.get(("torch", name))
        by_compile = medians.get(("torch.compile", name))
        faster = min((x for x in (eager, by_compile) if x), default=None)
        rows.append(
            {
                "row": name,
                "seconds": took,
                "shortest": min(times["jaxarith", name]),
                "longest": max(times["jaxarith", name]),
                "compile_seconds": row.seconds,
                "ratio": took / base if base else None,
                "flops": row.flops,
                "flop_ratio": row.flops / base_flops if base_flops else None,
                "temporary_bytes": row.temporary_bytes,
                "samples_per_second": config.batch / took,
                "torch_seconds": eager,
                "torch_compile_seconds": by_compile,
                "torch_over_jaxarith": faster / took if faster else None,
                "runs": times["jaxarith", name],
                "torch_runs": times.get(("torch", name)),
            }
        )
    return rows, checks


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    if config.batch < 8:
        raise ValueError(
            f"a batch of {config.batch}; at least 8 are needed, of which the penalty "
            "takes an eighth."
        )
    if config.torch and not importlib.util.find_spec("torch"):
        raise ImportError(
            "PyTorch is not installed: pip install -e '.[bench]', or give --no-torch."
        )
    device = jax.devices(config.device)[0]
    where = measure.machine() | measure.load() | {"device": device.device_kind}
    with jax.default_device(device), jax.default_matmul_precision("float32"):
        work = prepare(config)
        rows, checks = measure_rows(config, work)
    where |= {"model": config.model, "batch": config.batch, "dtype": config.dtype}
    if config.torch:
        import torch

        where |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results = {
        "machine": where,
        "rows": rows,
        "checks": checks,
        "goals": jvp_report.goals(rows, config.torch) if config.goals else [],
    }
    parts = [measure.named(where), jvp_report.table(rows), *measure.unquiet(where)]
    if config.goals:
        names = ["goal", "reached", "limit", "met"]
        parts.append(measure.table(results["goals"], names))
    parts += [f"{kind}: {measure.named(x)}" for kind, x in checks.items()]
    measure.write(config.out, "What a tangent costs", parts, results)
    groups = {"jaxarith": [row["seconds"] for row in rows]}
    if config.torch:
        groups["PyTorch, eager"] = [row["torch_seconds"] or np.nan for row in rows]
    plots.horizontal_bars(
        config.out / "cost.png", groups, [row["row"] for row in rows], x="seconds"
    )
    return results


if __name__ == "__main__":
    script.run(Config, main)
