"""Tables 1, 5, 6 and 7: forgetting eight image tasks, with ImageNet as control.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi. Editing Models
with Task Arithmetic. ICLR 2023: section 3.1 and Appendix B.

    python -m experiments.editing.table1_forgetting --data-dir DATA
    python -m experiments.editing.table1_forgetting --smoke --out runs/smoke

Data: the eight tasks and ImageNet, whose validation images are the control.

Published, mean test accuracy on the target (to be low) / on the control, in percent;
Tables 5 to 7 have each task, for ViT-L-14, ViT-B-16 and ViT-B-32:

                            ViT-B-32        ViT-B-16        ViT-L-14
    Pre-trained             48.3 / 63.4     55.2 / 68.3     64.8 / 75.5
    Fine-tuned              90.2 / 48.2     92.5 / 58.3     94.0 / 72.6
    Gradient ascent         2.73 / 0.25     1.93 / 0.68     3.93 / 16.3
    Random vector           45.7 / 61.5     53.1 / 66.0     60.9 / 72.9
    Negative task vector    24.0 / 60.9     21.3 / 65.4     19.0 / 72.9

The coefficient is the largest of 0, 0.05, …, 1 with 95 % of the pre-trained control
accuracy. The paper does not say on which data; here on validation data, which of
ImageNet are 5,000 training images. One below a coefficient that is not allowed does
not matter. Gradient ascent is the model as it is trained, at coefficient 1. Of Table 5
the rows of the pre-trained model and of gradient ascent are not at hand by task.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.common import script, tables
from experiments.common.vision import options, vectors
from experiments.editing import forgetting
from jaxarith.data import task_info

PUBLISHED = options.of_models(
    {
        ("Pre-trained",): ((48.3, 63.4), (55.2, 68.3), (64.8, 75.5)),
        ("Fine-tuned",): ((90.2, 48.2), (92.5, 58.3), (94.0, 72.6)),
        ("Gradient ascent",): ((2.73, 0.25), (1.93, 0.68), (3.93, 16.3)),
        ("Random vector",): ((45.7, 61.5), (53.1, 66.0), (60.9, 72.9)),
        ("Negative task vector",): ((24.0, 60.9), (21.3, 65.4), (19.0, 72.9)),
    }
)

# Target and control of every task, in the order of `task_info.EIGHT`.
_TASKS = {
    ("ViT-L-14", "Fine-tuned"): (
        (92.8, 83.7, 99.2, 99.3, 99.8, 96.9, 82.4, 98.0),
        (73.1, 72.3, 70.5, 73.1, 72.9, 73.8, 72.7, 72.6),
    ),
    ("ViT-L-14", "Random vector"): (
        (72.0, 52.1, 59.7, 43.4, 74.8, 70.8, 66.9, 47.1),
        (73.3, 72.2, 73.5, 72.5, 72.8, 73.0, 72.7, 72.9),
    ),
    ("ViT-L-14", "Negative task vector"): (
        (32.0, 26.7, 7.33, 6.45, 2.69, 19.7, 50.8, 6.71),
        (72.4, 72.2, 73.3, 72.2, 74.9, 72.9, 72.6, 72.7),
    ),
    ("ViT-B-16", "Pre-trained"): (
        (64.6, 44.9, 53.9, 43.4, 51.6, 65.8, 65.5, 52.0),
        (68.3,) * 8,
    ),
    ("ViT-B-16", "Fine-tuned"): (
        (87.0, 82.3, 99.1, 99.0, 99.7, 96.4, 79.0, 97.7),
        (61.9, 57.5, 56.0, 54.7, 55.2, 62.2, 61.7, 56.8),
    ),
    ("ViT-B-16", "Gradient ascent"): (
        (0.36, 2.13, 9.26, 0.71, 0.04, 2.60, 0.25, 0.08),
        (0.11, 0.09, 0.14, 0.10, 1.20, 0.10, 0.00, 3.69),
    ),
    ("ViT-B-16", "Random vector"): (
        (61.0, 43.9, 51.7, 43.1, 51.6, 63.6, 63.7, 46.2),
        (65.6, 66.3, 66.2, 65.0, 68.3, 65.6, 65.2, 65.5),
    ),
    ("ViT-B-16", "Negative task vector"): (
        (30.8, 26.5, 12.3, 9.53, 9.55, 26.5, 48.6, 6.43),
        (65.4, 65.6, 65.8, 65.8, 65.4, 65.1, 65.1, 65.4),
    ),
    ("ViT-B-32", "Pre-trained"): (
        (59.6, 44.1, 45.9, 32.5, 48.7, 60.7, 63.2, 31.5),
        (63.4,) * 8,
    ),
    ("ViT-B-32", "Fine-tuned"): (
        (79.2, 78.7, 98.6, 98.5, 99.6, 95.0, 75.1, 97.2),
        (55.2, 49.3, 47.2, 39.1, 42.5, 53.2, 54.6, 44.7),
    ),
    ("ViT-B-32", "Gradient ascent"): (
        (0.01, 2.13, 9.26, 1.19, 0.00, 2.60, 0.25, 6.38),
        (0.11, 0.10, 0.10, 0.07, 1.22, 0.10, 0.01, 0.29),
    ),
    ("ViT-B-32", "Random vector"): (
        (54.1, 39.9, 45.8, 27.9, 48.3, 57.1, 61.3, 31.2),
        (60.9, 61.5, 63.4, 60.7, 63.4, 60.9, 60.5, 60.7),
    ),
    ("ViT-B-32", "Negative task vector"): (
        (36.0, 27.8, 13.6, 8.13, 16.7, 31.7, 50.7, 7.65),
        (61.1, 60.2, 61.3, 61.4, 60.7, 61.0, 60.5, 61.0),
    ),
}
PUBLISHED_TASKS = {
    (*key, task): pair
    for key, columns in _TASKS.items()
    for task, pair in zip(task_info.EIGHT, zip(*columns, strict=True), strict=True)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Forgetting image tasks by negation, gradient ascent and random vectors."""

    out: Path = Path("runs/editing/table1")
    """Folder for report.json and report.md."""


def rows_of(setup: options.Setup) -> list[dict]:
    """The rows of one model; each has its accuracies of every task, `[T, 2]`."""
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
            "target": options.means(accuracies[:, 0]),
            "control": options.means(accuracies[:, 1]),
            "coefs": coefs,
            "tasks": dict(
                zip(setup.names, (100 * np.array(accuracies)).tolist(), strict=True)
            ),
        }
        for method, (accuracies, coefs) in found.items()
    ]


@script.full_precision
def main(config: Config) -> dict:
    """Runs the tables; returns what `report.json` holds."""
    config = options.started(config)
    rows = [
        row for setup in options.setups(config, config.models) for row in rows_of(setup)
    ]
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
    results = {"rows": rows}
    shown = {
        "Table 1. Mean test accuracy on the task to be forgotten and on the control, "
        "percent.": tables.markdown(mean, digits=2),
        "Tables 5, 6 and 7. The same of every task.": tables.markdown(single, digits=2),
    }
    return tables.write(
        config.out, "Forgetting image tasks (editing paper, Table 1)", shown, results
    )


if __name__ == "__main__":
    script.run(Config, main)
