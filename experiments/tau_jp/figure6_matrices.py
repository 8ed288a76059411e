"""Figures 6 and 7: τJp and cosines of the task vectors of all pairs of tasks.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: Appendices E.3 and E.4.

    python -m experiments.tau_jp.figure6_matrices --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used. With
--bank-only no data are needed, and only cosines are measured: τJp needs test data.

Published, as heat maps only. Figure 6, τJp of every task vector on the test data of
every task: "Compared to Linear FT, Ours shows a notably lower τJp in the off-diagonal
components of the heatmap, i.e., between different datasets." Figure 7, cosines: "In
Linear FT, the cosine similarity between MNIST and SVHN is particularly high, whereas in
Ours, the values are much smaller and comparable to those of other task pairs." The
cosine of Cars and SVHN is higher in Linear FT than in Ours.
"""

import dataclasses

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import banked, options, pairwise, scores
from experiments.tau_jp import pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(banked.Options, options.Models): ...


def of_tau_jp(lengths: pairs.TauJp) -> dict:
    """Returns cells of a row: mean τJp on the own task and on other tasks."""
    cells, others = {}, ~np.eye(len(lengths.norm), dtype=bool)
    for measure, matrix in lengths._asdict().items():
        cells |= {f"own task, {measure}": float(np.diag(matrix).mean())}
        cells |= {f"other tasks, {measure}": float(matrix[others].mean())}
    return cells


def of_cosines(cosines: np.ndarray, names: list[str]) -> dict:
    """Returns cells of a row: mean and largest cosine of two tasks."""
    values = pairwise.pair_values(cosines)
    largest = pairwise.pairs(len(cosines))[int(np.argmax(values))]
    cells = {"mean cosine": float(np.mean(values)), "largest cosine": max(values)}
    return cells | {"pair of the largest cosine": pairs.title(names, largest)}


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    matrices, rows = [], []
    for own in banked.each(config, config.models, control=True):
        lengths, cosines = {}, {}
        for name, method in reversed(pairs.METHODS.items()):  # Ours on the left
            taus = own.vectors(method)
            cosines[name] = banked.cosines(taus)
            row = {"model": own.title, "method": name}
            matrix = row | {"tasks": own.names, "cosines": cosines[name].tolist()}
            if own.setup is not None:
                found = pairs.tau_jp(own.setup, taus)
                lengths[name] = found.norm
                matrix |= {key: x.tolist() for key, x in found._asdict().items()}
                row |= of_tau_jp(found)
            matrices.append(matrix)
            rows.append(row | of_cosines(cosines[name], own.titles))
        if runs.is_first():
            of_model = f"{own.title}.png"
            if lengths:
                file = config.out / f"figure6_{of_model}"
                axes = {"columns": "test data", "value": "τJp"}
                scores.draw_cosines(file, lengths, own.titles, **axes)
            file = config.out / f"figure7_{of_model}"
            scores.draw_cosines(file, cosines, own.titles)
    caption = "Mean τJp, and cosines between tasks. " + banked.note(config)
    return tables.write(
        config.out,
        "τJp and cosines of all pairs (τJp paper, Figures 6 and 7)",
        {caption: rows},
        {"matrices": matrices, "rows": rows},
        digits=3,
    )


if __name__ == "__main__":
    script.run(Config, main)
