"""Table 1: task addition with curvature instead of the other tasks' images.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.table1_addition --data-dir DATA
    python -m experiments.curvature.table1_addition --data-dir DATA --mesh task=8 \\
        --models openai/clip-vit-base-patch32 --curvature-coef 0.05

Data: the same as for `tau_jp.table1_addition`. Its task vectors in the bank are used.
The factors of each task are measured once, on 256 of its training images, and stored in
the bank too. On disk and in host memory a task needs P · (15 + 4 · rank) bytes: with
the default sketch 13 GB for ViT-B-32 and 44 GB for ViT-L-14; with --curvature-rank 0
1.3 and 4.7 GB. A device holds as much once, for the task that it trains.

Published, mean absolute / normalised test accuracy in percent. These figures are taken
from secondary texts and are to be checked against the PDF:

    method       coefficient  ViT-B-32     ViT-B-16     ViT-L-14
    Pre-trained  -            48.4 / -     55.4 / -     65.0 / -
    Linear FT    1.0          76.7 / -     80.2 / 88.9  88.0 / -
    Diag. GGN    1.0          80.1 / 92.3  82.9 / 93.2  87.9 / -
    τJp          1.0          85.0 / -     88.2 / 98.3  90.9 / -
    τJp          searched     85.6 / -     88.6 / 98.7  91.1 / -
    TAK          1.0          85.8 / 97.6  88.3 / 97.9  91.6 / 99.3
    TAK          searched     86.0 / -     88.3 / 98.1  91.6 / -

"Attention, TAK" are ordinary models with only the weights of attention trained: TAK
combined with the linear-layers paper (Jin et al. 2025).

Our row TAK differs from the paper in three ways. It uses our factors, which treat the
tokens of an image together and have a sketch of the curvature between layers. It uses
the recipe of the τJp paper; TAK has a learning rate of 3e-4. And it also uses the
curvature of the control task, as τJp uses its images. Each penalty has its own weight,
--penalty-coef, --curvature-coef and --diagonal-coef; `choose_coef` chooses them.
"""

from experiments.common import script, tables
from experiments.common.vision import merged, options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "Linear FT": "linear",
    "Diag. GGN": "curvature_diagonal",
    "τJp": "tau_jp_cyclic",
    "TAK": "curvature",
    "Attention, TAK": "attention_curvature",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.Addition): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    rows = []
    for name, method in METHODS.items():
        found = scores.of_method(setup, method)
        if not rows:
            mean = scores.means(found.zero_shot)
            rows.append(row_of(setup, "Pre-trained", "", {"abs": mean, "norm": None}))
        for coef in ("1.0", "searched"):
            searched = coef == "searched"
            row = row_of(setup, name, coef, found.row(searched))
            rows.append(row | {"found": found.search.coef if searched else 1.0})
    return rows + merged.rows(setup, METHODS)


def row_of(setup, method, coef, values) -> dict:
    return {"model": setup.title, "method": method, "coefficient": coef} | values


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    return tables.compared(
        config.out,
        "Task addition with curvature (TAK, Table 1)",
        "Mean absolute and normalised test accuracy, percent.",
        rows,
        PUBLISHED,
        keys=["model", "method", "coefficient"],
        values=["abs", "norm"],
        note=merged.note(config),
    )


if __name__ == "__main__":
    script.run(Config, main)
