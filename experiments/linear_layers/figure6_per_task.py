"""Figure 6: single-task accuracies of non-linear, NTK and attention-only fine-tuning.

Jin et al. Fine-Tuning Attention Modules Only: Enhancing Weight Disentanglement in Task
Arithmetic. ICLR 2025.

    python -m experiments.linear_layers.figure6_per_task --data-dir DATA

Data: those of table1_addition, whose task vectors it takes from the bank.

Published as a picture of three models, of which the text says no more. The means over
the tasks are those of Figure 3.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

from experiments.common import runs, script, tables
from experiments.common.vision import options
from experiments.linear_layers import single
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Single-task accuracies on every task."""

    out: Path = Path("runs/linear_layers/figure6")
    """Folder for report.json, report.md and a picture of every model."""


@script.full_precision
def main(config: Config) -> dict:
    """Makes the figure; returns what `report.json` holds."""
    config = options.started(config)
    rows = []
    for setup in options.setups(config, config.models, control=False):
        found = single.accuracies(setup)
        for label, accuracies in found.items():
            per_task = dict(zip(setup.titles, map(float, accuracies), strict=True))
            rows.append({"model": setup.title, "method": label} | per_task)
        if runs.is_first():
            plots.bars(
                config.out / f"per_task_{setup.title}.png",
                found,
                setup.titles,
                y=f"{setup.title}, test accuracy (%)",
            )
    results = {"rows": rows}
    table = {"Test accuracy of the tasks' own models, percent.": tables.markdown(rows)}
    title = "Single-task accuracies (linear layers, Figure 6)"
    tables.write(config.out, title, table, results)
    return results


if __name__ == "__main__":
    script.run(Config, main)
