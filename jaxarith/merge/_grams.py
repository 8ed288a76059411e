"""Gram matrices of the inputs of linear layers, by path: arguments of `fold`."""

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
    """Returns, for every leaf of the taus, the tuple of its Gram matrices of all tasks.

    The tuple is empty if no task has a Gram matrix for the leaf.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors.
      grams: for every task, Gram matrices `[in, in]` by path.
      is_in_out: `is_in_out(path)` tells whether a matrix is stored as [in, out].

    Raises:
      ValueError: the number of sets of Gram matrices is not T, some tasks lack a matrix
        that others have, a matrix does not fit, or values are not finite.
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
