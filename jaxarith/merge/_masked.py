"""One merged vector, and for every task a mask and a scale that adapt the vector."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxarith.typing import Params, Tree


class Masked(NamedTuple):
    """The result of methods that make one model per task from one vector.

    Attributes:
      tau: the merged vector, a nested dict of the leaves that any task vector has, in
        float32 or better.
      masks: for each of the T tasks, a tree like `tau` with leaves of bool.
      scales: scale of each task, `[T]`.
    """

    tau: Params
    masks: list[Tree]
    scales: jax.Array

    def vector(self, task: int) -> Params:
        """Returns the vector of one task, `scales[task] · masks[task] · tau`.

        `task_vectors.apply(params_0, masked.vector(0))` is the model of the first task.
        """
        scale = self.scales[task]

        def of_task(mask, leaf):
            return scale.astype(leaf.dtype) * jnp.where(mask, leaf, 0)

        return jax.tree.map(of_task, self.masks[task], self.tau)
