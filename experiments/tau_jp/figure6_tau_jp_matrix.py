"""Figure 6: τJp of every task vector on the test data of every task.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix E.3.

    python -m experiments.tau_jp.figure6_tau_jp_matrix --data-dir DATA
    python -m experiments.tau_jp.figure6_tau_jp_matrix --smoke --out runs/smoke

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as heat maps only: "Compared to Linear FT, Ours shows a notably lower τJp in
the off-diagonal components of the heatmap, i.e., between different datasets."

The numbers in the cells are means of ‖J(x)τ‖, as the code of the paper measures it, so
that they can be held against the published ones; report.json has the means of the
square (Eq. 9) too.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, vectors
from experiments.tau_jp import pairs
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Measure τJp of linearised and of τJp vectors."""

    out: Path = Path("runs/tau_jp/figure6")
    """Folder for figure6_<model>.png, report.json and report.md."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    matrices, rows = [], []
    for setup in options.setups(config, config.models):
        panels = {}
        for name, method in reversed(pairs.METHODS.items()):  # Ours is on the left
            found = pairs.tau_jp(setup, vectors.vectors(setup, method))
            panels[name] = found.norm
            row = {"model": setup.title, "method": name}
            plain = {"norm": found.norm.tolist(), "square": found.square.tolist()}
            matrices.append(row | {"tasks": setup.names} | plain)
            others = ~np.eye(len(setup.tasks), dtype=bool)
            for measure, matrix in found._asdict().items():
                row |= {f"own task, {measure}": float(np.diag(matrix).mean())}
                row |= {f"other tasks, {measure}": float(matrix[others].mean())}
            rows.append(row)
        if runs.is_first():
            plots.matrices(
                config.out / f"figure6_{setup.title}.png",
                panels,
                setup.titles,
                rows="task vector",
                columns="test data",
                value="τJp",
            )
    results = {"matrices": matrices, "rows": rows}
    table = {"Mean τJp.": tables.markdown(rows, digits=3)}
    tables.write(config.out, "τJp of all pairs (τJp, Fig. 6)", table, results)
    return results


if __name__ == "__main__":
    script.run(Config, main)
