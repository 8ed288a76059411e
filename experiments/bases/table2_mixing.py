"""Table 2: task vectors of two pre-trainings, mixed.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.2.

    python -m experiments.bases.table2_mixing --data-dir DATA

Data: the eight image tasks. The models are two checkpoints of LAION-2B, see
`two_models`.

Published, mean test accuracy in percent over eight tasks:

    vectors            pre-trained 1  pre-trained 2
    fine-tuned from 1  70.83          51.71
    50 / 50            59.92          61.71
    fine-tuned from 2  54.21          71.09

How a vector of the other pre-training is made can be read in two ways, and both are
here. The caption says τ = θ_i - θ_0, θ_0 being that of the column ("subtracted"), and
the text that "if we subtract pretrained 2 from any finetune 1" its norm is huge. But
Figure 4 compares vectors that both have been made with their own pre-trained model, and
Table 2 refers to it ("own").

The sum of the eight vectors has one coefficient of 0, 0.05, …, 1, with the best mean
accuracy on validation data, for every cell; the paper does not state how it is chosen.
"""

import numpy as np

from experiments.bases import two_models
from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors

PUBLISHED = tables.published(__doc__, "vectors")


class Config(two_models.Options): ...


def cells(setup: setups.Setup, own, other, apart) -> dict[str, list[dict]]:
    """The cells of one column, by the reading of the caption.

    Args:
      setup: setup of the column's model.
      own: the vectors of its pre-training.
      other: those of the other one.
      apart: the other pre-trained parameters minus those of `setup`.

    Returns:
      For each reading the cells of the column's own vectors, of half and half, and of
      the other's.
    """
    count = len(own)
    taus = [task_vectors.add(own), task_vectors.add(other), apart]
    # The sum over tasks of θ_i - θ_0, where θ_i are of the other pre-training, has the
    # distance of the two models once for every task.
    shares = {
        "own": [(1, 0, 0), (0.5, 0.5, 0), (0, 1, 0)],
        "subtracted": [(1, 0, 0), (0.5, 0.5, 0.5 * count), (0, 1, count)],
    }
    rows = np.array([row for part in shares.values() for row in part])
    # At 1 / T the distance of the two models is crossed once, in the second reading.
    coefs = np.union1d(scores.coefs_of(setup.options, scores.COEFS), [1 / count])
    found = scores.searched(setup, taus, rows, coefs)
    made = [{"abs": accuracy, "coefficient": coef} for accuracy, coef in found]
    return {"own": made[:3], "subtracted": made[3:]}


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    found = two_models.both(config)
    one, two = (vectors.vectors(setup, "nonlinear") for setup in found)
    apart = task_vectors.difference(found[1].params_0, found[0].params_0)
    columns = [
        cells(found[0], one, two, apart),
        cells(found[1], two, one, task_vectors.negate(apart)),
    ]
    rows = []
    for reading in ("subtracted", "own"):
        first, second = (column[reading] for column in columns)
        # Of the second model its own vectors are those of the last row.
        for name, *pair in zip(PUBLISHED, first, second[::-1], strict=True):
            row = {"reading": reading, "vectors": name}
            for number, cell in enumerate(pair, 1):
                row[f"pre-trained {number}"] = cell["abs"]
                row[f"coefficient {number}"] = cell["coefficient"]
            rows.append(row)
    titles = two_models.titles(found)
    return tables.compared(
        config.out,
        "Vectors of two pre-trainings (bases paper, Table 2)",
        "Mean test accuracy of the sum of task vectors, percent.",
        rows,
        PUBLISHED if titles == list(two_models.TITLES) else {},
        keys=["reading", "vectors"],
        values=["pre-trained 1", "pre-trained 2"],
        published_keys=["vectors"],
        digits=2,
        results={"models": titles},
    )


if __name__ == "__main__":
    script.run(Config, main)
