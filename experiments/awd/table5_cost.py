"""Table 5: time and memory of 1000 steps of AWD.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: Section 7.2.

    python -m experiments.awd.table5_cost
    python -m experiments.awd.table5_cost --models ViT-B-32 --solvers adam

The script needs neither data nor models, because the cost depends only on shapes. It
draws random vectors with a common part, in the shapes of the blocks' linear weights.

Published, eight tasks on an NVIDIA A100 40GB:

    model     seconds  GB
    ViT-B-32  142.0    3.76
    ViT-L-14  463.0    5.04

The paper states neither its optimizer nor what its memory includes; eight float32
vectors of ViT-L/14 alone are 9.7 GB. "gradient_descent" runs Algorithm 1 on the Gram
matrix: the same steps, in eight variables. "momentum" does so too. "adam" takes its
steps in the space of the weights, with automatic differentiation. With `--scope row`
there are eight variables for every row of a weight.

Seconds are measured on the second of two calls, for the whole merge; compilation has
its own column. Memory is XLA's plan for the merge as one program: its arguments (the
vectors and the model), results and temporaries.
"""

import dataclasses
import functools
import time
from typing import Literal

import jax
from tqdm import tqdm

from experiments.bench import measure
from experiments.common import runs, script, tables
from jaxarith import merge, tree
from jaxarith.merge.awd import Scope
from jaxarith.typing import Tree

# (number of layers, width, width of the MLP)
SHAPES = {"ViT-B-32": (12, 768, 3072), "ViT-L-14": (24, 1024, 4096)}
PUBLISHED = tables.published(__doc__, "model")
SMOKE = (2, 16, 32)
Solver = Literal["gradient_descent", "momentum", "adam"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.Options):
    models: tuple[Literal["ViT-B-32", "ViT-L-14"], ...] = ("ViT-B-32", "ViT-L-14")
    """Models whose shapes are used."""
    solvers: tuple[Solver, ...] = ("gradient_descent", "adam")
    """Solvers: on the Gram matrix (gradient_descent, momentum), or in the space of the
    weights (adam)."""
    scope: Scope = "global"
    """The part that shares one redundant vector, see `jaxarith.merge.awd`."""
    vectors: int = 8
    """Number of task vectors."""
    steps: int = 1000
    """Number of steps of the solver."""


def drawn(shape: tuple[int, int, int], key: jax.Array) -> Tree:
    """Draws normal weights in the shapes of all linear layers of the blocks."""
    layers, width, hidden = shape
    sizes = {
        f"self_attn/{name}_proj": (width, width) for name in ("q", "k", "v", "out")
    }
    sizes |= {"mlp/fc1": (width, hidden), "mlp/fc2": (hidden, width)}
    found = {}
    for i in range(layers):
        for name, size in sizes.items():
            key, own = jax.random.split(key)
            path = f"vision_model/encoder/layers/{i}/{name}/kernel"
            found[path] = jax.random.normal(own, size)
    return tree.unflatten(found)


def vectors_of(shape: tuple[int, int, int], count: int) -> list[Tree]:
    """Draws task vectors with cosines of 0.2."""
    shared = drawn(shape, jax.random.key(0))
    return [
        jax.tree.map(lambda a, b: 1e-3 * (0.5 * a + b), shared, own)
        for own in (drawn(shape, jax.random.key(1 + i)) for i in range(count))
    ]


def measured(shape, solver: str, config: Config) -> dict:
    """Returns the seconds and gigabytes of one merge."""
    taus = vectors_of(shape, config.vectors)
    params_0 = drawn(shape, jax.random.key(1000))
    # Each solver has its own units; the value does not change the cost.
    step_size = 1e-3 if solver == "adam" else 0.01

    @jax.jit
    def merged(params_0, taus):
        options = {"steps": config.steps, "step_size": step_size}
        options |= {"solver": solver, "scope": config.scope}
        return merge.awd(params_0, taus, **options)

    started = time.perf_counter()
    compiled = merged.lower(params_0, taus).compile()
    compilation = time.perf_counter() - started
    run = functools.partial(compiled, params_0, taus)
    _, seconds = measure.seconds(run), measure.seconds(run)
    plan = compiled.memory_analysis()
    sizes = ("argument", "output", "temp")
    found = [getattr(plan, f"{name}_size_in_bytes") for name in sizes]
    return {
        "parameters": int(sum(x.size for x in jax.tree.leaves(params_0))),
        "seconds": seconds,
        "compilation": compilation,
        "GB": sum(found) / 1e9,
        "GB without arguments": sum(found[1:]) / 1e9,
    }


@script.full_precision
def main(config: Config) -> dict:
    if config.smoke:
        config = dataclasses.replace(config, steps=3, mesh="data=1")
    if config.vectors < 1:
        raise ValueError(f"--vectors {config.vectors}: expected 1 or more.")
    runs.start(config)
    runs.claim(config)
    pairs = [(model, solver) for model in config.models for solver in config.solvers]
    rows = []
    for model, solver in tqdm(pairs, desc="merges", unit="merge"):
        shape = SMOKE if config.smoke else SHAPES[model]
        row = {"model": model, "solver": solver}
        rows.append(row | measured(shape, solver, config))
    device = jax.devices()[0].device_kind
    return tables.compared(
        config.out,
        "The cost of AWD (AWD paper, Table 5)",
        f"{config.steps} steps with {config.vectors} vectors on {device}; published: "
        "1000 steps with 8 on an NVIDIA A100 40GB.",
        rows,
        PUBLISHED,
        keys=["model", "solver", "compilation", "GB without arguments"],
        values=["seconds", "GB"],
        published_keys=["model"],
        digits=3,
        results={"device": device, "steps": config.steps, "vectors": config.vectors},
    )


if __name__ == "__main__":
    script.run(Config, main)
