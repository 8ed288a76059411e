"""Figure 8: compares the sum of two vectors at 0.5 with the ensemble of their models.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: Appendix A.

    python -m experiments.editing.figure8_ensembles --data-dir DATA

Data: the eight tasks. The vectors in the bank are used.

At coefficient 0.5 the sum is the mean of the weights of two fine-tuned models; the
ensemble is the mean of their logits. Both are tested on both tasks, for all pairs.

Published, with "a slight bias towards higher accuracy for the ensembles":

    result               value
    Pearson correlation  0.99

The paper does not name its CLIP; we take ViT-L-14. It does not say whether a point is a
pair, or a task of a pair; our points are means over both tasks.
"""

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, pairwise, scores, setups, vectors
from jaxarith import metrics, plots
from jaxarith.models import heads

PUBLISHED = tables.published(__doc__, "result")


class Config(options.LargeModel): ...


def accuracies(setup: setups.Setup) -> tuple[np.ndarray, np.ndarray]:
    """Returns test accuracies `[P, 2]` of every pair's mean weights, and ensemble."""
    taus = vectors.vectors(setup, "nonlinear")
    couples = pairwise.pairs(len(taus))
    weights, ensembles = np.zeros((2, len(couples), 2))
    ones = np.eye(len(taus))
    for index, task in enumerate(tqdm(setup.tasks, desc="ensembles", unit="task")):
        own = [(p, pair) for p, pair in enumerate(couples) if index in pair]
        halves = [0.5 * (ones[i] + ones[j]) for _, (i, j) in own]
        at = scores.outputs(setup, taus, task.test, False)
        found = at(np.array([*ones, *halves]))
        single = [
            np.asarray(heads.logits(task.test.head, jnp.asarray(x)))
            for x in found[: len(ones)]
        ]
        for (p, (i, j)), features in zip(own, found[len(ones) :], strict=True):
            place = couples[p].index(index)
            weights[p, place] = task.test.accuracy(features)
            mean = (single[i] + single[j]) / 2
            ensembles[p, place] = metrics.accuracy(mean, task.test.labels)
    return weights, ensembles


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config)
    if len(config.tasks) < 2:
        raise ValueError(f"--tasks names {config.tasks}; expected two or more.")
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    weights, ensembles = (100 * found for found in accuracies(setup))
    pairs = [
        {
            "pair": " + ".join(setup.titles[i] for i in pair),
            "weights": float(own.mean()),
            "ensemble": float(theirs.mean()),
        }
        for pair, own, theirs in zip(
            pairwise.pairs(len(setup.tasks)), weights, ensembles, strict=True
        )
    ]
    xs, ys = ([row[name] for row in pairs] for name in ("ensemble", "weights"))
    defined = len(set(xs)) > 1 and len(set(ys)) > 1
    value = float(metrics.pearson(xs, ys)) if defined else None
    rows = [{"result": "Pearson correlation", "value": value}]
    if runs.is_first():
        plots.scatter(
            config.out / "figure8.png",
            {setup.title: {"pair of tasks": (xs, ys)}},
            x="accuracy of the ensemble, percent",
            y="accuracy of the mean of weights, percent",
        )
    results = {"rows": rows, "pairs": pairs}
    beside = tables.beside(rows, PUBLISHED, keys=["result"], values=["value"])
    shown = {
        f"{setup.title}.": tables.markdown(beside, digits=3),
        "Test accuracy, mean over both tasks, percent.": tables.markdown(pairs),
    }
    title = "Ensembles (editing paper, Figure 8)"
    return tables.write(config.out, title, shown, results)


if __name__ == "__main__":
    script.run(Config, main)
