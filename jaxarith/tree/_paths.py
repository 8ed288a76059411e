"""Slash paths: the leaves of a tree by name, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxarith.typing import Tree


def path_name(path: tuple) -> str:
    """Returns the slash path of a JAX key path.

    Example:
      >>> path_name((jax.tree_util.DictKey("mlp"), jax.tree_util.DictKey("bias")))
      'mlp/bias'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by slash path, in JAX's order.

    Raises:
      ValueError: two leaves have the same slash path, as in
        `{"a/b": …, "a": {"b": …}}`.

    Example:
      >>> flatten({"mlp": {"kernel": 1.0, "bias": 2.0}})
      {'mlp/bias': 2.0, 'mlp/kernel': 1.0}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    by_path = {path_name(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        double = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves have the path {', '.join(double)}; rename one.")
    return by_path


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """Returns the nested dict that has these leaves.

    Args:
      leaves: leaves by slash path.

    Raises:
      ValueError: the path of one leaf begins with the path of another, as `a/b` begins
        with `a`.

    Example:
      >>> unflatten({"mlp/bias": 2.0, "mlp/kernel": 1.0})
      {'mlp': {'bias': 2.0, 'kernel': 1.0}}
    """
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or name in node:
            raise ValueError(
                f"{path} is a leaf, and another leaf is above or below it, as with `a` "
                "and `a/b`. A nested dict cannot hold both; rename one."
            )
        node[name] = leaf
    return tree


def map_with_path(function: Callable, tree: Tree) -> Tree:
    """Returns a tree with `function(slash_path, leaf)` in place of every leaf.

    Args:
      function: a function of a slash path and a leaf.
      tree: the tree.

    Example:
      >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}})
      {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )
