"""Figure 5: cosines of the task vectors of eight image tasks.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 6.

    python -m experiments.editing.figure5_cosine --data-dir DATA

Data: those of `table1_forgetting`, whose task vectors are taken from the bank.

Published, as a heat map only: the vectors are "typically close to orthogonal"; the
largest cosines are those of MNIST, SVHN and GTSRB, and of EuroSAT and RESISC45. The
paper does not name the CLIP; we take ViT-L-14.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors


class Config(options.LargeModel): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    setup = setups.load(config, config.model, control=False)
    taus = vectors.vectors(setup, "nonlinear")
    found = np.asarray(task_vectors.cosine_matrix(taus), float)
    if runs.is_first():
        scores.draw_cosines(setup, "figure5.png", {setup.title: found})
    couples = scores.pairs(len(taus))
    rows = [
        {"pair": " – ".join(setup.titles[i] for i in pair), "cosine": value}
        for pair, value in zip(couples, scores.pair_values(found), strict=True)
    ]
    rows.sort(key=lambda row: -row["cosine"])
    results = {"tasks": setup.names, "cosines": found.tolist(), "rows": rows}
    table = {f"{setup.title}, the largest first.": rows}
    title = "Cosines of all pairs (editing paper, Figure 5)"
    return tables.write(config.out, title, table, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
