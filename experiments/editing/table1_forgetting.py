"""Tables 1, 5, 6 and 7: forgetting eight image tasks, with ImageNet as control.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 3.1, B.

    python -m experiments.editing.table1_forgetting --data-dir DATA

Data: the eight tasks, and the validation images of ImageNet as the control.

Published, mean test accuracy in percent on the target (should be low) / on the control:

    method                ViT-B-32     ViT-B-16     ViT-L-14
    Pre-trained           48.3 / 63.4  55.2 / 68.3  64.8 / 75.5
    Fine-tuned            90.2 / 48.2  92.5 / 58.3  94.0 / 72.6
    Gradient ascent       2.73 / 0.25  1.93 / 0.68  3.93 / 16.3
    Random vector         45.7 / 61.5  53.1 / 66.0  60.9 / 72.9
    Negative task vector  24.0 / 60.9  21.3 / 65.4  19.0 / 72.9

Tables 5, 6 and 7, the same for every task, with ViT-L-14, ViT-B-16 and ViT-B-32:

    ViT-L-14       Fine-tuned   Random       Negative
    stanford_cars  92.8 / 73.1  72.0 / 73.3  32.0 / 72.4
    dtd            83.7 / 72.3  52.1 / 72.2  26.7 / 72.2
    eurosat        99.2 / 70.5  59.7 / 73.5  7.33 / 73.3
    gtsrb          99.3 / 73.1  43.4 / 72.5  6.45 / 72.2
    mnist          99.8 / 72.9  74.8 / 72.8  2.69 / 74.9
    resisc45       96.9 / 73.8  70.8 / 73.0  19.7 / 72.9
    sun397         82.4 / 72.7  66.9 / 72.7  50.8 / 72.6
    svhn           98.0 / 72.6  47.1 / 72.9  6.71 / 72.7

    ViT-B-16       Pre-trained  Fine-tuned   Ascent       Random       Negative
    stanford_cars  64.6 / 68.3  87.0 / 61.9  0.36 / 0.11  61.0 / 65.6  30.8 / 65.4
    dtd            44.9 / 68.3  82.3 / 57.5  2.13 / 0.09  43.9 / 66.3  26.5 / 65.6
    eurosat        53.9 / 68.3  99.1 / 56.0  9.26 / 0.14  51.7 / 66.2  12.3 / 65.8
    gtsrb          43.4 / 68.3  99.0 / 54.7  0.71 / 0.10  43.1 / 65.0  9.53 / 65.8
    mnist          51.6 / 68.3  99.7 / 55.2  0.04 / 1.20  51.6 / 68.3  9.55 / 65.4
    resisc45       65.8 / 68.3  96.4 / 62.2  2.60 / 0.10  63.6 / 65.6  26.5 / 65.1
    sun397         65.5 / 68.3  79.0 / 61.7  0.25 / 0.00  63.7 / 65.2  48.6 / 65.1
    svhn           52.0 / 68.3  97.7 / 56.8  0.08 / 3.69  46.2 / 65.5  6.43 / 65.4

    ViT-B-32       Pre-trained  Fine-tuned   Ascent       Random       Negative
    stanford_cars  59.6 / 63.4  79.2 / 55.2  0.01 / 0.11  54.1 / 60.9  36.0 / 61.1
    dtd            44.1 / 63.4  78.7 / 49.3  2.13 / 0.10  39.9 / 61.5  27.8 / 60.2
    eurosat        45.9 / 63.4  98.6 / 47.2  9.26 / 0.10  45.8 / 63.4  13.6 / 61.3
    gtsrb          32.5 / 63.4  98.5 / 39.1  1.19 / 0.07  27.9 / 60.7  8.13 / 61.4
    mnist          48.7 / 63.4  99.6 / 42.5  0.00 / 1.22  48.3 / 63.4  16.7 / 60.7
    resisc45       60.7 / 63.4  95.0 / 53.2  2.60 / 0.10  57.1 / 60.9  31.7 / 61.0
    sun397         63.2 / 63.4  75.1 / 54.6  0.25 / 0.01  61.3 / 60.5  50.7 / 60.5
    svhn           31.5 / 63.4  97.2 / 44.7  6.38 / 0.29  31.2 / 60.7  7.65 / 61.0

The coefficient is the largest of 0, 0.05, …, 1 that keeps 95 % of the pre-trained
control accuracy, also if a smaller coefficient does not keep it. The paper does not say
on which data; we use validation data, for ImageNet 5,000 training images. Gradient
ascent is the trained model, at coefficient 1. We do not know the rows of Table 5 for
the pre-trained model and for gradient ascent.
"""

import numpy as np

from experiments.common import script, tables
from experiments.common.vision import options, scores, seeds, setups, vectors
from experiments.editing import forgetting

PUBLISHED = tables.published_by_column(__doc__, "method")
_NAMES = {  # from the columns of Tables 5 to 7 to methods
    "Ascent": "Gradient ascent",
    "Random": "Random vector",
    "Negative": "Negative task vector",
}
PUBLISHED_TASKS = {
    (title, _NAMES.get(method, method), task): pair
    for title in options.TITLES.values()
    for (method, task), pair in tables.published_by_column(__doc__, title).items()
}


class Config(options.Seeded): ...


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model; each has accuracies of every task, `[T, 2]`."""
    nonlinear = vectors.vectors(setup, "nonlinear")
    negative = forgetting.negation(setup, nonlinear)
    drawn = forgetting.negation(setup, vectors.vectors(setup, "random"))
    ascent = vectors.vectors(setup, "gradient_ascent")
    trained = [forgetting.curves(setup, x, [1.0])[..., 0] for x in (nonlinear, ascent)]
    found = {
        "Pre-trained": (negative.accuracies[..., 0], None),
        "Fine-tuned": (trained[0], None),
        "Gradient ascent": (trained[1], None),
        "Random vector": (drawn.accuracies[..., 2], drawn.coefs),
        "Negative task vector": (negative.accuracies[..., 2], negative.coefs),
    }
    return [
        {
            "model": setup.title,
            "method": method,
            "target": scores.means(accuracies[:, 0]),
            "control": scores.means(accuracies[:, 1]),
            "coefs": coefs,
            "tasks": dict(
                zip(setup.names, (100 * np.array(accuracies)).tolist(), strict=True)
            ),
        }
        for method, (accuracies, coefs) in found.items()
    ]


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    rows = seeds.rows(config, rows_of)
    values = ["target", "control"]
    of_tasks = [
        {"model": row["model"], "method": row["method"], "task": task}
        | dict(zip(values, pair, strict=True))
        for row in rows
        for task, pair in row["tasks"].items()
    ]
    mean = tables.beside(rows, PUBLISHED, keys=["model", "method"], values=values)
    single = tables.beside(
        of_tasks, PUBLISHED_TASKS, keys=["model", "method", "task"], values=values
    )
    shown = {
        "Table 1: mean test accuracy on the target and on the control, percent.": mean,
        "Tables 5, 6 and 7: the same for every task.": single,
    }
    title = "Forgetting image tasks (editing paper, Table 1)"
    return tables.write(config.out, title, shown, {"rows": rows}, digits=2)


if __name__ == "__main__":
    script.run(Config, main)
