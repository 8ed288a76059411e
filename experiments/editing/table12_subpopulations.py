"""Table 12 and Figure 4: learns a subpopulation by analogy, and from few samples.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 5, E.3.

    python -m experiments.editing.table12_subpopulations --sketch sketches=FOLDER \\
        --photo imagenet=FOLDER

Data: two image folders with the same classes, <split>/<class>/. The paper uses the 125
classes that ImageNet shares with the sketches of Eitz et al. (2012). Any two styles of
the same classes work: `--sketch usps=digits/usps --photo mnist=digits/mnist`.

The first half of the classes is A, the other is B. Then sketches of A are sketches of B
plus photographs of A minus photographs of B, and in the same way for each of the four.
Vectors are trained for 500 steps. The coefficient of the sum is the best of 0, 0.1, …,
1 on validation data of the target. Then the pre-trained or the edited model trains on k
samples of every class of the target, for another 500 steps. The paper always has a
warm-up of 200 steps; here it is a tenth of the steps, as for 2000.

Published, accuracy by the number of samples per class of the target, without and with
task vectors:

    ViT-B-32  task vectors  Sketches-A  Sketches-B  ImageNet-A  ImageNet-B  Average
    0         no            0.712       0.677       0.861       0.923       0.793
    0         yes           0.782       0.758       0.861       0.926       0.832
    1         no            0.754       0.758       0.868       0.919       0.825
    1         yes           0.782       0.766       0.866       0.922       0.834
    2         no            0.768       0.778       0.868       0.919       0.833
    2         yes           0.786       0.800       0.867       0.922       0.844
    4         no            0.810       0.780       0.871       0.926       0.847
    4         yes           0.802       0.796       0.871       0.927       0.849

    ViT-B-16  task vectors  Sketches-A  Sketches-B  ImageNet-A  ImageNet-B  Average
    0         no            0.716       0.732       0.885       0.946       0.820
    0         yes           0.794       0.794       0.889       0.953       0.858
    1         no            0.758       0.812       0.894       0.948       0.853
    1         yes           0.796       0.804       0.897       0.957       0.863
    2         no            0.792       0.817       0.897       0.951       0.865
    2         yes           0.804       0.829       0.899       0.956       0.872
    4         no            0.815       0.812       0.904       0.952       0.871
    4         yes           0.831       0.825       0.904       0.953       0.878

    ViT-L-14  task vectors  Sketches-A  Sketches-B  ImageNet-A  ImageNet-B  Average
    0         no            0.823       0.831       0.913       0.962       0.882
    0         yes           0.879       0.861       0.922       0.968       0.908
    1         no            0.845       0.863       0.923       0.971       0.900
    1         yes           0.879       0.863       0.930       0.973       0.911
    2         no            0.865       0.881       0.925       0.973       0.911
    2         yes           0.875       0.881       0.932       0.975       0.916
    4         no            0.875       0.883       0.934       0.973       0.916
    4         yes           0.903       0.887       0.941       0.975       0.927

Published for independent coefficients (--independent), in the paper's text: λ_B = λ_C =
0.32 and λ_A = 0.28 on average, 0.7 points better than a single one. The paper does not
say which classes are in which half.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, raw_tasks, scores, setups, vectors
from experiments.editing import custom
from jaxarith import plots
from jaxarith.data import images
from jaxarith.models import clip
from jaxarith.typing import Tree

COEFS = np.linspace(0, 1, 11)
VALUES = ("Sketches-A", "Sketches-B", "ImageNet-A", "ImageNet-B", "Average")
PUBLISHED = {
    (title, *key): values
    for title in options.TITLES.values()
    for key, values in tables.published(__doc__, title, "task vectors").items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    tasks: tuple[str, ...] = ()
    """Not used: the tasks come from --sketch and --photo."""
    sketch: str = "sketches=sketches"
    """The first style, NAME=FOLDER."""
    photo: str = "photos=photos"
    """The second style, NAME=FOLDER, with the same classes."""
    shots: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of samples per class of the target."""
    steps: int | None = 500
    """Optimizer steps."""
    independent: bool = False
    """Also search one coefficient for each of the three vectors: 11³ models per
    target."""


def styles(config: Config) -> list[images.ImageTask]:
    """Loads the tasks of both styles.

    Raises:
      ValueError: their classes differ, or are fewer than four.
    """
    raw = [raw_tasks.named(spec, config) for spec in (config.sketch, config.photo)]
    first, second = (task.classes for task in raw)
    if len(first) < 4 or set(first) != set(second):
        raise ValueError(
            f"{config.sketch} has {len(first)} classes and {config.photo} has "
            f"{len(second)}; expected the same classes, and at least four."
        )
    return raw


def subpopulations(setup: setups.Setup, config: Config) -> list[setups.Task]:
    """Returns the four tasks: halves A and B of the first style, then the second."""
    raw = styles(config)
    classes = list(raw[0].classes)
    half = (len(classes) + 1) // 2
    checkpoint = clip.load(setup.model)
    tasks = []
    for task in raw:
        for letter, names in (("A", classes[:half]), ("B", classes[half:])):
            kept = [list(task.classes).index(name) for name in names]
            own = custom.of_classes(task, f"{task.name}_{letter}", kept)
            found = custom.prepared(setup, checkpoint, own)
            tasks.append(found._replace(title=f"{task.name}-{letter}"))
    return tasks


def fine_tuned(
    setup: setups.Setup, shots: int, starts: Sequence[Tree] | None
) -> list[Tree]:
    """Returns vectors trained on few samples, from the pre-trained or other models."""
    tasks = []
    for task in setup.tasks:
        train = custom.per_class(task.train, shots, setup.options.seed)
        which = {"indices": train.indices.tolist()}
        tasks.append(task._replace(train=train, identity=task.identity | which))
    name = f"few_shot_{'pretrained' if starts is None else 'analogy'}/{shots}"
    wanted = [
        vectors.wanted_of(
            setup,
            name,
            task,
            vectors.recipe_of(setup, "nonlinear", task),
            start=None if starts is None else starts[i],
        )
        for i, task in enumerate(tasks)
    ]
    return vectors.trained(setup, name, wanted)


def best(setup, taus, rows, task: setups.Task) -> tuple[np.ndarray, float]:
    """Returns the best coefficients on validation data, and their test accuracy."""
    found = scores.accuracies(setup, taus, task.validation, False, rows)
    chosen = rows[int(found.argmax())]
    [test] = scores.accuracies(setup, taus, task.test, False, [chosen])
    return chosen, float(test)


def results_of(setup: setups.Setup, config: Config) -> tuple[list[dict], list[dict]]:
    """Returns the rows of one model, and the coefficients found for each target."""
    setup = setup._replace(tasks=subpopulations(setup, config))
    trained = vectors.vectors(setup, "nonlinear")
    coefs = scores.coefs_of(config, COEFS)
    edits, zero, found = [], [], []
    for i, task in enumerate(tqdm(setup.tasks, desc="analogies", unit="task")):
        tau = custom.analogy(trained, i)
        [coef], accuracy = best(setup, [tau], coefs[:, None], task)
        [before] = scores.accuracies(setup, [tau], task.test, False, [[0.0]])
        edits.append(jax.tree.map(lambda leaf, c=coef: np.float32(c) * leaf, tau))
        zero.append((float(before), accuracy))
        row = {"model": setup.title, "target": task.title, "coefficient": float(coef)}
        row |= {"accuracy": accuracy}
        if config.independent:
            grid = np.array(list(itertools.product(coefs, repeat=3)))
            signed = grid * [-1, 1, 1]
            a = 3 - i
            b, c = (j for j in range(4) if j not in (i, a))
            parts = [trained[a], trained[b], trained[c]]
            chosen, accuracy = best(setup, parts, signed, task)
            names = ("λ_A", "λ_B", "λ_C")
            row |= dict(zip(names, np.abs(chosen).tolist(), strict=True))
            row |= {"accuracy, independent": accuracy}
        found.append(row)
    rows = []
    for shots in config.shots:
        for column, (used, starts) in enumerate({"no": None, "yes": edits}.items()):
            if shots:
                taus = fine_tuned(setup, shots, starts)
                own = [
                    float(scores.accuracies(setup, [x], t.test, False, [[1.0]])[0])
                    for t, x in zip(setup.tasks, taus, strict=True)
                ]
            else:
                own = [pair[column] for pair in zero]
            row = {"model": setup.title, "samples": shots, "task vectors": used}
            values = (*own, float(np.mean(own)))
            rows.append(row | dict(zip(VALUES, values, strict=True)))
    return rows, found


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(  # digits in two styles
        config, sketch="inverted_digits", photo="mnist", samples=64, shots=(0, 1)
    )
    config = dataclasses.replace(config, tasks=())
    styles(config)  # raises before anything is written
    runs.start(config)
    rows, coefficients = [], []
    # No control: the experiment does not need one.
    for setup in setups.each(config, config.models, control=False):
        own, found = results_of(setup, config)
        rows += own
        coefficients += found
    keys = ["model", "samples", "task vectors"]
    beside = tables.beside(rows, PUBLISHED, keys=keys, values=VALUES)
    if runs.is_first():
        draw(config, rows)
    results = {"rows": rows, "coefficients": coefficients}
    note = f"Sketches are {config.sketch}, ImageNet is {config.photo}."
    shown = {
        "Test accuracy, by samples per class of the target.": beside,
        "Coefficients, and test accuracy without samples.": coefficients,
    }
    return tables.write(
        config.out,
        "Subpopulations (editing paper, Table 12, Figure 4)",
        shown,
        results,
        note,
        digits=3,
    )


def draw(config: Config, rows: Sequence[dict]):
    """Draws Figure 4: the mean over targets and models."""

    def means(used):
        found = [
            [
                row["Average"]
                for row in rows
                if (row["samples"], row["task vectors"]) == (shots, used)
            ]
            for shots in config.shots
        ]
        return [float(np.mean(values)) for values in found]

    plots.curves(
        config.out / "figure4.png",
        {
            "from the pre-trained model": (config.shots, means("no")),
            "from the edited model": (config.shots, means("yes")),
        },
        x="samples per class of the target",
        y="accuracy, mean over targets and models",
        best=False,
    )


if __name__ == "__main__":
    script.run(Config, main)
