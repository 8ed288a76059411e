"""Reports training and forward passes of scripts on CLIP to a plan."""

from collections.abc import Sequence

import jax
import numpy as np

from experiments.common import planning, training
from experiments.common.vision import setups
from jaxarith.typing import Tree


def vectors(
    setup: setups.Setup,
    network: training.Network,
    method: str,
    wanted: Sequence[training.Wanted],
    *,
    joint: Sequence[training.Wanted] = (),
) -> list[Tree]:
    """Returns random vectors; reports the missing ones to the plan as trainings.

    Args:
      setup: the stand-in model.
      network: the network that would be trained.
      method: name of the method in the plan.
      wanted: the vectors.
      joint: the tasks that one joint vector learns.
    """
    record, full = planning.recorder(), setup.full
    assert record is not None and full is not None
    new = record.missing(full, method, [one.file for one in wanted])
    missing = [one for one, is_new in zip(wanted, new, strict=True) if is_new]
    together = None if setup.options.tasks_together else 1
    for group in training.alike(missing, together):
        heads = [one.head for one in joint or group]
        constants = network.stacked and network.stacked(_of_width(heads, full))
        if joint:
            constants = jax.tree.map(lambda leaf: leaf[None], constants)
        record.train(
            planning.Training(
                full,
                method,
                tuple(one.name for one in group),
                group[0].recipe,
                network.loss,
                constants,
                others=max(len(group[0].others), 1),
                joint=max(len(joint), 1),
            )
        )
    return [
        record.vector(one.file, setup.params_0, one.recipe.trained) for one in wanted
    ]


def _of_width(heads, full):
    """Returns heads with equally many classes, and the width of the real features."""
    image = full.sample["image"]
    one = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    width = jax.eval_shape(full.apply_fn, full.params_0, one).shape[-1]
    return [np.zeros((len(head), width), np.float32) for head in heads]


def passes(setup: setups.Setup, count: float):
    """Reports forward passes of one sample to the plan, if the script is planned."""
    if (record := planning.recorder()) and setup.full:
        record.evaluate(setup.full, count)
