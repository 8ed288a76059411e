"""Figure 3: mean single-task accuracies, non-linear against the two linear ways.

Jin et al. Fine-Tuning Attention Modules Only: Enhancing Weight Disentanglement in Task
Arithmetic. ICLR 2025.

    python -m experiments.linear_layers.figure3_single_task_mean --data-dir DATA

Data: those of table1_addition, whose task vectors it takes from the bank.

Published as a picture of three models. Where NTK linearisation lies below the diagonal,
training the attention's weights alone lies nearer to it: it loses less against ordinary
fine-tuning. The one number in the text is that of Table 2, 89.55 % on ViT-B-32 (ours).

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

from experiments.common import runs, script, tables
from experiments.common.vision import options
from experiments.linear_layers import single
from jaxarith import plots

PUBLISHED = {(options.TITLES[options.B32], "Ours"): (89.55,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Mean single-task accuracies of non-linear and linear models."""

    out: Path = Path("runs/linear_layers/figure3")
    """Folder for report.json, report.md and single_task_mean.png."""


@script.full_precision
def main(config: Config) -> dict:
    """Makes the figure; returns what `report.json` holds."""
    config = options.started(config)
    rows = []
    for setup in options.setups(config, config.models, control=False):
        for label, found in single.accuracies(setup).items():
            row = {"model": setup.title, "method": label, "mean": float(found.mean())}
            rows.append(row)
    beside = tables.beside(rows, PUBLISHED, keys=["model", "method"], values=["mean"])
    results = {"rows": rows}
    caption = "Mean test accuracy of the tasks' own models, percent."
    table = {caption: tables.markdown(beside, digits=2)}
    title = "Single-task means (linear layers, Figure 3)"
    tables.write(config.out, title, table, results)
    if runs.is_first():
        means = {
            label: [row["mean"] for row in rows if row["method"] == label]
            for label in single.METHODS
        }
        reference = means.pop("Non-linear")
        plots.against(
            config.out / "single_task_mean.png",
            means,
            reference,
            list(dict.fromkeys(row["model"] for row in rows)),
            x="non-linear, mean single-task accuracy (%)",
            y="linear, mean single-task accuracy (%)",
        )
    return results


if __name__ == "__main__":
    script.run(Config, main)
