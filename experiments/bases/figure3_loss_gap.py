"""Figures 3 and 6: the loss of a task after another task's vector is merged into it.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.2.

    python -m experiments.bases.figure3_loss_gap --data-dir DATA

Data: the eight image tasks. The models are two checkpoints of LAION-2B, see
`two_models`.

For a task i and every other task j the gap is L_i(θ_0 + 0.5 τ_i + 0.5 τ_j) - L_i(θ_i).
L_i is the mean cross-entropy on test data; the paper does not name the split.

Published, as plots only. Figure 3, for MNIST: "highly similar tasks, such as digit
classification in MNIST, SVHN, and GTSRB, lead to larger loss gaps" than less related
ones. Figure 6, for DTD: "larger local smoothness consistently leads to a larger gap".

The local smoothness L is the spectral norm of the Hessian of the fine-tuned model's
loss, by power iteration on some test images. The paper states neither the number of
images nor of iterations. `residual` shows how well the iteration has converged.
"""

import dataclasses

import jax
import numpy as np
import optax

from experiments.bases import two_models
from experiments.common import runs, script, tables
from experiments.common.vision import options, raw_tasks, setups, vectors
from jaxarith import plots, task_vectors
from jaxarith.evaluate import smoothness as hessian
from jaxarith.models import heads
from jaxarith.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(two_models.Options):
    targets: tuple[str, str] = ("mnist", "dtd")
    """The tasks whose loss is measured, for Figure 3 and for Figure 6."""
    share: float = 0.5
    """Coefficient of both vectors."""
    smoothness_samples: int = 1024
    """Number of test images for the Hessian."""
    iterations: int = 50
    """Largest number of power iterations; each is a pass over those images."""


def gaps(setup: setups.Setup, taus, target: int, share: float) -> dict[int, float]:
    """Returns the loss gap of a task by the index of the other task in the merge."""
    unit = np.eye(len(taus))
    others = [i for i in range(len(taus)) if i != target]
    coefs = [unit[target], *(share * (unit[target] + unit[i]) for i in others)]
    task = setup.tasks[target]
    own, *merged = two_models.losses(setup, task, taus, coefs).tolist()
    return {i: loss - own for i, loss in zip(others, merged, strict=True)}


def smoothness(
    setup: setups.Setup, task: setups.Task, tau: Params, config: Config
) -> hessian.Eigenvalue:
    """Returns the local smoothness L of a task's loss at its fine-tuned model."""
    dataset = setups.drawn(setup, task.test, config.smoothness_samples)

    def loss(features, labels):
        scores = heads.logits(dataset.head, features)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels)

    return hessian.largest_eigenvalue(
        setup.apply_fn,
        loss,
        task_vectors.apply(setup.params_0, tau),
        list(dataset.batches),  # read once for all iterations
        key=jax.random.key(config.seed),
        max_iterations=config.iterations,
        mesh=setup.mesh,
    )


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, targets=options.SMOKE[:2], iterations=3)
    names = [raw_tasks.name_of(spec) for spec in config.tasks]
    targets = [raw_tasks.name_of(spec) for spec in config.targets]
    unknown = [name for name in targets if name not in names]
    if unknown or len(names) < 2:
        raise ValueError(
            f"--targets {' '.join(config.targets)}: expected targets among the --tasks "
            f"{', '.join(names)}, and at least two tasks."
        )
    runs.start(config)
    setups = two_models.both(config)
    models = two_models.titles(setups)
    rows, smooth = [], []
    for model, setup in zip(models, setups, strict=True):
        taus = vectors.vectors(setup, "nonlinear")
        cosines = np.asarray(task_vectors.cosine_matrix(taus), float)
        for target in map(names.index, targets):
            for other, gap in gaps(setup, taus, target, config.share).items():
                rows.append(
                    {
                        "model": model,
                        "target": setup.titles[target],
                        "with": setup.titles[other],
                        "cosine": float(cosines[target, other]),
                        "gap": gap,
                    }
                )
        index = names.index(targets[1])
        found = smoothness(setup, setup.tasks[index], taus[index], config)
        smooth.append({"model": model, "smoothness": found.smoothness})
        smooth[-1] |= found._asdict()
    first, second = (setups[0].titles[names.index(name)] for name in targets)
    if runs.is_first():
        figures(config, rows, smooth, first, second)
    results = {"rows": rows, "smoothness": smooth}
    caption = "Loss gap of the target, with half its own vector plus half another one."
    power = f"Local smoothness of {second}, by power iteration."
    shown = {caption: rows, power: smooth}
    title = "Loss gaps of pairs (bases paper, Figures 3 and 6)"
    return tables.write(config.out, title, shown, results, digits=3)


def figures(config: Config, rows, smooth, first: str, second: str):
    """Writes figure3.png and figure6.png."""
    panels: dict = {}
    for row in rows:
        if row["target"] == first:
            point = ([row["cosine"]], [row["gap"]])
            panels.setdefault(row["model"], {})[row["with"]] = point
    plots.scatter(
        config.out / "figure3.png",
        panels,
        x=f"cosine with the vector of {first}",
        y=f"loss gap of {first}",
    )
    groups, others = {}, []
    for model in smooth:
        label = f"{model['model']}, L = {model['smoothness']:.3g}"
        own = [
            row
            for row in rows
            if (row["model"], row["target"]) == (model["model"], second)
        ]
        groups[label] = [row["gap"] for row in own]
        others = [row["with"] for row in own]
    y = f"loss gap of {second}"
    plots.bars(config.out / "figure6.png", groups, others, y=y)


if __name__ == "__main__":
    script.run(Config, main)
