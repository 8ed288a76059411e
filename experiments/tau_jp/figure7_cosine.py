"""Figure 7: cosines of the task vectors of all pairs of tasks.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix E.4.

    python -m experiments.tau_jp.figure7_cosine --data-dir DATA
    python -m experiments.tau_jp.figure7_cosine --smoke --out runs/smoke

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as heat maps only: "In Linear FT, the cosine similarity between MNIST and
SVHN is particularly high, whereas in Ours, the values are much smaller and comparable
to those of other task pairs." That of Cars and SVHN is higher in Linear FT than in
Ours.

Not run at full scale yet; beyond training it takes seconds.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, vectors
from experiments.tau_jp import pairs
from jaxarith import plots, task_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Compare the directions of linearised and of τJp vectors."""

    out: Path = Path("runs/tau_jp/figure7")
    """Folder for figure7_<model>.png, report.json and report.md."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    matrices, rows = [], []
    for setup in options.setups(config, config.models):
        panels = {}
        for name, method in reversed(pairs.METHODS.items()):  # Ours is on the left
            taus = vectors.vectors(setup, method)
            found = np.asarray(task_vectors.cosine_matrix(taus), float)
            panels[name] = found
            row = {"model": setup.title, "method": name}
            matrices.append(row | {"tasks": setup.names, "cosines": found.tolist()})
            values = scores.pair_values(found)
            largest = scores.pairs(len(taus))[int(np.argmax(values))]
            row |= {"mean": float(np.mean(values)), "largest": max(values)}
            rows.append(row | {"pair of the largest": pairs.title(setup, largest)})
        if runs.is_first():
            plots.matrices(
                config.out / f"figure7_{setup.title}.png",
                panels,
                setup.titles,
                rows="task vector",
                columns="task vector",
                value="cosine",
            )
    results = {"matrices": matrices, "rows": rows}
    table = {"Cosines of different tasks.": tables.markdown(rows, digits=3)}
    tables.write(config.out, "Cosines of all pairs (τJp, Fig. 7)", table, results)
    return results


if __name__ == "__main__":
    script.run(Config, main)
