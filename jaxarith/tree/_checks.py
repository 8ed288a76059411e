"""Checks that one tree fits another, and that all values are finite."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxarith import lazy
from jaxarith.tree._listing import counted, first_few
from jaxarith.tree._paths import flatten
from jaxarith.tree._placement import is_traced, settled
from jaxarith.typing import Tree


def is_floating(leaf: Any) -> bool:
    """Returns whether a leaf holds floating-point numbers, real or complex."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def check_part(
    part: Tree, whole: Tree, part_name: str = "tree", whole_name: str = "parameters"
) -> None:
    """Checks that every leaf of `part` is in `whole`, with the same shape.

    Args:
      part: the tree to check.
      whole: the tree that it must fit.
      part_name: name of `part` in the error message.
      whole_name: name of `whole` in the error message.

    Raises:
      ValueError: a leaf is not in `whole` or has another shape. The message lists the
        first paths.

    Example:
      >>> check_part({"c": 1.0}, {"w": 1.0}, "task vector")
      Traceback (most recent call last):
      ValueError: the task vector does not fit the parameters (1 leaf):
        + c []: not in the parameters
    """
    expected = {path: jnp.shape(leaf) for path, leaf in flatten(whole).items()}
    found = {path: jnp.shape(leaf) for path, leaf in flatten(part).items()}
    lines = [
        f"+ {path} {list(shape)}: not in the {whole_name}"
        for path, shape in found.items()
        if path not in expected
    ]
    lines += [
        f"! {path}: {list(shape)} in the {part_name}, {list(expected[path])} in the "
        f"{whole_name}"
        for path, shape in found.items()
        if path in expected and expected[path] != shape
    ]
    if lines:
        leaves = counted(len(lines), "leaf", "leaves")
        title = f"the {part_name} does not fit the {whole_name} ({leaves}):"
        raise ValueError("\n  ".join([title, *first_few(lines, most=10)]))


def check_finite(tree: Tree, name: str) -> None:
    """Checks that no leaf holds NaN or infinity.

    Values that `jit` is tracing are not known yet, so they are not checked. Leaves in
    files are checked when they are read.

    Args:
      tree: the tree to check.
      name: its name in the error message.

    Raises:
      ValueError: a leaf holds NaN or infinity. The message lists the first paths.

    Example:
      >>> check_finite({"w": jnp.nan}, "task vector")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: the task vector has NaN or infinite values in 1 leaf: w. Check ...
    """
    leaves = {}
    for path, leaf in flatten(tree).items():
        held = [leaf]
        if isinstance(leaf, lazy.Leaf):
            leaf.check()
            held = jax.tree.leaves(leaf.held)
        leaves[path] = [x for x in held if not is_traced(x) and is_floating(x)]
    with jax.ensure_compile_time_eval():  # checks values that are known inside a `jit`
        finite = {
            path: [settled(lazy.all_finite(x)) for x in held]
            for path, held in leaves.items()
        }
    finite = jax.device_get(finite)
    if bad := [path for path, known in finite.items() if not all(known)]:
        raise ValueError(
            f"the {name} has NaN or infinite values in "
            f"{counted(len(bad), 'leaf', 'leaves')}: "
            f"{', '.join(first_few(bad, most=5))}. Check the run or the file that it "
            "came from."
        )


def is_finite(tree: Tree) -> bool:
    """Returns whether all values are known to be finite; False if `jit` traces one.

    Leaves in files do not count: they are checked when they are written.

    Example:
      >>> is_finite({"w": jnp.ones(2)}), is_finite({"w": jnp.inf})
      (True, False)
    """
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not isinstance(leaf, lazy.Leaf) and is_floating(leaf)
    ]
    if is_traced(leaves):
        return False
    return all(jax.device_get([settled(lazy.all_finite(leaf)) for leaf in leaves]))
