"""Figures 4 and 5: accuracy on every task, for its own model and after addition.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: Appendices E.1 and E.2.

    python -m experiments.tau_jp.figure4_per_task --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, as bars only. Figure 4, every task's own model: "Non-linear FT outperforms
the linearized FT methods (Linear FT and Ours) due to the non-linear advantage"; for
Ours "there is no degradation in performance compared to the original Linear FT".
Figure 5, all eight vectors added: in normalised accuracy "our method not only achieves
the highest accuracy across most tasks but also maintains consistent performance across
all tasks"; in absolute accuracy it "outperforms existing methods on all tasks except
for EuroSAT".

Our Figure 5 uses the coefficient searched on validation data; the paper does not state
its coefficient. report.json also has coefficient 1.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from experiments.tau_jp import pairs
from jaxarith import plots

METHODS: dict[str, vectors.Method] = {"Non-lin. FT": "nonlinear", **pairs.METHODS}


class Config(options.Models): ...


def single_rows(setup: setups.Setup, found: dict[str, scores.Addition]) -> list[dict]:
    """Returns rows of Figure 4: the pre-trained model, and single-task models."""
    groups = {"Pre-trained": found["Non-lin. FT"].zero_shot}
    groups |= {name: result.single for name, result in found.items()}
    return [
        {"model": setup.title, "method": name, **setup.by_task(own)}
        | {"mean": scores.means(own)}
        for name, own in groups.items()
    ]


def added_rows(setup: setups.Setup, found: dict[str, scores.Addition]) -> list[dict]:
    """Returns rows of Figure 5: every method at both coefficients and measures."""
    rows = []
    for name, result in found.items():
        for searched, own in ((False, result.at_one), (True, result.searched)):
            row = {"model": setup.title, "method": name, "searched": searched}
            row["coefficient"] = result.search.coef if searched else 1.0
            normalized = {
                # None if the task's own model has accuracy 0.
                task: 100 * float(accuracy / alone) if alone else None
                for task, accuracy, alone in zip(
                    setup.names, own, result.single, strict=True
                )
            }
            rows.append(row | {"measure": "absolute"} | setup.by_task(own))
            rows.append(row | {"measure": "normalised"} | normalized)
    return rows


def draw(config: Config, setup: setups.Setup, figure: str, rows: list[dict], y: str):
    """Draws a bar for every task and method; missing values have no bar."""
    groups = {
        row["method"]: np.array([row[n] for n in setup.names], float).tolist()
        for row in rows
    }
    file = config.out / f"{figure.format(setup.title)}.png"
    plots.bars(file, groups, setup.titles, y=f"{y}, percent")


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    single, rows = [], []
    for setup in setups.each(config, config.models):
        found = {
            name: scores.of_method(setup, method) for name, method in METHODS.items()
        }
        single += (alone := single_rows(setup, found))
        rows += (added := added_rows(setup, found))
        if runs.is_first():
            draw(config, setup, "figure4_{}", alone, "test accuracy")
            for measure in ("absolute", "normalised"):
                own = [r for r in added if r["measure"] == measure and r["searched"]]
                name = f"figure5_{{}}_{measure}"
                draw(config, setup, name, own, f"{measure} test accuracy")
    shown = [
        {name: value for name, value in row.items() if name != "searched"}
        for row in sorted(rows, key=lambda row: not row["searched"])
    ]
    return tables.write(
        config.out,
        "Accuracy by task (τJp paper, Figures 4 and 5)",
        {
            "Test accuracy of single-task models, percent.": single,
            "Test accuracy after addition, percent: searched coefficient, then 1.": (
                shown
            ),
        },
        {"single": single, "rows": rows},
    )


if __name__ == "__main__":
    script.run(Config, main)
