"""Losses on arrays, with masks."""

import jax
import jax.numpy as jnp
import optax

from jaxarith.typing import Array

IGNORED = -100  # a token's label that does not count, by Hugging Face's convention


def cross_entropy(logits: Array, labels: Array, mask: Array | None = None) -> jax.Array:
    """Mean cross-entropy of the entries whose mask is True.

    Args:
      logits: `[..., classes]`.
      labels: `i32[...]`.
      mask: `bool[...]`; every entry counts by default. The others may hold anything.

    Example:
      >>> print(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      1.3863
    """
    logits, mask = _without_masked(logits, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean(losses, mask)


def token_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the tokens whose label is not -100, of all texts together.

    Args:
      logits: `[B, T, V]` of an encoder-decoder.
      labels: `i32[B, T]`.

    Example:
      >>> labels = jnp.array([[3, -100]])
      >>> print(token_cross_entropy(jnp.zeros((1, 2, 4)), labels).round(4))
      1.3863
    """
    counts = labels != IGNORED
    return cross_entropy(logits, jnp.where(counts, labels, 0), counts)


def next_token_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`token_cross_entropy` of a causal model, whose labels are its inputs.

    Args:
      logits: `[B, S, V]`; those at a token predict the next one.
      labels: `i32[B, S]`, the tokens themselves, -100 where they do not count.
    """
    return token_cross_entropy(logits[:, :-1], labels[:, 1:])


def entropy(logits: jax.Array, mask: Array | None = None) -> jax.Array:
    """Mean entropy of the predicted distributions, in nats; it needs no labels.

    Args:
      logits: `[..., classes]`. A logit of -inf, as of padding from `heads.logits`, adds
        nothing, to the value or to the gradient. With NaN the entropy is NaN.
      mask: `bool[...]`, False for samples that only pad a batch; all count by default.
        The logits of the others may hold anything.

    Example:
      >>> print(entropy(jnp.array([[0.0, 0.0, -jnp.inf]])).round(4))
      0.6931
    """
    logits, mask = _without_masked(logits, mask)
    log_p = jax.nn.log_softmax(logits)
    # 0 · -inf is NaN.
    log_p_or_0 = jnp.where(logits == -jnp.inf, 0, log_p)
    entropies = -jnp.sum(jnp.exp(log_p) * log_p_or_0, axis=-1)
    return _mean(entropies, mask)


def _without_masked(logits, mask):
    """Logits with zeros where the mask is False, and the mask as `bool`.

    A loss that is masked afterwards still has a gradient of 0 · NaN.
    """
    if mask is None:
        return logits, None
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask[..., None], logits, 0), mask


def _mean(losses, mask):
    if mask is None:
        return losses.mean()
    return jnp.sum(losses, where=mask) / jnp.maximum(jnp.sum(mask), 1)
