"""Table: addition of ordinary models distilled from linearised ones (DELTA).

Sommariva, Morandi, Calderara, Porrello. Distilling Linearized Behavior into Non-Linear
Fine-Tuning for Effective Task Arithmetic. ICML 2026. arXiv:2605.18993.

    python -m experiments.curvature.table_delta --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used. DELTA
uses only the curvature of the control task (the authors use a part of ImageNet-21k). It
needs no data or factors of other tasks, so a task can be added at any time. A device
holds the curvature once for all tasks. Training updates two models, at the cost of
both.

Published, mean absolute test accuracy in percent. These figures are taken from
secondary texts and are to be checked against the PDF:

    method       coefficient  ViT-B-32
    Individual   -            92.8
    Non-lin. FT  1.0          32.0
    Linear FT    1.0          77.4
    τJp          1.0          85.0
    TAK          1.0          86.0
    DELTA        1.0          88.3

"Individual" uses ordinary vectors. Normalised accuracies are relative to each method's
own single models. TSV-M, Iso-C and TIES merge ordinary vectors. DELTA's curvature has
the weight --delta-coef, which `choose_coef --method delta` chooses; its distillation
has the weight --distill-coef; α is drawn from 0.5 to 1.
"""

from experiments.common import script, tables
from experiments.common.vision import data_free, options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "Non-lin. FT": "nonlinear",
    "Linear FT": "linear",
    "τJp": "tau_jp_cyclic",
    "TAK": "curvature",
    "DELTA": "delta",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.Seeded): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    ordinary = vectors.vectors(setup, "nonlinear")
    found = {name: scores.of_method(setup, method) for name, method in METHODS.items()}
    found |= {
        name: scores.addition(setup, ordinary, linearized=False, merged=merged)
        for name, merged in data_free.merged(setup, ordinary).items()
    }

    def row(method, coef, values):
        return {"model": setup.title, "method": method, "coefficient": coef} | values

    first = found["Non-lin. FT"]
    rows = [row("Individual", "", {"abs": scores.means(first.single), "norm": None})]
    for name, result in found.items():
        single = {"single": scores.means(result.single)}
        for coef in ("1.0", "searched"):
            values = result.row(coef == "searched")
            rows.append(row(name, coef, values | single))
    return rows


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    return tables.compared(
        config.out,
        "Addition of distilled models (DELTA)",
        "Mean absolute and, for ours, normalised test accuracy, percent.",
        rows,
        {key: (*value, None, None) for key, value in PUBLISHED.items()},
        keys=["model", "method", "coefficient"],
        values=["abs", "norm", "single"],
    )


if __name__ == "__main__":
    script.run(Config, main)
