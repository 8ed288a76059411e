"""Fingerprints of trees: 32 bits of each leaf that any changed entry changes.

They do not depend on how a leaf is sharded, nor on the order of the sum.
"""

import json
import zlib

import jax
import jax.numpy as jnp

from jaxarith import tree as trees


def of(tree: trees.Tree) -> dict[str, int]:
    r"""The fingerprint of each leaf, by slash path.

    That of a leaf with entries of bits :math:`b_i` is
    :math:`\sum_i (2 i + 1) b_i \bmod 2^{32}`. As :math:`2 i + 1` is odd, it changes
    whenever one entry does, in whichever bits. Entries of 64 bits count as two.

    Args:
      tree: arrays of any dtype and sharding, PRNG keys among them. In a computation of
        several processes, all must ask for the fingerprints.

    Example:
      >>> of({"w": jnp.array([1, 2, 3])})
      {'w': 22}
    """
    leaves = trees.flatten(tree)
    found = {path: _fingerprint(jnp.asarray(leaf)) for path, leaf in leaves.items()}
    return {path: int(x) for path, x in jax.device_get(found).items()}


def combined(tree: trees.Tree) -> int:
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
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
