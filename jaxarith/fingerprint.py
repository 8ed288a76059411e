"""Fingerprints of trees: for each leaf, 32 bits that change when the leaf changes.

They depend neither on how a leaf is sharded nor on the order of the sum.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree as trees
from jaxarith.typing import Tree


def of(tree: Tree) -> dict[str, int]:
    r"""Returns the fingerprint of each leaf, by slash path.

    Let :math:`b_i` be the bits of entry i of a leaf. The fingerprint of the leaf is
    :math:`\sum_i m(b_i + c\,i) \bmod 2^{32}`. Here c is odd, and m is the last step of
    MurmurHash3 (Appleby, public domain), which is one to one. So the sum changes
    whenever exactly one entry changes, in any of its bits. It misses one in
    :math:`2^{32}` of all other changes. An entry of 64 bits counts as two entries.

    Args:
      tree: arrays of any dtype and sharding; PRNG keys are allowed. In a computation of
        several processes, every process must call this function.

    Returns:
      A dict from slash paths to numbers from 0 to 2³² - 1.

    Example:
      >>> of({"w": jnp.array([1, 2, 3])})
      {'w': 840276720}
    """
    leaves = trees.flatten(tree)
    found = {
        path: trees.settled(_fingerprint(jnp.asarray(leaf)))
        for path, leaf in leaves.items()
    }
    return {path: int(x) for path, x in jax.device_get(found).items()}


def of_array(array: jax.Array | np.ndarray) -> int:
    """Returns the fingerprint of one array on one device, as `of` computes it."""
    return int(_fingerprint(array))


def combined(tree: Tree) -> int:
    """Returns one number of 32 bits for a whole tree.

    It depends on the paths, shapes, dtypes and entries of the leaves.

    Example:
      >>> a, b = {"w": jnp.zeros(2)}, {"w": jnp.zeros((1, 2))}
      >>> combined(a) == combined(a), combined(a) == combined(b)
      (True, False)
    """
    entries = of(tree)
    layout = {
        path: (jnp.shape(leaf), str(jnp.asarray(leaf).dtype), entries[path])
        for path, leaf in trees.flatten(tree).items()
    }
    return zlib.crc32(json.dumps(layout, sort_keys=True).encode())


# Compiled for one leaf, because models have few different shapes, and leaves may be on
# different devices.
@jax.jit
def _fingerprint(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype != bool:  # entries of 64 bits get a last axis of two words
        bits = 8 * min(leaf.dtype.itemsize, 4)
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{bits}")
    bits = leaf.astype(jnp.uint32)
    # The linear index is a sum of iotas, because a reshape would gather the shards.
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits + index * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
