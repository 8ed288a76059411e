"""Table 2: task negation on eight image tasks, with ImageNet as control.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025.

    python -m experiments.tau_jp.table2_negation --out runs/table2 --data-dir DATA

Data: the same as for `table1_addition`, and ImageNet's validation images. The task
vectors of `table1_addition` in the bank are used.

Published, mean test accuracy in percent on the target (should be low) / on the control.
Brackets: the control accuracy is below 95 % of the pre-trained one:

    method       coefficient  ViT-B-32       ViT-B-16       ViT-L-14
    Pre-trained  -            47.3 / 66.7    54.5 / 69.3    65.1 / 77.3
    Non-lin. FT  1.0          (10.9 / 44.7)  (10.8 / 51.6)  (15.2 / 68.6)
    Non-lin. FT  searched     24.0 / 60.7    20.3 / 64.7    18.4 / 72.4
    Linear FT    1.0          (6.3 / 57.2)   (5.4 / 62.2)   (3.0 / 67.9)
    Linear FT    searched     11.8 / 60.6    8.8 / 65.0     8.3 / 72.2
    TIES         1.0          21.8 / 61.6    24.3 / 67.0    26.6 / 74.4
    TIES         searched     21.8 / 61.7    24.3 / 67.0    26.6 / 74.4
    Ours         1.0          11.8 / 62.5    11.8 / 67.8    15.1 / 75.1
    Ours         searched     6.7 / 60.8     4.7 / 66.0     3.7 / 73.0

The pre-trained row and the 95 % seem to use validation data, with 5,000 held-out
training images of ImageNet as control: 60.7 is above 0.95 · 63.3 (63.3 is the accuracy
on ImageNet's validation images), and below 0.95 · 66.7. TIES of a single vector only
trims it: it keeps a tenth of the entries of each ordinary vector.
"""

from experiments.common import script, tables
from experiments.common.vision import negations, options, scores, seeds, setups, vectors
from jaxarith import merge, task_vectors

PUBLISHED = tables.published_by_column(__doc__, "method", "coefficient")


class Config(options.Seeded): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    nonlinear = vectors.vectors(setup, "nonlinear")
    trimmed = [
        task_vectors.difference(
            merge.ties(setup.params_0, [tau], density=0.1, coef=1.0), setup.params_0
        )
        for tau in nonlinear
    ]
    linear = vectors.vectors(setup, "linear")
    ours = vectors.vectors(setup, "tau_jp_cyclic")
    found = {
        "Non-lin. FT": scores.negation(setup, nonlinear, linearized=False),
        "Linear FT": scores.negation(setup, linear, linearized=True),
        "TIES": scores.negation(setup, trimmed, linearized=False),
        "Ours": scores.negation(setup, ours, linearized=True),
    }

    return negations.rows(setup, found)


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    title = "Task negation (τJp paper, Table 2)"
    return negations.report(config.out, title, rows, PUBLISHED)


if __name__ == "__main__":
    script.run(Config, main)
