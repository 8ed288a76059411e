"""Figures 4 and 7: disentanglement error ξ of a pair, for representations and labels.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025.

    python -m experiments.linear_layers.figure4_disentanglement --data-dir DATA
    python -m experiments.linear_layers.figure4_disentanglement --figure 7 \\
        --out runs/linear_layers/figure7 --data-dir DATA

Data: DTD and SUN397 (Figure 4), Cars and RESISC45 (Figure 7), or any pair. The task
vectors of `table1_addition` in the bank are used.

The upper maps use only the image encoder: half the sum of both KL divergences between
the softmax of its features (dist in section 4). The lower maps use the head too: the
share of labels that differ. The red box is the range in which coefficients are
searched.

Published as heat maps of ViT-B-32. The text says about Figure 4: ξ of representations
is small around the pre-trained model, and stays small beyond coefficients of 1, where ξ
of labels does not. Linear training enlarges the region of small ξ.

The authors' public code takes the first 16 batches of 128, but divides by the number of
all batches. So its ξ is too small for large test splits: for SUN397 about a tenth is
counted. Ours is the mean over the drawn samples.
"""

import dataclasses
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, pairwise, setups, vectors
from jaxarith import plots

METHODS: dict[str, vectors.Method] = {
    "Standard": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}
PAIRS = {4: ("dtd", "sun397"), 7: ("stanford_cars", "resisc45")}
DISTANCES = {
    "representation": pairwise.symmetric_kl,
    "label": pairwise.labels_differ,
}
# Titles of the maps, and the largest value of their colours; the authors' code has 0.2.
SCALES = (("ξ of representations (KL)", 0.2), ("ξ of labels (0/1)", 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    figure: Literal[4, 7] = 4
    """The figure; its pair of tasks is measured."""
    tasks: tuple[str, ...] = ()
    """Another pair of tasks: names of jaxarith data check, or NAME=FOLDER."""
    points: int = 15
    """Number of values of each coefficient."""
    limit: float = 2.0
    """Coefficients run from -limit to limit."""
    test_samples: int = 2048
    """Number of test samples of each task, drawn with a fixed seed."""


def inside(grid: np.ndarray, coefs: np.ndarray) -> float:
    """Returns the mean of ξ `[n, n]` over coefficients between 0 and 1."""
    within = (coefs >= 0) & (coefs <= 1)
    return float(grid[np.ix_(within, within)].mean())


def rows_of(maps: dict[str, np.ndarray], coefs: np.ndarray) -> list[dict]:
    """Returns mean ξ of every method, over coefficients 0 to 1 and over the map."""
    rows = []
    for label, grids in maps.items():
        row: dict = {"method": label}
        for name, grid in zip(DISTANCES, grids, strict=True):
            row |= {f"{name}, 0 to 1": inside(grid, coefs)}
            row |= {f"{name}, all": float(grid.mean())}
        rows.append(row)
    return rows


@script.full_precision
def main(config: Config) -> dict:
    config = dataclasses.replace(config, tasks=config.tasks or PAIRS[config.figure])
    if len(config.tasks) != 2:
        raise ValueError(
            f"--tasks names {list(config.tasks)}; expected two tasks, which ξ compares."
        )
    config = options.started(config, points=3, test_samples=48)
    setup = setups.load(config, config.model, control=False)
    setup = pairwise.pair_setup(setup, (0, 1))  # a smoke run has three tasks
    coefs = np.linspace(-config.limit, config.limit, config.points)
    maps = {
        label: pairwise.disentanglement_error(
            setup,
            vectors.vectors(setup, method),
            linearized=vectors.is_linearized(method),
            coefs=coefs,
            samples=config.test_samples,
            distances=list(DISTANCES.values()),
        )
        for label, method in tqdm(METHODS.items(), desc="ξ maps", unit="method")
    }
    rows = rows_of(maps, coefs)
    if runs.is_first():
        first, second = setup.titles
        pair = (first, second)
        plots.disentanglement(config.out / "xi.png", maps, coefs, pair, scales=SCALES)
    caption = (
        "Mean ξ of representations (symmetric KL) and of labels (0/1), over "
        "coefficients from 0 to 1 and over the whole map."
    )
    return tables.write(
        config.out,
        f"Disentanglement error (linear-layers paper, Figure {config.figure})",
        {caption: rows},
        {
            "model": setup.title,
            "tasks": setup.titles,
            "coefs": coefs.tolist(),
            "maps": {
                label: dict(zip(DISTANCES, grids.tolist(), strict=True))
                for label, grids in maps.items()
            },
            "rows": rows,
        },
        digits=4,
    )


if __name__ == "__main__":
    script.run(Config, main)
