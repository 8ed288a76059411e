"""What a linearised LoRA step costs beside an ordinary step on all weights.

XLA's counts of compiled steps of CLIP's image encoder: loss and gradient, without the
optimizer. Nothing is run, unless --repetitions asks for seconds.

    python -m experiments.bench.lora_flops --out runs/lora_flops
    python -m experiments.bench.lora_flops --out runs/lora_flops --repetitions 5

Counting products with the kernels, an ordinary step on all weights is 3: forward, and
the gradients of inputs and of kernels. Linearised it is 5: forward, two tangents, two
gradients. With frozen kernels and trained factors the tangents and the gradients of
kernels are not computed, so that a linearised step is 3 as well.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import encoders, measure
from experiments.common import script
from jaxarith import losses, tangent, tree
from jaxarith.models import clip, lora
from jaxarith.typing import ApplyFn

CLASSES = 100
ALPHA = 16
PATTERNS = {
    "all linear layers": clip.BLOCK_LINEAR_WEIGHTS,
    "attention": clip.ATTENTION_WEIGHTS,
}
LIMIT = 1.05  # of a linearised step at the first rank, over the ordinary one


@dataclasses.dataclass(frozen=True)
class Config:
    """Count the FLOPs of LoRA steps, ordinary and linearised."""

    out: Path
    """Folder for report.json and report.md."""
    model: encoders.Vision = "vit-b-32"
    batch: int = 16
    ranks: tuple[int, ...] = (8, 16)
    repetitions: int = 0
    """Timed runs of each step; 0 for none."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""
    goals: bool = False
    """Whether to print what was aimed at, and what was reached."""


def gradient(apply_fn: ApplyFn, linearized: bool) -> Callable:
    """`step(part, params, images, labels, head)`: the gradient in the trained part.

    The part is a task vector where the model is linearised, and else the leaves
    themselves. Were it made of `params` inside, XLA would find equal products.
    """

    def step(part, params, images, labels, head):
        def loss(part):
            if linearized:
                f0, moved = tangent.jvp(apply_fn, params, part, images)
                features = f0 + moved
            else:
                features = apply_fn(tree.update(params, part), images)
            features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
            return losses.cross_entropy(100 * features @ head.T, labels)

        return jax.grad(loss)(part)

    return step


def steps(config: Config, encoder: encoders.Encoder) -> dict[tuple, tuple]:
    """By what is trained and whether linearised: a step, its part, its parameters."""
    params = encoders.random_params(encoder.layout, 0, "float32")
    models = {"all weights": (encoder.apply_fn, params, ".*")}
    apply_fn = lora.adapted(encoder.apply_fn, alpha=ALPHA)
    for rank in config.ranks:
        for where, pattern in PATTERNS.items():
            adapted = lora.init(jax.random.key(0), params, rank=rank, select=pattern)
            for name, trained in (("A, B", lora.FACTORS), ("B", lora.B_FACTORS)):
                row = f"{name} of rank {rank}, {where}"
                models[row] = apply_fn, adapted, trained
    return {
        (row, linearized): (
            gradient(apply_fn, linearized),
            tree.select(params, trained),
            params,
        )
        for row, (apply_fn, params, trained) in models.items()
        for linearized in (False, True)
    }


@script.full_precision
def main(config: Config) -> dict:
    """Counts, prints and writes; returns what `report.json` holds."""
    encoder = encoders.encoder(config.model, config.layers)
    rng = np.random.default_rng(0)
    [images] = encoder.make_inputs(rng, config.batch)
    labels = rng.integers(CLASSES, size=config.batch)
    width = jax.eval_shape(encoder.apply_fn, encoder.layout, images).shape[-1]
    head = rng.standard_normal((CLASSES, width), np.float32)
    compiled, functions = {}, {}
    for name, (step, *args) in tqdm(steps(config, encoder).items(), unit="step"):
        args = *args, images, labels, head
        compiled[name] = jax.jit(step).lower(*args).compile()
        functions[name] = functools.partial(compiled[name], *args)
    seconds = {name: None for name in compiled}
    if config.repetitions:
        times = measure.alternated(functions, config.repetitions)
        seconds = {name: float(np.median(each)) for name, each in times.items()}
    counts = {name: step.cost_analysis()["flops"] for name, step in compiled.items()}
    ordinary = "all weights", False
    rows = [
        {
            "trained": name[0],
            "step": "linearised" if name[1] else "ordinary",
            "GFLOP": counts[name] / 1e9,
            "over ordinary": counts[name] / counts[ordinary],
            "seconds": seconds[name],
        }
        for name in compiled
    ]
    first = f"A, B of rank {config.ranks[0]}, all linear layers"
    ratio = counts[first, True] / counts[ordinary]
    what = f"linearised, {first}, over an ordinary step on all weights, FLOPs"
    goals = [measure.goal(what, ratio, LIMIT, least=False)] if config.goals else []
    where = measure.machine() | {"model": config.model, "batch": config.batch}
    return measure.write(
        config.out,
        "What a linearised LoRA step costs",
        [measure.named(where), *map(measure.table, filter(None, (rows, goals)))],
        {"machine": where, "rows": rows, "goals": goals},
    )


if __name__ == "__main__":
    script.run(Config, main)
