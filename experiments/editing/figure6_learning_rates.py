"""Figure 6: the learning rate of fine-tuning, and what adding two vectors then gives.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 6.

    python -m experiments.editing.figure6_learning_rates --data-dir DATA

Data: MNIST and EuroSAT. The coefficient of the sum is searched on validation data for
each learning rate.

Published, as a plot only, with ViT-L-14: "lower learning rates make the best use of the
fine-tuned models, and also correspond to the highest accuracies of the fine-tuned
models on the target task." The learning rates of the plot are not in the text; ours are
around 1e-5, that of all other experiments.
"""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options
from experiments.editing import variations
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    out: Path = Path("runs/editing/figure6")
    model: str = options.L14
    tasks: tuple[str, ...] = ("mnist", "eurosat")
    """The two tasks."""
    learning_rates: tuple[float, ...] = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.smoke(config)
    if config.smoke:
        config = dataclasses.replace(
            config, tasks=config.tasks[:2], learning_rates=(1e-3, 1e-2)
        )
    variations.check_pair(config.tasks)
    runs.start(config)
    setup = options.load(config, config.model, control=False)
    rows = []
    for rate in tqdm(config.learning_rates, desc="learning rates"):
        taus = variations.trained(setup, f"lr_{rate:g}", learning_rate=rate)
        rows.append({"learning rate": rate} | variations.added(setup, taus))
    if runs.is_first():
        plots.bars(
            config.out / "figure6.png",
            {
                "fine-tuned models": [row["single"] for row in rows],
                "sum of both vectors": [row["abs"] for row in rows],
            },
            [f"learning rate {row['learning rate']:g}" for row in rows],
            y="accuracy, mean over both tasks, percent",
        )
    results = {"rows": rows}
    shown = [
        {
            "learning rate": f"{row['learning rate']:g}",
            **{name: row[name] for name in ("coefficient", "single", "abs", "norm")},
        }
        for row in rows
    ]
    caption = f"{' + '.join(setup.titles)}: test accuracy, mean over both, percent."
    table = {caption: tables.markdown(shown, digits=2)}
    return tables.write(
        config.out, "Learning rates (editing paper, Figure 6)", table, results
    )


if __name__ == "__main__":
    script.run(Config, main)
