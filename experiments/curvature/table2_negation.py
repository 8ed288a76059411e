"""Table 2: task negation with the curvature of the control task, beside τJp's images.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.table2_negation --data-dir DATA

Data: the same as for `table1_addition`, and the validation images of the control. The
task vectors of `table1_addition` in the bank are used; they are also trained with the
curvature of the control.

Published, mean test accuracy in percent on the target (should be low) / on the control.
These figures are taken from secondary texts and are to be checked against the PDF:

    method  coefficient  ViT-B-32    ViT-B-16  ViT-L-14
    τJp     searched     6.7 / 60.8  4.7 / -   3.7 / 73.0
    TAK     searched     3.4 / 62.4  3.4 / -   3.5 / 72.6
"""

from experiments.common import script, tables
from experiments.common.vision import negations, options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "Linear FT": "linear",
    "τJp": "tau_jp_cyclic",
    "TAK": "curvature",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.Seeded): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    found = {
        name: scores.negation(setup, vectors.vectors(setup, method), linearized=True)
        for name, method in METHODS.items()
    }
    return negations.rows(setup, found)


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    title = "Task negation with curvature (TAK, Table 2)"
    return negations.report(config.out, title, rows, PUBLISHED)


if __name__ == "__main__":
    script.run(Config, main)
