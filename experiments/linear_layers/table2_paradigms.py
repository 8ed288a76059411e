"""Table 2: four choices of trained layers (paradigms), single and added.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025.

    python -m experiments.linear_layers.table2_paradigms --data-dir DATA

Data: the same as for `table1_addition`. Its vectors of paradigm (1) in the bank are
used.

Published, in percent: mean test accuracy of single-task models / mean absolute /
normalised test accuracy of the sum of all vectors at a searched coefficient:

    paradigm                             ViT-B-32
    (1) weights of Q, K, V and output    89.55 / 78.37 / 87.42
    (2) their biases too                 89.48 / 77.71 / 86.79
    (3) weights of all linear layers     88.95 / 76.52 / 86.11
    (4) biases of all linear layers too  89.43 / 77.80 / 86.93

Ours is (1). "All linear layers in the attention module" must mean the residual block
with its MLP; with attention alone they would be the layers of (1).
"""

import dataclasses

from experiments.common import script, tables
from experiments.common.vision import options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "(1) weights of Q, K, V and output": "linear_layers_1",
    "(2) their biases too": "linear_layers_2",
    "(3) weights of all linear layers": "linear_layers_3",
    "(4) biases of all linear layers too": "linear_layers_4",
}
PUBLISHED = tables.published_by_column(__doc__, "paradigm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Seeded):
    models: tuple[str, ...] = (options.B32,)


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    rows = []
    for paradigm, method in METHODS.items():
        found = scores.of_method(setup, method)
        rows.append(
            {
                "model": setup.title,
                "paradigm": paradigm,
                "single": scores.means(found.single),
                **found.row(searched=True),
                "coefficient": found.search.coef,
                "per_task_single": [float(x) for x in found.single],
                "per_task": [float(x) for x in found.searched],
            }
        )
    return rows


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = seeds.rows(config, rows_of, control=False)
    return tables.compared(
        config.out,
        "Paradigms (linear-layers paper, Table 2)",
        "Mean test accuracy of single-task models, and absolute and normalised "
        "accuracy of the sum of all vectors, percent.",
        rows,
        PUBLISHED,
        keys=["model", "paradigm"],
        values=["single", "abs", "norm"],
        digits=2,
        results={"tasks": list(config.tasks)},
    )


if __name__ == "__main__":
    script.run(Config, main)
