"""ξ maps of representations and of labels (Figures 4 and 7)."""

import dataclasses

import numpy as np
from tqdm import tqdm

from experiments.common import runs, tables
from experiments.common.vision import options, scores, vectors
from jaxarith import plots

METHODS = {
    "Standard": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}
DISTANCES = {
    "representation": scores.symmetric_kl,
    "label": scores.labels_differ,
}
# The largest value of the colours; 0.2 is that of the authors' code.
SCALES = (("ξ of representations (KL)", 0.2), ("ξ of labels (0/1)", 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.OneModel):
    """The options of a ξ map of two tasks."""

    points: int = 15
    """Values of each coefficient."""
    limit: float = 2.0
    """The coefficients are from -limit to limit."""
    test_samples: int = 2048
    """How many test samples of each task are drawn, with a fixed seed."""


def inside(grid: np.ndarray, coefs: np.ndarray) -> float:
    """The mean of ξ `[n, n]` where both coefficients are between 0 and 1."""
    within = (coefs >= 0) & (coefs <= 1)
    return float(grid[np.ix_(within, within)].mean())


def run(config: Options, title: str) -> dict:
    """Draws the maps of a pair by every method; returns what `report.json` holds.

    Raises:
      ValueError: there are not two tasks.
    """
    if len(config.tasks) != 2:
        raise ValueError(f"ξ compares two tasks; --tasks names {list(config.tasks)}.")
    points = 3 if config.smoke else config.points
    samples = 48 if config.smoke else config.test_samples
    config = options.smoke(config)
    runs.start(config)
    setup = options.load(config, config.model, control=False)
    setup = scores.pair_setup(setup, (0, 1))  # a smoke run has three
    coefs = np.linspace(-config.limit, config.limit, points)
    found = {}
    for label, method in tqdm(METHODS.items(), desc="ξ maps", unit="method"):
        found[label] = scores.disentanglement_error(
            setup,
            vectors.vectors(setup, method),
            linearized=vectors.is_linearized(method),
            coefs=coefs,
            samples=samples,
            distances=list(DISTANCES.values()),
        )
    rows = [
        {"method": label}
        | {
            f"{name}, {where}": value
            for name, grid in zip(DISTANCES, grids, strict=True)
            for where, value in (
                ("0 to 1", inside(grid, coefs)),
                ("all", float(grid.mean())),
            )
        }
        for label, grids in found.items()
    ]
    results = {
        "model": setup.title,
        "tasks": setup.titles,
        "coefs": coefs.tolist(),
        "maps": {
            label: dict(zip(DISTANCES, grids.tolist(), strict=True))
            for label, grids in found.items()
        },
        "rows": rows,
    }
    caption = (
        "Mean ξ of the representations (symmetric KL) and of the labels (0/1), over "
        "coefficients from 0 to 1 and over the whole map."
    )
    tables.write(config.out, title, {caption: tables.markdown(rows, digits=4)}, results)
    if runs.is_first():
        pair = tuple(setup.titles)
        plots.disentanglement(config.out / "xi.png", found, coefs, pair, scales=SCALES)
    return results
