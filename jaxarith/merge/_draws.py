"""Random masks that need only a quarter of a hash for each entry.

`jax.random.uniform` computes a Threefry hash of 64 bits for every number and uses only
half of it. XLA also writes the result of each round of the hash to memory. Here one
hash makes four draws of 16 bits, and all rounds run in one loop. The bits depend only
on the key, the entry's place in the leaf and the leaf's shape. They do not depend on
sharding, devices or dtype.

Salmon, Moraes, Dror, Shaw. Parallel Random Numbers: As Easy as 1, 2, 3. SC 2011.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_LARGEST = 2.0**32 - 2**8  # the largest float32 below 2^32
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def draw(key: jax.Array, share: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Draws a mask whose entries are true with the probability `share`, up to 2^-32.

    Two entries use the same word of 32 bits; the second entry uses it rotated by 16.
    The first 16 bits decide, except for one entry in 65536, where the other bits do.

    Args:
      key: random key, of any implementation.
      share: the probability: one number, or one number for each entry.
      shape: shape of the mask.
    """
    *leading, last = shape or (1,)
    quarter = -(-last // 4)
    words = threefry(
        jax.random.bits(key, (2,), jnp.uint32), *_places((*leading, quarter))
    )
    turned = [part for x in words for part in (x, (x << 16) | (x >> 16))]
    # The four parts are runs of entries, so nothing is interleaved. The masks are made
    # before they are joined: masks are small, and each word is computed only once.
    shares = _in_runs(share, (*leading, last), quarter)
    below = [_is_below(x, of) for x, of in zip(turned, shares, strict=True)]
    return jnp.concatenate(below, axis=-1)[..., :last].reshape(shape)


def _in_runs(share, shape, quarter):
    if not jnp.ndim(share):
        return [share] * 4
    padding = [(0, 0)] * (len(shape) - 1) + [(0, 4 * quarter - shape[-1])]
    return jnp.split(jnp.pad(jnp.broadcast_to(share, shape), padding), 4, axis=-1)


def _is_below(words, share):
    # The product is exact in float32. A share of 1 would not fit into 32 bits.
    share = jnp.asarray(share, jnp.float32)
    threshold = jnp.minimum(share * 2.0**32, _LARGEST).astype(jnp.uint32)
    return (words < threshold) | (share >= 1)


def _places(shape):
    """Returns two counters for each entry: its first index, and its place after it."""
    rows = jnp.zeros(shape, jnp.uint32)
    inner, stride = rows, 1
    for axis in range(len(shape) - 1, 0, -1):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        inner, stride = inner + index * jnp.uint32(stride), stride * shape[axis]
    first = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    return (first, inner) if len(shape) > 1 else (rows, first)


def threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the Threefry-2x32 hash of pairs of counters, with 20 rounds.

    Args:
      key: `u32[2]`.
      x, y: counters of 32 bits, of one shape.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = x + keys[0], y + keys[1]
    for step in range(5):
        for distance in _ROTATIONS[step % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x = x + keys[(step + 1) % 3]
        y = y + keys[(step + 2) % 3] + jnp.uint32(step + 1)
    return x, y
