"""Table 6: the strict τJp penalty against the cyclic one, in accuracy and in time.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025, App. C.

    python -m experiments.tau_jp.table6_strict --out runs/table6 --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used. The
mixed penalty is ours: every step has samples of all other tasks, at the cost of the
cyclic penalty.

Published, mean absolute / normalised test accuracy in percent, and seconds per
iteration on four V100; "No reg." is Linear FT:

    method         coefficient  ViT-B-32
    No reg.        searched     74.3 / 85.0
    Cyclical reg.  searched     84.5 / 97.6
    Strict reg.    searched     86.4 / 99.3

    penalty        s/it
    No reg.        0.361
    Cyclical reg.  0.374
    Strict reg.    2.027

Our seconds are for one training step of one task on the available devices, without
reading images. They are medians; steps of all kinds are timed in turn. FLOPs are XLA's.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.bench import measure
from experiments.common import script, tables
from experiments.common.vision import objectives, options, scores, setups, vectors
from jaxarith import sharding, train
from jaxarith.models import heads

METHODS: dict[str, vectors.Method] = {
    "No reg.": "linear",
    "Cyclical reg.": "tau_jp_cyclic",
    "Mixed reg. (ours)": "tau_jp_mixed",
    "Strict reg.": "tau_jp_strict",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")
SECONDS = {name: x for name, (x,) in tables.published(__doc__, "penalty").items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    repetitions: int = 20
    """Number of timed steps of every method."""


def step_of(setup: setups.Setup, method: str):
    """Compiles a training step of the first task on its first batch.

    Returns:
      A function without arguments that takes a step, and XLA's FLOPs of a step.
    """
    task, mesh = setup.tasks[0], sharding.for_tasks(setup.mesh, 1)
    config = vectors.recipe_of(setup, method, task)
    others = vectors.others_of(setup, method, task)
    [batch] = train.task_batches(
        [task.train],
        dataclasses.replace(config, steps=1, warmup_steps=0),
        names=[task.name],
        others=[[other.train for other in others]],
        augment=setup.augment,
        mesh=mesh,
    )
    batch = sharding.from_local_rows(batch, mesh)
    constants = heads.pad([task.test.head])
    constants = sharding.put(constants, NamedSharding(mesh, P("task")))
    params_0 = sharding.shard(setup.params_0, mesh)
    objective = train.objective(setup.trained_fn, objectives.loss, config, mesh=mesh)
    state = train.init_state(params_0, config, 1, mesh)
    step: Any = train.make_step(objective, config, mesh)
    compiled = step.lower(state, params_0, batch, constants).compile()

    def once():
        nonlocal state  # a step donates its buffers, so the new state must replace it
        state, found = compiled(state, params_0, batch, constants)
        return found

    return once, compiled.cost_analysis()["flops"]


def timed(setup: setups.Setup, repetitions: int) -> list[dict]:
    """Returns seconds and FLOPs per step of every method, and their ratios."""
    steps = {name: step_of(setup, method) for name, method in METHODS.items()}
    times = measure.alternated({n: step for n, (step, _) in steps.items()}, repetitions)
    base = np.median(times["No reg."]), steps["No reg."][1]
    return [
        {
            "method": name,
            "s/step": float(np.median(times[name])),
            "ratio": float(np.median(np.divide(times[name], times["No reg."]))),
            "GFLOP": flops / 1e9,
            "ratio of FLOPs": flops / base[1],
            "s/it, published": SECONDS.get(name),
            "ratio, published": SECONDS[name] / SECONDS["No reg."]
            if name in SECONDS
            else None,
        }
        for name, (_, flops) in steps.items()
    ]


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    setup = setups.load(config, config.model)
    rows = scores.linearized_rows(setup, METHODS)
    seconds = timed(setup, 3 if config.smoke else config.repetitions)
    beside = tables.beside(
        rows,
        PUBLISHED,
        keys=["model", "method", "coefficient"],
        values=["abs", "norm"],
    )
    batch = f"a batch of {config.batch_size}, {max(config.batch_size // 8, 1)} of each"
    results = {"rows": rows, "seconds": seconds, "machine": measure.machine()}
    return tables.write(
        config.out,
        "Strict and cyclic regularisation (τJp paper, Table 6)",
        {
            "Mean absolute and normalised test accuracy, percent.": tables.markdown(
                beside
            ),
            f"Time of a step: {batch} kind of penalty samples, {setup.title}, "
            f"{jax.devices()[0].device_kind}.": tables.markdown(seconds, digits=3),
        },
        results,
    )


if __name__ == "__main__":
    script.run(Config, main)
