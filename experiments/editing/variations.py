"""Task vectors from ordinary fine-tuning with some options changed."""

import dataclasses
from collections.abc import Sequence

from experiments.common.vision import scores, setups, vectors
from jaxarith.typing import Taus, Tree


def trained(setup: setups.Setup, name: str, **changes) -> list[Tree]:
    """Returns ordinary vectors of all tasks, trained with some options changed.

    Args:
      setup: the model and the tasks.
      name: name of the variation; its folder in the bank is `nonlinear/<name>`.
      changes: options of the script and their values, for example `seed=3`. If they
        equal the script's options, the vectors of "nonlinear" are returned.
    """
    if all(getattr(setup.options, option) == x for option, x in changes.items()):
        return vectors.vectors(setup, "nonlinear")
    changed = setup._replace(options=dataclasses.replace(setup.options, **changes))
    name = f"nonlinear/{name}"
    wanted = [
        vectors.wanted_of(
            changed, name, task, vectors.recipe_of(changed, "nonlinear", task)
        )
        for task in setup.tasks
    ]
    return vectors.trained(changed, name, wanted)


def added(setup: setups.Setup, taus: Taus) -> dict:
    """Returns a row for two vectors: accuracies in percent, single and added."""
    found = scores.addition(setup, taus, linearized=False)
    return {
        "coefficient": found.search.coef,
        "single": scores.means(found.single),
        **found.row(searched=True),
        "accuracies": (100 * found.searched).tolist(),
        "single accuracies": (100 * found.single).tolist(),
    }


def check_pair(tasks: Sequence[str]):
    """Raises a ValueError unless there are two tasks."""
    if len(tasks) != 2:
        raise ValueError(f"--tasks names {tasks}; expected two tasks.")
