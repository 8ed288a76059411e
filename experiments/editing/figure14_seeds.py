"""Figure 14: sums of two vectors that were trained with several seeds.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: Appendix D.1.

    python -m experiments.editing.figure14_seeds --data-dir DATA

Data: MNIST and EuroSAT. Five models of each, whose seeds order and augment the samples;
each of the 25 sums has a coefficient of its own, searched on validation data.

Published, as a plot only: "different random seeds have little impact in the resulting
accuracy of the edited models". The paper does not name the CLIP; we take ViT-L-14.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options
from experiments.editing import variations
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    out: Path = Path("runs/editing/figure14")
    model: str = options.L14
    tasks: tuple[str, ...] = ("mnist", "eurosat")
    """The two tasks."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.smoke(config)
    if config.smoke:
        config = dataclasses.replace(config, tasks=config.tasks[:2], seeds=(0, 1))
    variations.check_pair(config.tasks)
    runs.start(config)
    setup = options.load(config, config.model, control=False)
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
    count = len(config.seeds)
    if runs.is_first():
        plots.matrices(
            config.out / "figure14.png",
            {
                title: np.reshape([row["accuracies"][i] for row in rows], (count,) * 2)
                for i, title in enumerate(setup.titles)
            },
            [str(seed) for seed in config.seeds],
            rows=f"seed of {setup.titles[0]}",
            columns=f"seed of {setup.titles[1]}",
            value="accuracy of the sum, percent",
        )
    results = {"rows": rows}
    accuracies = np.array([row["accuracies"] for row in rows])
    shown = [
        {
            "task": title,
            "mean": float(values.mean()),
            "standard deviation": float(values.std()),
            "lowest": float(values.min()),
            "highest": float(values.max()),
        }
        for title, values in zip(setup.titles, accuracies.T, strict=True)
    ]
    caption = f"Test accuracy of {len(rows)} sums of two vectors, percent."
    table = {caption: tables.markdown(shown, digits=2)}
    return tables.write(
        config.out, "Random seeds (editing paper, Figure 14)", table, results
    )


if __name__ == "__main__":
    script.run(Config, main)
