"""Table 3: the curvature of the other tasks merged into one pair of factors, or not.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.table3_merged --data-dir DATA

Data: those of table1_addition, whose factors and vectors it takes from the bank.

Published, mean absolute test accuracy in percent. These figures are taken from
secondary texts and are to be checked against the PDF; un-merged of ViT-B-16 is 88.1 in
another text:

    curvature  coefficient  ViT-B-32  ViT-B-16
    merged     searched     86.0      88.3
    un-merged  searched     86.6      88.0

Memory of a device, in units of the factors of one task: merged and nearest 1 for each
task that it trains, un-merged T (T - 1 other tasks and the control), shared 1 for all
tasks. `nearest`, the Kronecker product that is nearest to the sum, and `shared`, the
curvature of all tasks together, are ours.
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
    """The rows of one model."""
    rows = scores.linearized_rows(setup, METHODS)
    return [{**row, "curvature": row.pop("method")} for row in rows]


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    return tables.compared(
        config.out,
        "Merged and un-merged curvature (TAK, Table 3)",
        "Mean absolute test accuracy and, of ours, normalised one, percent.",
        rows,
        {key: (*value, None) for key, value in PUBLISHED.items()},
        keys=["model", "curvature", "coefficient"],
        values=["abs", "norm"],
    )


if __name__ == "__main__":
    script.run(Config, main)
