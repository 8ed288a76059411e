"""Figures 4, 5 and Table 9: directions and norms of vectors from two pre-trainings.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.2, C.1.

    python -m experiments.bases.figure4_two_checkpoints --data-dir DATA

Data: the eight image tasks. The models are two checkpoints of LAION-2B, see
`two_models`.

Published, norm of task vectors / the same in percent of the pre-trained model's norm:

    task      laion2b_e16  laion2b_s34b_b79k
    mnist     2.18 / 0.46  2.30 / 0.42
    eurosat   2.16 / 0.45  2.27 / 0.42
    stanford_cars  2.52 / 0.54  2.59 / 0.48
    dtd       1.81 / 0.39  1.79 / 0.33
    gtsrb     2.32 / 0.49  2.44 / 0.45
    resisc45  2.55 / 0.54  2.63 / 0.48
    sun397    3.03 / 0.65  3.18 / 0.58
    svhn      2.64 / 0.56  2.76 / 0.51

Figure 4 is a heat map of 16 by 16 cosines. Cosines between different pre-trainings are
near 0. Figure 5 shows two random coordinates of all models. The two pre-trained models
are about 314 apart, a fine-tuned model is about 2 from its own pre-trained model.

All our norms are those of the image encoder. The paper does not say whether its 314
includes the text encoder. By the ratios of Table 9, the models that it divides by have
norms of 470 and 545.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.bases import two_models
from experiments.common import runs, script, tables
from experiments.common.vision import options, vectors
from jaxarith import plots, sharding, task_vectors, tree
from jaxarith.typing import Tree

_TASKS = (
    "mnist",
    "eurosat",
    "stanford_cars",
    "dtd",
    "gtsrb",
    "resisc45",
    "sun397",
    "svhn",
)
PUBLISHED = tables.published_by_column(__doc__, "task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(two_models.Options):
    tasks: tuple[str, ...] = _TASKS


def coordinates(
    trees: Sequence[Tree], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Returns two entries of every tree, at the same two random places."""
    flat = [tree.flatten(values) for values in trees]
    paths = list(flat[0])
    sizes = np.array([np.size(flat[0][path]) for path in paths])
    ends = np.cumsum(sizes)
    entries = rng.choice(ends[-1], 2, replace=False)

    def at(leaves, entry):
        index = int(np.searchsorted(ends, entry, side="right"))
        leaf = np.ravel(np.asarray(leaves[paths[index]]))
        return float(leaf[entry - (ends[index] - sizes[index])])

    return [(at(leaves, entries[0]), at(leaves, entries[1])) for leaves in flat]


def xs_and_ys(points: Sequence[tuple[float, float]]) -> tuple[list, list]:
    return [x for x, _ in points], [y for _, y in points]


def blocks(cosines: np.ndarray) -> dict[str, float]:
    """Returns mean cosines of different tasks within each model, and across both."""
    count = len(cosines) // 2
    different = ~np.eye(count, dtype=bool)
    return {
        "within 1": float(cosines[:count, :count][different].mean()),
        "within 2": float(cosines[count:, count:][different].mean()),
        "across": float(cosines[:count, count:].mean()),
    }


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    found = two_models.both(config)
    names = two_models.titles(found)
    all_taus = [vectors.vectors(setup, "nonlinear") for setup in found]
    starts = sharding.to_host([setup.params_0 for setup in found])
    apart = float(task_vectors.norm(task_vectors.difference(*starts[::-1])))
    cosines = np.asarray(
        task_vectors.cosine_matrix([*all_taus[0], *all_taus[1]]), float
    )
    rows = []
    for name, setup, start, taus in zip(names, found, starts, all_taus, strict=True):
        length = float(task_vectors.norm(start))
        for task, tau in zip(setup.names, taus, strict=True):
            norm = float(task_vectors.norm(tau))
            rows.append(
                {"model": name, "task": task, "norm": norm}
                | {"ratio": 100 * norm / length}
            )
    points = {}
    for number, (start, taus) in enumerate(zip(starts, all_taus, strict=True), 1):
        ends = [task_vectors.apply(start, tau) for tau in taus]
        first, *others = coordinates([start, *ends], np.random.default_rng(config.seed))
        points[f"pre-trained {number}"] = [first]
        points[f"fine-tuned from {number}"] = others
    if runs.is_first():
        count = len(found[0].tasks)
        plots.clustered(
            config.out / "figure4.png",
            cosines,
            {
                "task vectors from two pre-trainings": [
                    list(range(count)),
                    list(range(count, 2 * count)),
                ]
            },
            [f"{task} {i}" for i in (1, 2) for task in found[0].titles],
            value="cosine",
            box="same pre-training",
        )
        largest = max(row["norm"] for row in rows)
        title = (
            f"pre-trained models {apart:.3g} apart, task vectors up to {largest:.3g}"
        )
        plots.scatter(
            config.out / "figure5.png",
            {title: {k: xs_and_ys(v) for k, v in points.items()}},
            x="one entry of the parameters",
            y="another entry",
        )
    results = {
        "models": names,
        "distance": apart,
        "rows": rows,
        "cosines": cosines.tolist(),
        "blocks": blocks(cosines),
    }
    results["points"] = {k: [list(p) for p in v] for k, v in points.items()}
    beside = tables.beside(
        rows, PUBLISHED, keys=["model", "task"], values=["norm", "ratio"]
    )
    summary = [results["blocks"] | {"distance of the models": apart}]
    shown = {
        "Table 9: norms, and their percentage of the pre-trained model's norm.": (
            tables.markdown(beside, digits=2)
        ),
        "Mean cosines of vectors, and distance of the pre-trained models "
        "(published: about 314).": tables.markdown(summary, digits=3),
    }
    title = "Vectors from two pre-trainings (bases paper, Figures 4 and 5, Table 9)"
    return tables.write(config.out, title, shown, results)


if __name__ == "__main__":
    script.run(Config, main)
