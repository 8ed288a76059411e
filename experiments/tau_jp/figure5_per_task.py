"""Figure 5: accuracy on every task after all eight task vectors are added.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: Appendix E.2.

    python -m experiments.tau_jp.figure5_per_task --data-dir DATA

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as bars only: of normalised accuracy "our method not only achieves the
highest accuracy across most tasks but also maintains consistent performance across all
tasks"; of absolute accuracy it "outperforms existing methods on all tasks except for
EuroSAT".

The figure is at the coefficient that is searched on validation data, which the paper
does not say; report.json has coefficient 1 too.
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
    out: Path = Path("runs/tau_jp/figure5")


def rows_of(setup: options.Setup) -> list[dict]:
    """Per-task accuracies of every method, at both coefficients."""
    rows = []
    for name, method in METHODS.items():
        result = scores.addition(
            setup,
            vectors.vectors(setup, method),
            linearized=vectors.is_linearized(method),
        )
        for coef, found in ((1.0, result.at_one), (None, result.searched)):
            norms = [
                # A task that its own model does not learn at all has none.
                100 * float(accuracy / alone) if alone else None
                for accuracy, alone in zip(found, result.single, strict=True)
            ]
            for measure, values in (
                ("absolute", [100 * float(accuracy) for accuracy in found]),
                ("normalised", norms),
            ):
                rows.append(
                    {
                        "model": setup.title,
                        "measure": measure,
                        "method": name,
                        "searched": coef is None,
                        "coefficient": result.search.coef if coef is None else coef,
                    }
                    | dict(zip(setup.names, values, strict=True))
                )
    return rows


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    rows = []
    for setup in options.setups(config, config.models):
        rows += (own := rows_of(setup))
        for measure in ("absolute", "normalised"):
            groups = {
                row["method"]: np.array([row[n] for n in setup.names], float).tolist()
                for row in own
                if row["measure"] == measure and row["searched"]
            }
            if runs.is_first():
                plots.bars(
                    config.out / f"figure5_{setup.title}_{measure}.png",
                    groups,
                    setup.titles,
                    y=f"{measure} test accuracy, percent",
                )
    results = {"rows": rows}
    shown = [
        {name: value for name, value in row.items() if name != "searched"}
        for row in sorted(rows, key=lambda row: not row["searched"])
    ]
    table = {
        "Test accuracy after addition, percent. Coefficient searched, then 1.": (
            tables.markdown(shown)
        )
    }
    return tables.write(
        config.out, "Addition by task (τJp paper, Figure 5)", table, results
    )


if __name__ == "__main__":
    script.run(Config, main)
