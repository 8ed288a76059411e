"""Figure 5: the joint loss of two tasks on the plane of their vectors.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: Section 4.6.

    python -m experiments.awd.figure5_landscape --data-dir DATA
    python -m experiments.awd.figure5_landscape --pairs mnist,svhn --out runs/figure5

L_i + L_j, mean cross entropies on test data, at θ0 + a τ_i + b τ_j, and in the second
panel with the vectors that AWD has disentangled of those of all tasks.

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as plots only, of ViT-B/32: RESISC45 with Cars and SUN397 with DTD, where
"disentangled task vectors [...] exhibit a more expansive low-loss basin". The grid and
the samples are not stated; here they are 21 × 21 on [-0.5, 1.5]² and 2048 of each task.
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
    """Pairs of the tasks, with a comma between them."""
    alpha: float = 1e-4
    """α of AWD; take that which `table1_addition` has found."""
    low: float = -0.5
    """The smallest coefficient of both vectors."""
    high: float = 1.5
    """The largest."""
    points: int = 21
    """How many coefficients of each vector."""
    loss_samples: int = 2048
    """Test samples of each task, drawn with a fixed seed."""


def check(config: Config):
    """Raises ValueError for pairs that are not two of the tasks."""
    names = [spec.partition("=")[0] for spec in config.tasks]
    for pair in config.pairs:
        own = pair.split(",")
        if len(own) != 2 or own[0] == own[1] or not set(own) <= set(names):
            raise ValueError(f"--pairs {pair} is not two of the tasks {names}.")


def joint_loss(setup: setups.Setup, taus, grid: np.ndarray, samples: int) -> np.ndarray:
    """The sum of the mean losses of both tasks at coefficients `[n, m, 2]`."""
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
    caption = f"{setup.title}: the lowest joint loss on the grid, and where."
    title = "Joint losses of two tasks (AWD paper, Figure 5)"
    shown = {
        caption: rows,
        "AWD's vector of all tasks at λ = 1 beside the plain sum.": [beside],
    }
    return tables.write(config.out, title, shown, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
