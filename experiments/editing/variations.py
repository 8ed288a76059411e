"""Task vectors of the ordinary fine-tuning with something of it changed."""

import dataclasses
from collections.abc import Sequence

from experiments.common.vision import scores, setups, vectors
from jaxarith.typing import Taus, Tree


def trained(setup: setups.Setup, name: str, **changes) -> list[Tree]:
    """Ordinary vectors of all tasks, trained with some options changed.

    Args:
      setup: the model and the tasks.
      name: name of the variation; its folder in the bank is `nonlinear/<name>`.
      changes: options of the script and their values, such as `seed=3`; where they are
        what the options say anyway, the vectors are those of "nonlinear".
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
    """Accuracies in percent of the pair of vectors: alone and added, and as a row."""
    found = scores.addition(setup, taus, linearized=False)
    return {
        "coefficient": found.search.coef,
        "single": scores.means(found.single),
        **found.row(searched=True),
        "accuracies": (100 * found.searched).tolist(),
        "single accuracies": (100 * found.single).tolist(),
    }


def check_pair(tasks: Sequence[str]):
    """Raises ValueError unless there are two tasks."""
    if len(tasks) != 2:
        raise ValueError(f"two task vectors are added; --tasks names {tasks}.")
