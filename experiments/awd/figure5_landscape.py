"""Figure 5: the joint loss of two tasks on the plane of their vectors.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: Section 4.6.

    python -m experiments.awd.figure5_landscape --data-dir DATA
    python -m experiments.awd.figure5_landscape --pairs mnist,svhn --out runs/figure5

The figure shows L_i + L_j, mean cross entropies on test data, at θ0 + a τ_i + b τ_j.
The second panel uses the vectors after AWD, which has disentangled those of all tasks.

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, as plots only, for ViT-B/32: RESISC45 with Cars, and SUN397 with DTD, where
"disentangled task vectors [...] exhibit a more expansive low-loss basin". The paper
states neither the grid nor the samples; here they are 21 × 21 points on [-0.5, 1.5]²
and 2048 samples of each task.
"""

import dataclasses

import numpy as np
import optax
from tqdm import tqdm

from experiments.awd import disentangled, solving
from experiments.common import runs, script, tables
from experiments.common.vision import options, setups, vectors
from jaxarith import plots, task_vectors
from jaxarith.evaluate import landscape
from jaxarith.models import heads

PAIRS = ("resisc45,stanford_cars", "sun397,dtd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, options.OneModel):
    tasks: tuple[str, ...] = disentangled.TASKS
    pairs: tuple[str, ...] = PAIRS
    """Pairs of tasks, each TASK,TASK."""
    alpha: float = 1e-4
    """α of AWD; use the value that `table1_addition` has found."""
    low: float = -0.5
    """Smallest coefficient of both vectors."""
    high: float = 1.5
    """Largest coefficient of both vectors."""
    points: int = 21
    """Number of coefficients of each vector."""
    loss_samples: int = 2048
    """Number of test samples of each task, drawn with a fixed seed."""


def check(config: Config):
    """Raises a ValueError if a pair is not two of the tasks."""
    names = [spec.partition("=")[0] for spec in config.tasks]
    for pair in config.pairs:
        own = pair.split(",")
        if len(own) != 2 or own[0] == own[1] or not set(own) <= set(names):
            raise ValueError(
                f"--pairs {pair}: expected two of the tasks {names}, with a comma "
                "between them."
            )


def joint_loss(setup: setups.Setup, taus, grid: np.ndarray, samples: int) -> np.ndarray:
    """Returns the sum of both tasks' mean losses at coefficients `[n, m, 2]`."""
    total = np.zeros(grid.shape[:-1])
    for task in setup.tasks:

        def loss(features, labels, head=task.test.head):
            logits = heads.logits(head, features)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

        batches = setups.drawn(setup, task.test, samples).batches
        model = (setup.apply_fn, loss, setup.params_0, taus, batches, grid)
        total += landscape.losses(*model, mesh=setup.mesh)
    return total


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, pairs=("mnist,uci_digits",), points=3)
    check(config)
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    taus = vectors.vectors(setup, "nonlinear")
    parts = disentangled.disentangled(setup.params_0, taus, config, alpha=config.alpha)
    both = {"task vectors": taus, "disentangled": parts}
    coefs = np.linspace(config.low, config.high, config.points)
    grid = np.stack(np.meshgrid(coefs, coefs, indexing="ij"), axis=-1)
    grids, rows = [], []
    for pair in tqdm(config.pairs, desc="planes", unit="pair"):
        indices = [setup.names.index(name) for name in pair.split(",")]
        two = setup._replace(tasks=[setup.tasks[i] for i in indices])
        panels = {
            name: joint_loss(two, [own[i] for i in indices], grid, config.loss_samples)
            for name, own in both.items()
        }
        own = {name: panel.tolist() for name, panel in panels.items()}
        grids.append({"pair": pair, "coefs": coefs.tolist()} | own)
        for name, panel in panels.items():
            lowest = np.unravel_index(np.nanargmin(panel), panel.shape)
            row = {"pair": pair, "vectors": name, "lowest loss": float(panel[lowest])}
            at = {
                t.name: float(coefs[i]) for t, i in zip(two.tasks, lowest, strict=True)
            }
            text = ", ".join(f"{task} {coef:.2f}" for task, coef in at.items())
            rows.append(row | {"at": text})
        if runs.is_first():
            first, second = two.titles
            points = {"pre-trained": (0, 0), first: (1, 0), second: (0, 1)}
            points["both"] = (1, 1)
            plots.landscape(
                config.out / f"figure5_{'_'.join(two.names)}.png",
                panels,
                (coefs.tolist(), coefs.tolist()),
                points,
                x=f"coefficient of {first}",
                y=f"coefficient of {second}",
                value=f"loss of {first} + loss of {second}",
            )
    beside = disentangled.beside_sum(taus, task_vectors.add(parts))
    results = {"grids": grids, "rows": rows, "merged": beside}
    caption = f"{setup.title}: the lowest joint loss on the grid, and its place."
    title = "Joint losses of two tasks (AWD paper, Figure 5)"
    shown = {
        caption: rows,
        "AWD's vector for all tasks at λ = 1, beside the plain sum.": [beside],
    }
    return tables.write(config.out, title, shown, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
