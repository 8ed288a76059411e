"""Figure 5: cosines of the task vectors of eight image tasks.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 6.

    python -m experiments.editing.figure5_cosine --data-dir DATA

Data: the same as for `table1_forgetting`. Its task vectors in the bank are used; with
--bank-only no data are needed.

Published, as a heat map only: the vectors are "typically close to orthogonal"; the
largest cosines are those of MNIST, SVHN and GTSRB, and of EuroSAT and RESISC45. The
paper does not name the CLIP; we take ViT-L-14.
"""

import dataclasses

from experiments.common import runs, script, tables
from experiments.common.vision import banked, options, pairwise, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(banked.Options, options.LargeModel): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    own = banked.load(config, config.model)
    found = banked.cosines(own.vectors("nonlinear"))
    if runs.is_first():
        file = config.out / "figure5.png"
        scores.draw_cosines(file, {own.title: found}, own.titles)
    couples = pairwise.pairs(len(found))
    rows = [
        {"pair": " – ".join(own.titles[i] for i in pair), "cosine": value}
        for pair, value in zip(couples, pairwise.pair_values(found), strict=True)
    ]
    rows.sort(key=lambda row: -row["cosine"])
    results = {
        "tasks": own.names,
        "note": banked.note(config),
        "cosines": found.tolist(),
        "rows": rows,
    }
    table = {f"{own.title}, the largest first. {banked.note(config)}": rows}
    title = "Cosines of all pairs (editing paper, Figure 5)"
    return tables.write(config.out, title, table, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
