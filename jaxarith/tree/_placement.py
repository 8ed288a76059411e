"""Where leaves are: on several devices, on one, in a file, or still being computed."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxarith import lazy
from jaxarith.typing import Tree


def is_traced(*values: Any) -> bool:
    """Whether `jit` or another transformation is tracing any of the arrays.

    Arrays that a traced function closes over are known: they are not traced.
    """
    return any(
        isinstance(array, Tracer)
        for leaf in jax.tree.leaves(values)
        for array in jax.tree.leaves(leaf.held if isinstance(leaf, lazy.Leaf) else leaf)
    )


def gathered(tree: Tree) -> Tree:
    """The tree with leaves that are on several devices as whole NumPy arrays.

    A sum over entries, or a matrix product, rounds otherwise in shards than over the
    whole leaf, and a program for several devices is not compiled to the bits of one for
    one. What is computed from gathered leaves, one at a time, is what one device gives.
    Other leaves are as they were; all are where `jit` is tracing one of them.
    """
    if is_traced(tree):
        return tree

    def leaf(x):
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        if not x.is_fully_addressable and isinstance(x.sharding, NamedSharding):
            # Other processes have parts of it.
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def settled(tree: Tree) -> Tree:
    """The tree, after waiting for leaves that CPU devices compute.

    What computes leaf by leaf, or batch by batch, settles one before the next. Leaves
    that are read from files would otherwise all be read before the first is done. And
    XLA runs all CPU devices with as many threads as there are cores: with many programs
    for several devices under way, some wait for others in threads that these need,
    forever.
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
    """The leaf where `like` is, unless `jit` traces it: the way back of `gathered`.

    Where `like` is in a file, so is the leaf then.
    """
    if isinstance(like, lazy.Leaf):
        return like.place(leaf)
    tracing = isinstance(leaf, Tracer) or not isinstance(like, jax.Array)
    if tracing or leaf.sharding == like.sharding:
        return leaf
    return jax.device_put(leaf, like.sharding)
