"""Table 7: task addition against multi-task learning, and the data that each needs.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025, App. D.

    python -m experiments.tau_jp.table7_multi_task --out runs/table7 --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, mean absolute test accuracy in percent at searched coefficients:

    method       ViT-B-32  ViT-B-16  ViT-L-14
    Non-lin. FT  70.4      75.5      84.0
    Linear FT    74.3      78.7      85.5
    Ours         84.5      87.6      90.8
    MTL          87.8      90.8      92.6

The table also lists what each method needs: x are images and y are labels, "self" of
the trained task, "other" of the other tasks. A model is flexible if single tasks can be
changed after training. In the paper's Table 1, Linear FT of ViT-L-14 has 85.8.
"""

from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors
from experiments.tau_jp import pairs

NEEDS = {
    "Non-lin. FT": ("x_self, y_self", "yes"),
    "Linear FT": ("x_self, y_self", "yes"),
    "Ours": ("x_self, y_self, x_other", "yes"),
    "MTL": ("x_self, y_self, x_other, y_other", "no"),
}
METHODS: dict[str, vectors.Method] = {"Non-lin. FT": "nonlinear", **pairs.METHODS}
PUBLISHED = tables.published_by_column(__doc__, "method")


class Config(options.Models): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = []
    for setup in setups.each(config, config.models):
        found = {
            name: scores.of_method(setup, method).searched
            for name, method in METHODS.items()
        }
        found["MTL"] = scores.joint_accuracies(setup)
        for method, accuracies in found.items():
            needs, flexible = NEEDS[method]
            row = {"model": setup.title, "method": method}
            row |= {"abs": scores.means(accuracies)}
            rows.append(row | {"needs": needs, "flexible": flexible})
    return tables.compared(
        config.out,
        "Multi-task learning (τJp paper, Table 7)",
        "Mean absolute test accuracy, percent.",
        rows,
        PUBLISHED,
        keys=["model", "method", "needs", "flexible"],
        published_keys=["model", "method"],
        values=["abs"],
    )


if __name__ == "__main__":
    script.run(Config, main)
