"""Parts of trees: select leaves, replace them, stack whole trees."""

import re
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith.tree._checks import check_part, is_floating
from jaxarith.tree._listing import first_few
from jaxarith.tree._paths import flatten, path_name
from jaxarith.typing import Tree


def select(tree: Tree, pattern: str) -> Tree:
    """Returns the leaves whose whole paths match a regular expression.

    Args:
      tree: the tree.
      pattern: regular expression; it must match the whole slash path of a leaf.

    Raises:
      ValueError: no path matches.

    Example:
      >>> select({"a": {"kernel": 1.0, "bias": 2.0}, "b": {"bias": 3.0}}, ".*/kernel")
      {'a': {'kernel': 1.0}}
    """
    matching = [path for path in flatten(tree) if re.fullmatch(pattern, path)]
    if not matching:
        some = ", ".join(first_few(flatten(tree), most=3))
        raise ValueError(
            f"no leaf matches {pattern!r}. The pattern must match whole slash paths; "
            f"the tree has {some}."
        )
    return restrict(tree, matching)


def floating(tree: Tree) -> Tree:
    """Returns the leaves that hold floating-point numbers.

    Integers are indices and counters, so no arithmetic on parameters should touch them.

    Example:
      >>> floating({"kernel": 1.0, "position": 3})
      {'kernel': 1.0}
    """
    leaves = flatten(tree).items()
    return restrict(tree, [path for path, leaf in leaves if is_floating(leaf)])


def restrict(tree: Tree, paths: Collection[str]) -> Tree:
    """Returns the leaves with these slash paths.

    Args:
      tree: the tree.
      paths: slash paths of leaves; those that do not exist are ignored.

    Example:
      >>> restrict({"kernel": 1.0, "bias": 2.0}, ["bias"])
      {'bias': 2.0}
    """
    paths = frozenset(paths)
    part = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path_name(path) in paths else None, tree
    )
    return _without_empty(part)


def _without_empty(node):
    """Removes the keys of a nested dict that hold no leaf."""
    if not isinstance(node, dict):
        return node
    kept = {key: _without_empty(child) for key, child in node.items()}
    return {key: child for key, child in kept.items() if jax.tree.leaves(child)}


def update(tree: Tree, part: Tree) -> Tree:
    """Returns the tree with the leaves of `part` in place of its own.

    Args:
      tree: the tree.
      part: new leaves; it may hold only some leaves of the tree.

    Raises:
      ValueError: a leaf of `part` is not in the tree or has another shape.

    Example:
      >>> update({"kernel": 1.0, "bias": 2.0}, {"bias": 5.0})
      {'bias': 5.0, 'kernel': 1.0}
    """
    check_part(part, tree)
    new = flatten(part)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path_name(path), leaf), tree
    )


def fill(part: Tree, like: Tree) -> Tree:
    """Returns `part` in the structure and dtypes of `like`; missing leaves are zero.

    Args:
      part: a tree that holds some leaves of `like`.
      like: the tree that defines structure, shapes and dtypes.

    Raises:
      ValueError: a leaf of `part` is not in `like` or has another shape.

    Example:
      >>> print(fill({"bias": 5.0}, {"kernel": 1.0, "bias": 2.0})["kernel"])
      0.0
    """
    check_part(part, like)
    leaves = flatten(part)

    def leaf(path, target):
        if (name := path_name(path)) in leaves:
            return jnp.asarray(leaves[name], target.dtype)
        return jnp.zeros_like(target)

    return jax.tree_util.tree_map_with_path(leaf, jax.tree.map(jnp.asarray, like))


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks trees of one structure into one tree, with leaves `[len(trees), ...]`.

    Raises:
      ValueError: the trees differ in structure or shapes.

    Example:
      >>> print(stack([{"w": 1.0}, {"w": 2.0}])["w"])
      [1. 2.]
    """
    for tree in trees[1:]:
        check_part(tree, trees[0])
        check_part(trees[0], tree)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """Splits the leaves of a tree along their first axis: the inverse of `stack`.

    Example:
      >>> [tree["w"].tolist() for tree in unstack({"w": np.array([1.0, 2.0])})]
      [1.0, 2.0]
    """
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def size(tree: Tree) -> int:
    """Returns the number of entries in all leaves.

    Example:
      >>> size({"kernel": np.ones((2, 3)), "bias": np.ones(3)})
      9
    """
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))
