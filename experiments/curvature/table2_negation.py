"""Table 2: task negation with the curvature of the control task, beside τJp's images.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.table2_negation --data-dir DATA

Data: those of table1_addition, whose task vectors it takes from the bank: they are
trained with the curvature of the control as well. Its validation images too.

Published, mean test accuracy on the target (to be low) / on the control, in percent.
These figures are taken from secondary texts and are to be checked against the PDF:

    method  coefficient  ViT-B-32    ViT-B-16  ViT-L-14
    τJp     searched     6.7 / 60.8  4.7 / -   3.7 / 73.0
    TAK     searched     3.4 / 62.4  3.4 / -   3.5 / 72.6
"""

from experiments.common import script, tables
from experiments.common.vision import options, scores, vectors

METHODS: dict[str, vectors.Method] = {
    "Linear FT": "linear",
    "τJp": "tau_jp_cyclic",
    "TAK": "curvature",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.Models): ...


def rows_of(setup: options.Setup) -> list[dict]:
    """The rows of one model."""

    def row(method, coef, pair, kept=True, coefs=None):
        return {
            "model": setup.title,
            "method": method,
            "coefficient": coef,
            "target": pair[0],
            "control": pair[1],
            "control kept": "yes" if kept else "no",
            "coefs": coefs,
        }

    rows = []
    for name, method in METHODS.items():
        taus = vectors.vectors(setup, method)
        found = scores.negation(setup, taus, linearized=True)
        if not rows:
            rows.append(row("Pre-trained", "", found.pretrained))
        ones = [1.0] * len(taus)
        rows.append(row(name, "1.0", found.at_one, found.kept[0], ones))
        rows.append(row(name, "searched", found.searched, found.kept[1], found.coefs))
    return rows


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    rows = options.rows(config, rows_of)
    return tables.compared(
        config.out,
        "Task negation with curvature (TAK, Table 2)",
        "Mean test accuracy on the task that is subtracted, to be low, and on the "
        "control, percent. Kept is 95 % of the pre-trained test accuracy; coefficients "
        "are chosen by that of validation data.",
        rows,
        PUBLISHED,
        keys=["model", "method", "coefficient", "control kept"],
        published_keys=["model", "method", "coefficient"],
        values=["target", "control"],
    )


if __name__ == "__main__":
    script.run(Config, main)
