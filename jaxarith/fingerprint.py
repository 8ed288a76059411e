"""Fingerprints of trees: 32 bits of each leaf that tell it from others.

They do not depend on how a leaf is sharded, nor on the order of the sum.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree as trees
from jaxarith.typing import Tree


def of(tree: Tree) -> dict[str, int]:
    r"""The fingerprint of each leaf, by slash path.

    That of a leaf with entries of bits :math:`b_i` is :math:`\sum_i m(b_i + c\,i)
    \bmod 2^{32}`, where c is odd and m, the last step of MurmurHash3 (Appleby, public
    domain), is one to one: whenever one entry changes, in whichever bits, so does the
    sum, and of other changes one in :math:`2^{32}` is missed. Entries of 64 bits count
    as two.

    Args:
      tree: arrays of any dtype and sharding, PRNG keys among them. In a computation of
        several processes, all must ask for the fingerprints.

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
    """The fingerprint of one array on one device, as `of` has it."""
    return int(_fingerprint(array))


def combined(tree: Tree) -> int:
    """One number of 32 bits for a whole tree: paths, shapes, dtypes and entries.

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


# Leaf by leaf: models have few shapes to compile for, and leaves may be on different
# devices.
@jax.jit
def _fingerprint(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype != bool:  # entries of 64 bits get a last axis of two words
        bits = 8 * min(leaf.dtype.itemsize, 4)
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{bits}")
    bits = leaf.astype(jnp.uint32)
    # The linear index comes from iotas: a reshape would gather the shards.
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits + index * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
