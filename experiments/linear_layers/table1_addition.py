"""Table 1: task addition on eight image tasks at a searched coefficient.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025 (first as: Fine-Tuning Linear
Layers Only Is a Simple yet Effective Way for Task Arithmetic).

    python -m experiments.linear_layers.table1_addition --data-dir DATA
    python -m experiments.linear_layers.table1_addition --out runs/table1_b32 \\
        --models openai/clip-vit-base-patch32

Data: Cars, DTD, EuroSAT, GTSRB, MNIST, RESISC45, SUN397 and SVHN; `jaxarith data check`
says which are missing.

Published, mean absolute / normalised test accuracy in percent:

    method        ViT-B-32       ViT-B-16       ViT-L-14
    Pre-trained   48.40 / -      55.25 / -      66.40 / -
    Non-linear    70.00 / 77.04  74.75 / 80.59  84.40 / 89.47
    Linear (NTK)  76.26 / 85.82  79.01 / 86.32  85.53 / 91.44
    Ours          78.37 / 87.42  80.44 / 87.25  87.91 / 93.66

"Ours" are ordinary vectors; only the weights of attention's query, key, value and
output projections are trained. Our NTK row uses the standard linearisation. The
authors' public code differs: its outputs pass through a ReLU, and the point of
linearisation moves during training.
"""

from experiments.common import script, tables
from experiments.common.vision import merged, options, scores, seeds, setups, vectors

METHODS: dict[str, vectors.Method] = {
    "Non-linear": "nonlinear",
    "Linear (NTK)": "linear",
    "Ours": "linear_layers_1",
}
PUBLISHED = tables.published_by_column(__doc__, "method")


class Config(options.Addition): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    found = {
        label: scores.of_method(setup, method) for label, method in METHODS.items()
    }
    zero_shot = found["Ours"].zero_shot
    before = {"abs": scores.means(zero_shot), "norm": None, "coefficient": None}
    rows = [row(setup, "Pre-trained", zero_shot, before)]
    for label, one in found.items():
        means = one.row(searched=True) | {"coefficient": one.search.coef}
        rows.append(row(setup, label, one.searched, means))
    return rows + merged.rows(setup, METHODS)


def row(setup, label, accuracies, means) -> dict:
    per_task = dict(zip(setup.names, map(float, accuracies), strict=True))
    return {"model": setup.title, "method": label, **means, "per_task": per_task}


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows = seeds.rows(config, rows_of, control=False)
    return tables.compared(
        config.out,
        "Task addition (linear-layers paper, Table 1)",
        "Mean absolute and normalised test accuracy in percent, at the best "
        "coefficient on validation data.",
        rows,
        PUBLISHED,
        keys=["model", "method"],
        values=["abs", "norm"],
        note=merged.note(config),
        digits=2,
    )


if __name__ == "__main__":
    script.run(Config, main)
