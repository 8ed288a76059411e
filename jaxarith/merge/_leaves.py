"""What all merges share: checked input, and a function of one leaf over all leaves."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree


def check(params_0: tree.Tree, taus: Sequence[tree.Tree]):
    """Raises a ValueError, with paths, for task vectors that cannot be merged."""
    if isinstance(taus, dict) or not len(taus):
        found = "one tree" if isinstance(taus, dict) else "an empty list"
        raise ValueError(f"merging needs a list of task vectors; found {found}.")
    tree.check_finite(params_0, "pre-trained model")
    movable = tree.floating(params_0)
    for i, tau in enumerate(taus):
        tree.check_part(
            tau, movable, f"task vector {i}", "floating-point pre-trained parameters"
        )
        tree.check_finite(tau, f"task vector {i}")
    if not jax.tree.leaves(list(taus)):
        raise ValueError("none of the task vectors has a leaf.")


def fold(merge_leaf: Callable, params_0: tree.Tree, taus: Sequence[tree.Tree], *args):
    """`merge_leaf(leaf_0, taus_leaf[task, ...], *args)` on every leaf that a tau has.

    Both come in float32 or better; what returns is cast to the dtype of `params_0`.
    Leaves that no task vector has stay as they are.
    """
    rows = tree.aligned(taus)

    def leaf(path, leaf_0):
        if path not in rows:
            return leaf_0
        dtype = jnp.result_type(leaf_0)
        stacked = tree.stack_leaves(rows[path])
        start = jnp.asarray(leaf_0, jnp.promote_types(stacked.dtype, dtype))
        return merge_leaf(start, stacked, *args).astype(dtype)

    return tree.map_with_path(leaf, params_0)


def per_task(values, tasks: int, name: str) -> jax.Array:
    """One number, or one per task, as `[task]`.

    Raises:
      ValueError: there are several numbers, but not one per task.
    """
    values = jnp.asarray(values, float)
    if values.shape not in ((), (tasks,)):
        raise ValueError(
            f"{name} has shape {list(values.shape)}; expected one number, or one per "
            f"task vector: [{tasks}]."
        )
    return jnp.broadcast_to(values, (tasks,))
