r"""Attention of long texts by blocks of queries: memory linear in their length.

The scores of Q queries and K keys fill `[H, Q, K]`, and a linearised training step
keeps several arrays of that size for each layer. Here a loop takes the queries a block
at a time, and its body is under `jax.checkpoint`: what remains between a forward and a
backward pass is q, k, v and their tangents. A block sees all keys, so each row of its
softmax is complete, and forward mode, reverse mode, the transpose of the tangent and
`vmap` come from JAX.

With :math:`e = \exp(s - \max s)` and :math:`l = \sum e`, a block divides the product
`e v` by `l`, and not the scores themselves. The tangent is then

.. math:: \dot o = \frac{(e\dot s)\,v + e\,\dot v - o \sum e\dot s}{l}

and its transpose the ordinary backward pass of attention, which computes `e` again. A
forward pass takes 2 products of the size of all scores. Value and tangent take 6, the
transpose 4, and the second `e` takes 1: 11 in all, against 10 without blocks.

On a CPU XLA finds results that are computed twice from one input and stores the first
instead, see `layers.rematerialized`; it does not see through the loop.

Chen, Xu, Zhang, Guestrin. Training Deep Nets with Sublinear Memory Cost. 2016.
arXiv:1604.06174 (`jax.checkpoint`). Rabe, Staats. Self-attention Does Not Need O(n²)
Memory. 2021. arXiv:2112.05682 (blocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LENGTH = 512  # tokens; texts of this length and longer are computed by blocks
QUERIES = 128  # the most queries of a block


class Causal(NamedTuple):
    """The causal mask: a token sees itself and the real tokens before it.

    Attributes:
      real: bool[..., 1, 1, S], False for padding.
    """

    real: jax.Array

    def rows(self, start: jax.Array, count: int) -> jax.Array:
        """bool[..., 1, count, S], for the queries from `start` on."""
        query = start + jnp.arange(count)
        seen = jnp.arange(self.real.shape[-1])[None] <= query[:, None]
        return self.real & seen.reshape((1,) * (self.real.ndim - 2) + seen.shape)


class RelativeBias(NamedTuple):
    """A bias of S queries and S keys that depends on the position of key minus query.

    Attributes:
      diagonals: `[..., H, 2S - 1]`, for the positions from 1 - S to S - 1.
    """

    diagonals: jax.Array

    def rows(self, start: jax.Array, count: int) -> jax.Array:
        """`[..., H, count, S]`, for the queries from `start` on; zeros past the last.

        No row is gathered: its transpose would be a scatter of all scores, which takes
        longer than the attention. The diagonals are repeated for each row, then read
        with rows one longer, which moves each row one to the right of the row before.
        """
        *batch, width = self.diagonals.shape
        length, no_pad = (width + 1) // 2, [(0, 0)] * len(batch)
        padded = jnp.pad(self.diagonals, [*no_pad, (count, 0)])
        # From the last query's first key to the first query's last key.
        size = count + length - 1
        near = jax.lax.dynamic_slice_in_dim(padded, length - start, size, axis=-1)
        rows = jnp.broadcast_to(near[..., None, :], (*batch, count, size))
        longer = jnp.pad(rows, [*no_pad, (0, 0), (0, 1)])
        shifted = longer.reshape(*batch, -1)[..., : count * size]
        return shifted.reshape(*batch, count, size)[..., count - 1 :]


Mask = jax.Array | Causal
Bias = jax.Array | RelativeBias


def is_long(queries: int, keys: int) -> bool:
    """Whether there are as many scores as in a text of `LENGTH` tokens, or more."""
    return queries * keys >= LENGTH**2


def causal(real: jax.Array) -> Mask:
    """The causal mask of texts `real`, bool[..., 1, 1, S], as an array if S is short.

    Example:
      >>> print(causal(jnp.array([True, False, True])[None, None])[0].astype(int))
      [[1 0 0]
       [1 0 0]
       [1 0 1]]
    """
    length = real.shape[-1]
    if is_long(length, length):
        return Causal(real)
    earlier = jnp.tril(jnp.ones((length, length), bool))
    return earlier.reshape((1,) * (real.ndim - 2) + earlier.shape) & real


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
) -> jax.Array:
    """What `layers.attend` computes, `QUERIES` rows or fewer at a time.

    Args:
      q, k, v: `[..., Q, H, D]`, `[..., K, H, D]` and `[..., K, H, D]`, H being heads.
      mask: bool, to be broadcast to `[..., H, Q, K]`, False where q must not see k; or
        `Causal`, whose rows are computed block by block.
      bias: likewise, added to the scores; or `RelativeBias`.

    Returns:
      `[..., Q, H · D]`.

    Example:
      >>> v = jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
      >>> print(attend_in_blocks(jnp.zeros((1, 1, 1, 1)), v, v))
      [[[3.]]]
    """
    queries = q.shape[-3]
    count = -(-queries // QUERIES)
    size = -(-queries // count)
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (q, k, v))  # products without copies

    def split(x):
        padding = [(0, 0)] * (x.ndim - 2) + [(0, count * size - queries), (0, 0)]
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0)

    def split_rows(given):
        if given is None or isinstance(given, Causal | RelativeBias):
            return None
        return split(given) if given.shape[-2] > 1 else None

    def rows(given, part, start):
        if isinstance(given, Causal | RelativeBias):
            return given.rows(start, size)
        return given if part is None else part

    @jax.checkpoint
    def block(start, q, mask_part, bias_part):
        mask_rows = rows(mask, mask_part, start)
        return _attend(q, k, v, mask_rows, rows(bias, bias_part, start))

    starts = jnp.arange(count) * size
    blocks = starts, split(q), split_rows(mask), split_rows(bias)
    _, mixed = jax.lax.scan(lambda _, x: (None, block(*x)), None, blocks)
    mixed = jnp.moveaxis(mixed, 0, -3)
    mixed = mixed.reshape(*mixed.shape[:-3], -1, mixed.shape[-1])[..., :queries, :]
    mixed = jnp.moveaxis(mixed, -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1)


def masked(
    scores: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> jax.Array:
    """Scores `[..., H, Q, K]` in float32 or better, with a bias, least where masked."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return scores


def _attend(q, k, v, mask, bias):
    """`[..., H, Q, D]` from q of that shape and k, v `[..., H, K, D]`."""
    scores = jnp.einsum("...qd,...kd->...qk", q, k)
    scores = masked(scores, mask, bias)
    # The result does not depend on what is subtracted, nor does its derivative.
    largest = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    mixed = jnp.einsum("...qk,...kd->...qd", weights.astype(v.dtype), v)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
