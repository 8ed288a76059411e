"""Figures 3 and 6: single-task accuracies, non-linear against two linear methods.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025.

    python -m experiments.linear_layers.figure3_single_tasks --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published as pictures of three models: Figure 3 has the means over the tasks, Figure 6
every task. In Figure 3, NTK linearisation lies below the diagonal. Training only the
weights of attention lies nearer to it: it loses less against ordinary fine-tuning. The
only number in the text is the mean of Table 2, in percent:

    method  ViT-B-32
    Ours    89.55
"""

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import plots

METHODS: dict[str, vectors.Method] = {
    "Non-linear": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}
PUBLISHED = tables.published_by_column(__doc__, "method")


class Config(options.Models): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = []
    for setup in setups.each(config, config.models, control=False):
        found = {
            label: scores.single_accuracies(setup, method)[1]
            for label, method in METHODS.items()
        }
        for label, accuracies in found.items():
            row = {"model": setup.title, "method": label}
            row |= dict(zip(setup.titles, map(float, accuracies), strict=True))
            rows.append(row | {"mean": float(accuracies.mean())})
        if runs.is_first():
            plots.bars(
                config.out / f"per_task_{setup.title}.png",
                found,
                setup.titles,
                y=f"{setup.title}, test accuracy (%)",
            )
    if runs.is_first():
        means = {
            label: [row["mean"] for row in rows if row["method"] == label]
            for label in METHODS
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
    names = [name for name in rows[0] if name not in ("model", "method", "mean")]
    return tables.compared(
        config.out,
        "Single-task accuracies (linear-layers paper, Figures 3 and 6)",
        "Test accuracy of single-task models, percent.",
        rows,
        PUBLISHED,
        keys=["model", "method", *names],
        values=["mean"],
        published_keys=["model", "method"],
        digits=2,
    )


if __name__ == "__main__":
    script.run(Config, main)
