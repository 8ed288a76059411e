"""Table 5: the τJp penalty on the tasks that came before, against that on all.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025, section 4.3.1.

    python -m experiments.tau_jp.table5_incremental --out runs/table5 --data-dir DATA

Data: those of table1_addition, whose task vectors it takes from the bank. The order is
that of --tasks.

Published, mean absolute / normalised test accuracy in percent; "No reg." is Linear FT:

    method            coefficient  ViT-B-32
    No reg.           searched     74.3 / 85.0
    Incremental reg.  searched     83.6 / 96.5
    Full reg.         searched     84.5 / 97.6

In the authors' code ImageNet is among the tasks of an increment, without which the
first would have none; here the increment without a control is a row of its own. The
published figures are those at searched coefficients.
"""

from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "No reg.": "linear",
    "Incremental reg.": "tau_jp_incremental",
    "Incremental reg., no control": "tau_jp_incremental_no_control",
    "Full reg.": "tau_jp_cyclic",
}
PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.OneModel): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    setup = setups.load(config, config.model)
    return tables.compared(
        config.out,
        "Incremental regularisation (τJp paper, Table 5)",
        "Mean absolute and normalised test accuracy, percent.",
        scores.linearized_rows(setup, METHODS),
        PUBLISHED,
        keys=["model", "method", "coefficient"],
        values=["abs", "norm"],
    )


if __name__ == "__main__":
    script.run(Config, main)
