"""Places of leaves: on several devices, on one, in a file, or still being computed."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxarith import lazy
from jaxarith.typing import Tree


def is_traced(*values: Any) -> bool:
    """Returns whether `jit` or another transformation traces any of the arrays.

    Arrays that a traced function closes over have known values, so they do not count.

    Example:
      >>> seen = []
      >>> jax.jit(lambda x: seen.append(is_traced(x)))(1.0)
      >>> seen, is_traced(1.0)
      ([True], False)
    """
    return any(
        isinstance(array, Tracer)
        for leaf in jax.tree.leaves(values)
        for array in jax.tree.leaves(leaf.held if isinstance(leaf, lazy.Leaf) else leaf)
    )


def gathered(tree: Tree) -> Tree:
    """Returns the tree with sharded leaves gathered into whole NumPy arrays.

    A sum over entries, or a matrix product, rounds differently over shards than over
    the whole leaf. A program for several devices also rounds differently from a program
    for one. Computations on gathered leaves, one leaf at a time, return the same bits
    as one device.

    Leaves on one device stay as they are. If `jit` traces a leaf, all leaves do.

    Example:
      >>> gathered({"w": np.ones(2)})
      {'w': array([1., 1.])}
    """
    if is_traced(tree):
        return tree

    def leaf(x):
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        if not x.is_fully_addressable and isinstance(x.sharding, NamedSharding):
            # Other processes hold parts of the leaf.
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def settled(tree: Tree) -> Tree:
    """Waits until CPU devices have computed the leaves, then returns the tree.

    Loops over leaves or batches call this for each one before they start the next, for
    two reasons. Otherwise all leaves would be read from files before the first result
    is ready. And XLA runs all CPU devices with one thread for each core: if many
    programs for several devices run at once, some can wait forever in threads that the
    others need.

    Example:
      >>> settled({"w": np.ones(2)})
      {'w': array([1., 1.])}
    """
    of_cpu = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, Tracer)
        and next(iter(leaf.sharding.device_set)).platform == "cpu"
    ]
    jax.block_until_ready(of_cpu)
    return tree


def sharded_like(leaf: jax.Array, like: Any) -> Any:
    """Puts a leaf where `like` is: the inverse of `gathered`.

    Args:
      leaf: a computed leaf.
      like: the leaf whose place is used.

    Returns:
      The leaf, with the sharding of `like`. If `like` is in a file, the leaf is written
      to its file, and the result stands for it. If `jit` traces the leaf, it stays as
      it is.

    Example:
      >>> sharded_like(np.ones(2), np.zeros(2))
      array([1., 1.])
    """
    if isinstance(like, lazy.Leaf):
        return like.place(leaf)
    tracing = isinstance(leaf, Tracer) or not isinstance(like, jax.Array)
    if tracing or leaf.sharding == like.sharding:
        return leaf
    return jax.device_put(leaf, like.sharding)
