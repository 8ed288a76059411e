"""Figure 4: accuracy of every task's own model, by way of fine-tuning.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: Appendix E.1.

    python -m experiments.tau_jp.figure4_single_task --data-dir DATA

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as bars only: "Non-linear FT outperforms the linearized FT methods (Linear FT
and Ours) due to the non-linear advantage", and of Ours "there is no degradation in
performance compared to the original Linear FT".
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, vectors
from experiments.tau_jp import pairs
from jaxarith import plots

METHODS: dict[str, vectors.Method] = {"Non-lin. FT": "nonlinear", **pairs.METHODS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    out: Path = Path("runs/tau_jp/figure4")


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    rows = []
    for setup in options.setups(config, config.models):
        found = {
            name: scores.single_accuracies(setup, method)
            for name, method in METHODS.items()
        }
        groups = {"Pre-trained": found["Non-lin. FT"][0]}
        groups |= {name: after for name, (_, after) in found.items()}
        for name, accuracies in groups.items():
            values = dict(zip(setup.names, map(float, accuracies), strict=True))
            mean = {"mean": float(np.mean(accuracies))}
            rows.append({"model": setup.title, "method": name} | values | mean)
        if runs.is_first():
            plots.bars(
                config.out / f"figure4_{setup.title}.png",
                groups,
                setup.titles,
                y="test accuracy, percent",
            )
    results = {"rows": rows}
    table = {"Test accuracy, percent.": tables.markdown(rows)}
    return tables.write(
        config.out, "Single tasks (τJp paper, Figure 4)", table, results
    )


if __name__ == "__main__":
    script.run(Config, main)
