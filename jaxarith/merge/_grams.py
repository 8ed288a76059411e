"""Gram matrices of the inputs of linear layers, by path, as arguments of `fold`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Params, Taus


def aligned(
    params_0: Params,
    taus: Taus,
    grams: Sequence[Mapping[str, jax.Array]],
    is_in_out: Callable[[str], bool],
) -> dict[str, tuple]:
    """The Gram matrices of all tasks for every leaf of a tau; none where no task has.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors.
      grams: for every task, `[in, in]` by path.
      is_in_out: whether the matrix of a path is stored as [in, out].

    Raises:
      ValueError: not one set of Gram matrices per task, a matrix that not all tasks
        have or that does not fit, or non-finite values.
    """
    _leaves.one_each(grams, len(taus), "sets of Gram matrices")
    shapes = {path: jnp.shape(leaf) for path, leaf in tree.flatten(params_0).items()}
    for path in sorted({path for of_task in grams for path in of_task}):
        lacking = [i for i, of_task in enumerate(grams) if path not in of_task]
        if lacking:
            raise ValueError(
                f"tasks {lacking} have no Gram matrix of {path}; capture the same "
                "layers in all models."
            )
        shape, first = shapes.get(path, ()), is_in_out(path)
        found = [list(jnp.shape(of_task[path])) for of_task in grams]
        expected = [shape[0 if first else 1]] * 2 if len(shape) == 2 else None
        if any(gram != expected for gram in found):
            raise ValueError(
                f"Gram matrices of shapes {found} for {path}, which has shape "
                f"{list(shape)}; expected [in, in] for a "
                f"{'kernel [in, out]' if first else 'weight [out, in]'}."
            )
    for i, of_task in enumerate(grams):
        tree.check_finite(dict(of_task), f"set of Gram matrices of task {i}")
    return {
        path: tuple(of_task[path] for of_task in grams if path in of_task)
        for path in tree.aligned(taus)
    }
