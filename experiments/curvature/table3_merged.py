"""Table 3: the curvature of the other tasks merged into one pair of factors, or not.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.table3_merged --data-dir DATA

Data: the same as for `table1_addition`. Its factors and vectors in the bank are used.

Published, mean absolute test accuracy in percent. These figures are taken from
secondary texts and are to be checked against the PDF. Another text has 88.1 for
un-merged ViT-B-16:

    curvature  coefficient  ViT-B-32  ViT-B-16
    merged     searched     86.0      88.3
    un-merged  searched     86.6      88.0

A device needs the following memory, in units of the factors of one task: for each task
that it trains, 1 with merged and nearest, and T with un-merged (T - 1 other tasks and
the control); with shared, 1 for all tasks together. `nearest` (the Kronecker product
nearest to the sum) and `shared` (one curvature of all tasks) are ours.
"""

from experiments.common import script, tables
from experiments.common.vision import options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "merged": "curvature",
    "nearest": "curvature_nearest",
    "un-merged": "curvature_each",
    "shared": "curvature_shared",
}
PUBLISHED = tables.published_by_column(__doc__, "curvature", "coefficient")


class Config(options.Seeded): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    rows = scores.linearized_rows(setup, METHODS)
    return [{**row, "curvature": row.pop("method")} for row in rows]


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    return tables.compared(
        config.out,
        "Merged and un-merged curvature (TAK, Table 3)",
        "Mean absolute test accuracy and, for ours, normalised accuracy, percent.",
        rows,
        {key: (*value, None) for key, value in PUBLISHED.items()},
        keys=["model", "curvature", "coefficient"],
        values=["abs", "norm"],
    )


if __name__ == "__main__":
    script.run(Config, main)
