"""Parts of trees: selecting leaves, replacing them, stacking whole trees."""

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
    """The part of the tree whose whole paths match a regular expression.

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
    """The part of the tree whose leaves are floating-point numbers.

    Integers are indices and counters: no arithmetic on parameters should touch them.
    """
    leaves = flatten(tree).items()
    return restrict(tree, [path for path, leaf in leaves if is_floating(leaf)])


def restrict(tree: Tree, paths: Collection[str]) -> Tree:
    """The part of the tree that holds the leaves with these paths."""
    paths = frozenset(paths)
    part = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path_name(path) in paths else None, tree
    )
    return _without_empty(part)


def _without_empty(node):
    """The nested dict without keys under which there is no leaf."""
    if not isinstance(node, dict):
        return node
    kept = {key: _without_empty(child) for key, child in node.items()}
    return {key: child for key, child in kept.items() if jax.tree.leaves(child)}


def update(tree: Tree, part: Tree) -> Tree:
    """The tree with the leaves of `part` in place of its own."""
    check_part(part, tree)
    new = flatten(part)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path_name(path), leaf), tree
    )


def fill(part: Tree, like: Tree) -> Tree:
    """The leaves of `part` in the structure and dtypes of `like`, zero where absent."""
    check_part(part, like)
    leaves = flatten(part)

    def leaf(path, target):
        if (name := path_name(path)) in leaves:
            return jnp.asarray(leaves[name], target.dtype)
        return jnp.zeros_like(target)

    return jax.tree_util.tree_map_with_path(leaf, jax.tree.map(jnp.asarray, like))


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one tree with leaves `[len(trees), ...]`."""
    for tree in trees[1:]:
        check_part(tree, trees[0])
        check_part(trees[0], tree)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The inverse of `stack`."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def size(tree: Tree) -> int:
    """The number of entries in all leaves."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))
