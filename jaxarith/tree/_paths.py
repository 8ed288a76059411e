"""Slash paths: the leaves of a tree by name, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxarith.typing import Tree


def path_name(path: tuple) -> str:
    """The slash path of a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """The leaves by slash path, in JAX's order.

    Raises:
      ValueError: two leaves have one slash path, as `{"a/b": …}` and `{"a": {"b": …}}`.

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
    """The nested dict with these leaves, given by slash path.

    Raises:
      ValueError: the path of a leaf continues that of another.

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
                f"{path} is a leaf and above or below another one, as `a` and `a/b` "
                "are: no nested dict has both. Rename one."
            )
        node[name] = leaf
    return tree


def map_with_path(function: Callable, tree: Tree) -> Tree:
    """`jax.tree.map` of a `function(slash_path, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )
