"""Figures 6 and 7: τJp and cosines of the task vectors of all pairs of tasks.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: Appendices E.3 and E.4.

    python -m experiments.tau_jp.figure6_matrices --data-dir DATA

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as heat maps only. Figure 6, τJp of every task vector on the test data of
every task: "Compared to Linear FT, Ours shows a notably lower τJp in the off-diagonal
components of the heatmap, i.e., between different datasets." Figure 7, cosines: "In
Linear FT, the cosine similarity between MNIST and SVHN is particularly high, whereas in
Ours, the values are much smaller and comparable to those of other task pairs." That of
Cars and SVHN is higher in Linear FT than in Ours.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from experiments.tau_jp import pairs
from jaxarith import task_vectors


class Config(options.Models): ...


def row_of(setup: setups.Setup, lengths: pairs.TauJp, cosines: np.ndarray) -> dict:
    """Mean τJp on the own and on other tasks; mean and largest cosine of two tasks."""
    row, others = {}, ~np.eye(len(setup.tasks), dtype=bool)
    for measure, matrix in lengths._asdict().items():
        row |= {f"own task, {measure}": float(np.diag(matrix).mean())}
        row |= {f"other tasks, {measure}": float(matrix[others].mean())}
    values = scores.pair_values(cosines)
    largest = scores.pairs(len(cosines))[int(np.argmax(values))]
    row |= {"mean cosine": float(np.mean(values)), "largest cosine": max(values)}
    return row | {"pair of the largest cosine": pairs.title(setup, largest)}


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    matrices, rows = [], []
    for setup in setups.each(config, config.models):
        lengths, cosines = {}, {}
        for name, method in reversed(pairs.METHODS.items()):  # Ours is on the left
            taus = vectors.vectors(setup, method)
            found = pairs.tau_jp(setup, taus)
            lengths[name] = found.norm
            cosines[name] = np.asarray(task_vectors.cosine_matrix(taus), float)
            row = {"model": setup.title, "method": name}
            own = {name: x.tolist() for name, x in found._asdict().items()}
            own["cosines"] = cosines[name].tolist()
            matrices.append(row | {"tasks": setup.names} | own)
            rows.append(row | row_of(setup, found, cosines[name]))
        if runs.is_first():
            axes = {"columns": "test data", "value": "τJp"}
            scores.draw_cosines(setup, f"figure6_{setup.title}.png", lengths, **axes)
            scores.draw_cosines(setup, f"figure7_{setup.title}.png", cosines)
    return tables.write(
        config.out,
        "τJp and cosines of all pairs (τJp paper, Figures 6 and 7)",
        {"Mean τJp, and cosines of different tasks.": rows},
        {"matrices": matrices, "rows": rows},
        digits=3,
    )


if __name__ == "__main__":
    script.run(Config, main)
