"""Table 5: the τJp penalty on earlier tasks only, against the penalty on all tasks.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025, section 4.3.1.

    python -m experiments.tau_jp.table5_incremental --out runs/table5 --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used. The
order of the tasks is that of --tasks.

Published, mean absolute / normalised test accuracy in percent; "No reg." is Linear FT:

    method            coefficient  ViT-B-32
    No reg.           searched     74.3 / 85.0
    Incremental reg.  searched     83.6 / 96.5
    Full reg.         searched     84.5 / 97.6

In the authors' code ImageNet is always one of the protected tasks; without it the first
task would have none. Here the incremental penalty without a control has its own row.
The published figures are at searched coefficients.
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
