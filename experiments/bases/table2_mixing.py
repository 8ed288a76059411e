"""Table 2: mixes task vectors from two pre-trainings.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.2.

    python -m experiments.bases.table2_mixing --data-dir DATA

Data: the eight image tasks. The models are two checkpoints of LAION-2B, see
`two_models`.

Published, mean test accuracy in percent over eight tasks:

    vectors            pre-trained 1  pre-trained 2
    fine-tuned from 1  70.83          51.71
    50 / 50            59.92          61.71
    fine-tuned from 2  54.21          71.09

The paper can be read in two ways about a vector from the other pre-training; both are
measured here. By the caption τ = θ_i - θ_0, with the θ_0 of the column ("subtracted");
the text says that "if we subtract pretrained 2 from any finetune 1" its norm is huge.
But Figure 4 compares vectors made with their own pre-trained model, and Table 2 refers
to it ("own").

For every cell, the sum of the eight vectors has the coefficient out of 0, 0.05, …, 1
with the best mean accuracy on validation data. The paper does not state how it is
chosen.
"""

import numpy as np

from experiments.bases import two_models
from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors

PUBLISHED = tables.published(__doc__, "vectors")


class Config(two_models.Options): ...


def cells(setup: setups.Setup, own, other, apart) -> dict[str, list[dict]]:
    """Returns the cells of one column, for both readings of the caption.

    Args:
      setup: setup of the column's model.
      own: the vectors from its pre-training.
      other: the vectors from the other pre-training.
      apart: the other pre-trained parameters minus those of `setup`.

    Returns:
      For each reading three cells: own vectors, half and half, the other's vectors.
    """
    count = len(own)
    taus = [task_vectors.add(own), task_vectors.add(other), apart]
    # If θ_i come from the other pre-training, the sum over tasks of θ_i - θ_0 has the
    # difference of the two models once for every task.
    shares = {
        "own": [(1, 0, 0), (0.5, 0.5, 0), (0, 1, 0)],
        "subtracted": [(1, 0, 0), (0.5, 0.5, 0.5 * count), (0, 1, count)],
    }
    rows = np.array([row for part in shares.values() for row in part])
    # In the second reading, 1 / T adds the difference of the two models exactly once.
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
        # The second model's own vectors are in the last row.
        for name, *pair in zip(PUBLISHED, first, second[::-1], strict=True):
            row = {"reading": reading, "vectors": name}
            for number, cell in enumerate(pair, 1):
                row[f"pre-trained {number}"] = cell["abs"]
                row[f"coefficient {number}"] = cell["coefficient"]
            rows.append(row)
    titles = two_models.titles(found)
    return tables.compared(
        config.out,
        "Vectors from two pre-trainings (bases paper, Table 2)",
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
