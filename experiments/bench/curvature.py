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
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import encoders, factors, jvp_rows, measure
from experiments.bench.jvp_steps import DType
from experiments.common import script
from jaxarith import curvature, losses, tangent, tau_jp, tree
from jaxarith.curvature import matrices, passes
from jaxarith.curvature.collect import whole_samples
from jaxarith.typing import Tree

CLASSES = 100
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


def programs(config: Config, encoder: encoders.Encoder) -> dict[str, tuple]:
    """Every row's function and the shapes of its arguments."""
    sample = encoder.make_inputs(np.random.default_rng(0), 1)

    def shape(leaf, *sizes):
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(sizes, config.dtype if is_real else leaf.dtype)

    def batch(size):
        return tuple(shape(leaf, size, *leaf.shape[1:]) for leaf in sample)

    layout = jax.tree.map(lambda leaf: shape(leaf, *leaf.shape), encoder.layout)
    own, others = batch(config.batch), batch(config.batch // 8)
    width = jax.eval_shape(encoder.apply_fn, layout, *own).shape[-1]
    head = jax.ShapeDtypeStruct((CLASSES, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
    measured = factors.shapes(encoder, batch(1), config.rank)
    plain = dataclasses.replace(measured, sketch={})

    def loss(features, head, labels):
        features = features.astype(jnp.float32)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return losses.cross_entropy(100 * features @ head.T, labels)

    def linearized(tau, params, head, labels, inputs):
        f0, moved = tangent.jvp(encoder.apply_fn, params, tau, *inputs)
        return loss(f0 + moved, head, labels)

    def cyclic(tau, params, head, labels, inputs, others):
        outputs, penalty = tau_jp.linearized_and_penalty(
            encoder.apply_fn, params, tau, inputs, others
        )
        return loss(outputs, head, labels) + 0.1 * penalty

    def curved(tau, params, head, labels, inputs, measured):
        task = jax.grad(linearized)(tau, params, head, labels, inputs)
        slope = jax.grad(curvature.penalty)(tau, measured)
        return jax.tree.map(lambda g, s: g + (0.1 * s).astype(g.dtype), task, slope)

    plan = passes.Plan(
        layers=measured.layers,
        diagonal=tuple(measured.diagonal),
        statistics=whole_samples,
        probes=1,
        chunk=1,
    )

    def collected(params, inputs):
        rows = inputs, {}, jnp.ones(1, bool), jnp.zeros(1, jnp.int32)
        key = jax.random.key(0)
        return passes.chunk_sums(encoder.apply_fn, plan, params, key, None, rows)[0]

    step = layout, layout, head, labels, own
    return {
        "linearised step": (jax.grad(linearized), step),
        "+ cyclic τJp": (jax.grad(cyclic), (*step, others)),
        "+ factors": (curved, (*step, plain)),
        f"+ factors and a sketch of {config.rank}": (curved, (*step, measured)),
        "gradient of the penalty alone": (
            jax.grad(curvature.penalty),
            (layout, measured),
        ),
        "collection, one sample": (collected, (layout, batch(1))),
    }


def released_penalty(tau: Tree, measured: curvature.Factors, device: str = "cpu"):
    """tr(B W A Wᵀ) of all layers and its gradient by PyTorch's automatic one.

    Args:
      tau: a task vector.
      measured: the factors.
      device: device, as PyTorch calls it.
    """
    import torch

    def tensor(x):
        return torch.tensor(np.asarray(x, np.float32), device=device)

    leaves = tree.flatten(tau)
    parts = [
        (
            tensor(matrices.matrix(layer, leaves)).T.contiguous().requires_grad_(),
            tensor(measured.inputs[layer.name][0]),
            tensor(measured.outputs[layer.name][0]),
        )
        for layer in measured.layers
    ]

    def run():
        terms = [torch.trace(b @ w @ a @ w.T) for w, a, b in parts]
        total = torch.stack(terms).sum()
        slopes = torch.autograd.grad(total, [w for w, _, _ in parts])
        if device == "cuda":
            torch.cuda.synchronize()
        return slopes

    return run


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
    for name, (function, shapes) in tqdm(
        programs(config, encoder).items(), desc="compile", unit="program"
    ):
        compiled[name] = jax.jit(function).lower(*shapes).compile()
        if config.repetitions:
            functions[name] = functools.partial(compiled[name], *factors.filled(shapes))
    if config.repetitions and config.torch:
        if importlib.util.find_spec("torch") is None:
            raise ValueError("PyTorch is not installed; install it, or add --no-torch.")
        _, (tau, measured) = programs(config, encoder)["gradient of the penalty alone"]
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
    sketched = f"+ factors and a sketch of {config.rank}"
    ratio = counts[sketched] / counts[base]
    # The limits are those of whole models.
    limit = LIMITS.get(config.model) if config.layers is None else None
    what = f"{sketched[2:]}, over a linearised step, FLOPs"
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
