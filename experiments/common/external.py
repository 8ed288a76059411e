"""Adds models that others have fine-tuned to the bank, as task vectors.

A checkpoint does not say which pre-trained model it started from. Two things are
checked: the architecture is the same, and the task vector is shorter than the
pre-trained parameters. With the right pre-trained model it is far shorter.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import bank, runs, training
from jaxarith import fingerprint, tree
from jaxarith.typing import Params, Tree


class External(NamedTuple):
    """An external task vector.

    Attributes:
      tau: the task vector, on the host.
      configuration: the configuration that the bank records for it.
      notes: notes that are printed for the user.
    """

    tau: Tree
    configuration: dict[str, Any]
    notes: list[str]


def configuration(
    model: str, params: Params, method: str, identity: int
) -> dict[str, Any]:
    """Returns the configuration that the bank records for an external vector.

    An external vector has no recipe.

    Args:
      model: the checkpoint; only the last part of a path is kept.
      params: its parameters.
      method: the folder in the bank.
      identity: the fingerprint of the pre-trained parameters.
    """
    path = Path(model).expanduser()
    return {
        "origin": bank.EXTERNAL,
        "method": method,
        "checkpoint": path.name if path.exists() else model,
        "fingerprint": fingerprint.combined(params),
        "params_0": identity,
    }


def check_near(tau: Tree, params_0: Params, models: str) -> None:
    """Raises a ValueError unless a task vector is shorter than its pre-trained model.

    Args:
      tau: the task vector.
      params_0: the pre-trained parameters.
      models: names of the fine-tuned and the pre-trained model, for the error.
    """
    norms = [
        np.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves))
        for leaves in (tree.flatten(tau).values(), tree.flatten(params_0).values())
    ]
    if norms[0] >= norms[1]:
        raise ValueError(
            f"{models} are {norms[0]:.3g} apart, and the second has norm "
            f"{norms[1]:.3g}: one is no fine-tuned copy of the other. Name the "
            "pre-trained model that it started from."
        )


def check_place(file: Path, found: External) -> None:
    """Raises a ValueError if the bank already has another vector in this file."""
    if file.exists() and bank.record(file)["configuration"] != found.configuration:
        raise ValueError(
            f"the bank has another vector in {file}. Name another --bank, or remove "
            "that file."
        )


def add(file: Path, found: External) -> Tree:
    """Prints the notes of an external vector, adds it to the bank and returns it."""
    if runs.is_first():
        for note in found.notes:
            print(f"note: {note}")
    return training.add(file, found.tau, found.configuration, {})
