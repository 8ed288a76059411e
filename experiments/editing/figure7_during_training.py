"""Figure 7: task vectors during fine-tuning.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 6.

    python -m experiments.editing.figure7_during_training --data-dir DATA

Data: MNIST and EuroSAT. Ordinary vectors are trained, and intermediate vectors are
saved. The two vectors of the same step are added, with a coefficient searched on
validation data.

Published, as plots only, with ViT-L-14: "intermediate task vectors converge rapidly to
the direction of the final task vector", and the accuracy of the sum "saturates after
just a few hundred steps". The text does not state the steps of the plots; ours are 100
apart (--snapshots).
"""

import dataclasses

import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, setups, vectors
from experiments.editing import variations
from jaxarith import plots, task_vectors
from jaxarith.typing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.LargeModel):
    tasks: tuple[str, ...] = ("mnist", "eurosat")
    """The two tasks."""
    snapshots: int = 100
    """Number of steps from one measurement to the next."""


def followed(setup: setups.Setup, config: Config) -> dict[int, list[Tree]]:
    """Returns the task vectors by step, with the final ones.

    Raises:
      ValueError: see `check_steps`; or the bank has vectors with other snapshots.
    """
    name = "nonlinear/followed"
    recipes = [vectors.recipe_of(setup, name, task) for task in setup.tasks]
    check_steps([recipe.steps for recipe in recipes], config.snapshots)
    last = recipes[0].steps
    steps = range(config.snapshots, last, config.snapshots)
    wanted = [
        vectors.wanted_of(setup, name, task, recipe, observed=steps)
        for task, recipe in zip(setup.tasks, recipes, strict=True)
    ]
    final = vectors.trained(setup, name, wanted)
    return {step: [vectors.snapshot(one, step) for one in wanted] for step in steps} | {
        last: final
    }


def check_steps(steps: list[int], snapshots: int):
    """Raises a ValueError if the two tasks have no common curve."""
    if len(set(steps)) > 1:
        raise ValueError(
            f"the tasks train for {steps} steps; expected the same number, because "
            "vectors of the same step are added. Give --steps, or --protocol paper."
        )
    if not 1 <= snapshots < steps[0]:
        raise ValueError(
            f"--snapshots {snapshots}: expected 1 to {steps[0] - 1}, for a training of "
            f"{steps[0]} steps."
        )


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, tasks=options.SMOKE[:2], snapshots=1)
    variations.check_pair(config.tasks)
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    found = followed(setup, config)
    final = found[max(found)]
    rows = []
    for step, taus in tqdm(found.items(), desc="steps"):
        cosines = [
            float(np.asarray(task_vectors.cosine_matrix([tau, end]))[0, 1])
            for tau, end in zip(taus, final, strict=True)
        ]
        rows.append({"step": step, "cosines": cosines} | variations.added(setup, taus))
    if runs.is_first():
        steps = [row["step"] for row in rows]
        for file, name, y in (
            ("figure7_cosine", "cosines", "cosine to the final task vector"),
            ("figure7_accuracy", "accuracies", "accuracy of the sum, percent"),
        ):
            lines = {
                title: (steps, [row[name][i] for row in rows])
                for i, title in enumerate(setup.titles)
            }
            file = config.out / f"{file}.png"
            plots.curves(file, lines, x="steps of fine-tuning", y=y, best=False)
    shown = [
        {"step": row["step"]}
        | {
            f"cosine, {title}": row["cosines"][i]
            for i, title in enumerate(setup.titles)
        }
        | {name: row[name] for name in ("coefficient", "single", "abs", "norm")}
        for row in rows
    ]
    caption = f"{' + '.join(setup.titles)}: single vectors and their sum, by step."
    title = "During training (editing paper, Figure 7)"
    return tables.write(config.out, title, {caption: shown}, {"rows": rows}, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
