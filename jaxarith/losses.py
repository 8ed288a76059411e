"""Losses on arrays, with masks."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, mask=None) -> jax.Array:
    """Mean cross-entropy of the entries whose mask is True.

    Args:
      logits: `[..., classes]`.
      labels: `i32[...]`.
      mask: `bool[...]`; every entry counts by default.

    Example:
      >>> print(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      1.3863
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if mask is None:
        return losses.mean()
    return jnp.sum(losses, where=mask) / jnp.maximum(jnp.sum(mask), 1)
