"""Figures 9 and 11: clusters of task vectors, early in training and of tangent vectors.

Zeng et al. Task Vector Bases. arXiv:2502.01015: C.2, C.5, Algorithm 1.

    python -m experiments.bases.figure9_clusters --data-dir DATA
    python -m experiments.bases.figure9_clusters --tasks a=FOLDER b=FOLDER c=FOLDER

Data: the eight image tasks, or any three or more.

Published, as heat maps, and the clusters of Algorithm 1:

    vectors    clusters
    step 0     mnist,svhn sun397,dtd eurosat,resisc45 stanford_cars gtsrb
    step 1     mnist,svhn sun397,dtd eurosat,resisc45 stanford_cars gtsrb
    epoch 0    mnist,svhn sun397,dtd eurosat,resisc45 stanford_cars gtsrb
    epoch 1    mnist,svhn,gtsrb dtd eurosat,resisc45 sun397 stanford_cars
    converged  mnist,svhn,gtsrb dtd eurosat,resisc45 sun397 stanford_cars
    tangent    mnist,svhn sun397,dtd,stanford_cars eurosat resisc45 gtsrb

The paper says "the first two steps of batch updates and two full epochs". Here step 0
is after the first update, step 1 after the second; epoch 0 is after the first pass over
the training data, epoch 1 after the second. They are snapshots of one training with the
full schedule; the bank has them as `nonlinear_early`. The tangent vectors are trained
as in Table 1 of `tau_jp`.

The eigengap sets the number of clusters, in the column `gap`. The clustering is
scikit-learn's with a fixed seed. The paper states neither seed, implementation nor
model; our model is `laion2b_e16`, see `table4_partitions`.
"""

import dataclasses
import math

import numpy as np

from experiments.bases import partitions
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors
from jaxarith.merge.bases import eigengap
from jaxarith.typing import Tree

_METHOD = "nonlinear_early"
PUBLISHED = tables.published(__doc__, "vectors", value=str.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    model: str = partitions.LAION_B32


def moments(setup: setups.Setup, task: setups.Task) -> dict[str, int]:
    """Returns the numbers of steps after which a task has a snapshot.

    Raises:
      ValueError: the training is shorter than two epochs.
    """
    config = vectors.recipe_of(setup, "nonlinear", task)
    epoch = math.ceil(len(task.train) / config.batch_size)
    if config.steps < max(2, 2 * epoch):
        raise ValueError(
            f"two epochs of {task.name} are {2 * epoch} steps of batch size "
            f"{config.batch_size}, but it trains for {config.steps}. Give more --steps."
        )
    return {"step 0": 1, "step 1": 2, "epoch 0": epoch, "epoch 1": 2 * epoch}


def early_vectors(setup: setups.Setup) -> dict[str, list[Tree]]:
    """Returns the task vectors at every snapshot, and at the end of the training."""
    steps = [moments(setup, task) for task in setup.tasks]  # raises before training
    wanted = [
        vectors.wanted_of(
            setup,
            _METHOD,
            task,
            vectors.recipe_of(setup, "nonlinear", task),
            observed=set(own.values()),
        )
        for task, own in zip(setup.tasks, steps, strict=True)
    ]
    last = vectors.trained(setup, _METHOD, wanted)
    found = {
        name: [
            vectors.snapshot(one, own[name])
            for one, own in zip(wanted, steps, strict=True)
        ]
        for name in steps[0]
    }
    return found | {"converged": last}


def written(partition: partitions.Partition, titles) -> str:
    """Returns clusters in the form that the paper prints.

    Example:
      >>> written([[0, 1], [2]], ["MNIST", "SVHN", "Cars"])
      '(MNIST, SVHN) (Cars)'
    """
    groups = (", ".join(titles[i] for i in members) for members in partition)
    return " ".join(f"({group})" for group in groups)


def published(name: str, setup: setups.Setup) -> str | None:
    """Returns the paper's clusters, sorted by first member; None for other tasks."""
    [clusters] = PUBLISHED[name]
    if sorted(",".join(clusters).split(",")) != sorted(setup.names):
        return None
    found = partitions.given_partition(clusters, setup.names)
    return written(sorted(map(sorted, found)), setup.titles)


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config)
    if len(config.tasks) < 3:
        raise ValueError(
            f"--tasks names {len(config.tasks)} tasks; expected at least 3, for an "
            "eigengap."
        )
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    longer = dataclasses.replace(config, steps=8)  # two epochs of a smoke run
    by_moment = early_vectors(setup._replace(options=longer) if config.smoke else setup)
    by_moment["tangent"] = vectors.vectors(setup, "linear")
    cosines = {
        name: np.asarray(task_vectors.cosine_matrix(taus), float)
        for name, taus in by_moment.items()
    }
    rows = []
    for name, taus in by_moment.items():
        clusters = partitions.found_partition(taus)
        theirs = published(name, setup)
        ours = written(clusters, setup.titles)
        rows.append(
            {"vectors": name, "gap": eigengap(cosines[name]), "clusters": ours}
            | {"published": theirs, "norm": mean_norm(taus), "indices": clusters}
        )
    if runs.is_first():
        early = {name: cosines[name] for name in cosines if name != "tangent"}
        scores.draw_cosines(config.out / "figure9.png", early, setup.titles)
        tangent = {"tangent vectors": cosines["tangent"]}
        scores.draw_cosines(config.out / "figure11.png", tangent, setup.titles)
    results = {
        "rows": rows,
        "tasks": setup.names,
        "cosines": {name: matrix.tolist() for name, matrix in cosines.items()},
    }
    shown = [{k: v for k, v in row.items() if k != "indices"} for row in rows]
    table = {"Clusters, and the mean norm of the vectors.": shown}
    title = "Clusters of task vectors (bases paper, Algorithm 1, Figures 9 and 11)"
    has_theirs = any(row["published"] for row in rows)
    note = partitions.other_models([setup.model]) if has_theirs else ""
    return tables.write(config.out, title, table, results, note, digits=3)


def mean_norm(taus) -> float:
    return float(np.mean([float(task_vectors.norm(tau)) for tau in taus]))


if __name__ == "__main__":
    script.run(Config, main)
