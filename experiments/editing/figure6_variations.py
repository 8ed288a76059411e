"""Figures 6 and 14: adds two vectors, by learning rate and by seed.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 6, Appendix D.1.

    python -m experiments.editing.figure6_variations --data-dir DATA

Data: MNIST and EuroSAT. The coefficient of every sum is searched on validation data.

For Figure 6 both vectors are trained with each learning rate. For Figure 14 five models
of each task are trained, with different seeds for the order and the augmentation of
samples; they make 25 sums.

Published, as plots only. Figure 6, with ViT-L-14: "lower learning rates make the best
use of the fine-tuned models, and also correspond to the highest accuracies of the
fine-tuned models on the target task." The text does not state the learning rates of the
plot; ours are around 1e-5, the rate of all other experiments. Figure 14: "different
random seeds have little impact in the resulting accuracy of the edited models". The
paper does not name its CLIP; we take ViT-L-14.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, setups
from experiments.editing import variations
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.LargeModel):
    tasks: tuple[str, ...] = ("mnist", "eurosat")
    """The two tasks."""
    figures: tuple[Literal[6, 14], ...] = (6, 14)
    """The figures to make."""
    learning_rates: tuple[float, ...] = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


def by_rate(setup: setups.Setup, config: Config) -> list[dict]:
    """Makes Figure 6; returns a row for every learning rate."""
    rows = []
    for rate in tqdm(config.learning_rates, desc="learning rates"):
        taus = variations.trained(setup, f"lr_{rate:g}", learning_rate=rate)
        rows.append({"learning rate": rate} | variations.added(setup, taus))
    if runs.is_first():
        plots.bars(
            config.out / "figure6.png",
            {
                "fine-tuned models": [row["single"] for row in rows],
                "sum of both vectors": [row["abs"] for row in rows],
            },
            [f"learning rate {row['learning rate']:g}" for row in rows],
            y="accuracy, mean over both tasks, percent",
        )
    return rows


def by_seed(setup: setups.Setup, config: Config) -> list[dict]:
    """Makes Figure 14; returns a row for every two seeds."""
    taus = {
        seed: variations.trained(setup, f"seed_{seed}", seed=seed)
        for seed in config.seeds
    }
    both = list(itertools.product(config.seeds, repeat=2))
    rows = [
        {"seeds": list(pair)}
        | variations.added(setup, [taus[pair[0]][0], taus[pair[1]][1]])
        for pair in tqdm(both, desc="pairs of seeds", unit="pair")
    ]
    if runs.is_first():
        shape = (len(config.seeds),) * 2
        plots.matrices(
            config.out / "figure14.png",
            {
                title: np.reshape([row["accuracies"][i] for row in rows], shape)
                for i, title in enumerate(setup.titles)
            },
            [str(seed) for seed in config.seeds],
            rows=f"seed of {setup.titles[0]}",
            columns=f"seed of {setup.titles[1]}",
            value="accuracy of the sum, percent",
        )
    return rows


def of_seeds(setup: setups.Setup, rows: list[dict]) -> list[dict]:
    """Returns mean and spread of the sums' accuracies over seeds, for both tasks."""
    return [
        {
            "task": title,
            "mean": float(values.mean()),
            "standard deviation": float(values.std()),
            "lowest": float(values.min()),
            "highest": float(values.max()),
        }
        for title, values in zip(
            setup.titles, np.array([row["accuracies"] for row in rows]).T, strict=True
        )
    ]


@script.full_precision
def main(config: Config) -> dict:
    pair, rates = options.SMOKE[:2], (1e-3, 1e-2)
    config = options.smoke(config, tasks=pair, learning_rates=rates, seeds=(0, 1))
    variations.check_pair(config.tasks)
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    rates = by_rate(setup, config) if 6 in config.figures else []
    seeds = by_seed(setup, config) if 14 in config.figures else []
    shown = {}
    if rates:
        names = ("coefficient", "single", "abs", "norm")
        caption = f"{' + '.join(setup.titles)}: test accuracy, mean over both, percent."
        shown[caption] = [
            {"learning rate": f"{row['learning rate']:g}"}
            | {name: row[name] for name in names}
            for row in rates
        ]
    if seeds:
        caption = f"Test accuracy of {len(seeds)} sums of two vectors, percent."
        shown[caption] = of_seeds(setup, seeds)
    title = "Learning rates and seeds (editing paper, Figures 6 and 14)"
    return tables.write(
        config.out, title, shown, {"rows": rates, "seeds": seeds}, digits=2
    )


if __name__ == "__main__":
    script.run(Config, main)
