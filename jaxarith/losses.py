"""Losses on arrays, with masks."""

import jax
import jax.numpy as jnp
import optax

from jaxarith.typing import Array

IGNORED = -100  # label of a token that does not count, as in Hugging Face's datasets


def cross_entropy(logits: Array, labels: Array, mask: Array | None = None) -> jax.Array:
    """Returns the mean cross-entropy, in nats, of the entries whose mask is True.

    Args:
      logits: `f32[..., classes]`.
      labels: `i32[...]`.
      mask: `bool[...]`; by default every entry counts. Masked entries may hold any
        values.

    Returns:
      A scalar; 0 if the mask is False everywhere.

    Example:
      >>> print(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      1.3863
    """
    logits, mask = _without_masked(logits, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean(losses, mask)


def token_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, in nats, of the tokens whose label is not -100.

    The mean is over the tokens of all texts together.

    Args:
      logits: `f32[B, T, V]`, logits of an encoder-decoder.
      labels: `i32[B, T]`.

    Example:
      >>> labels = jnp.array([[3, -100]])
      >>> print(token_cross_entropy(jnp.zeros((1, 2, 4)), labels).round(4))
      1.3863
    """
    counts = labels != IGNORED
    return cross_entropy(logits, jnp.where(counts, labels, 0), counts)


def next_token_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `token_cross_entropy` for a causal model, whose labels are its inputs.

    Args:
      logits: `f32[B, S, V]`; the logits at a token predict the next token.
      labels: `i32[B, S]`: the tokens themselves, or -100 for those that do not count.

    Example:
      >>> logits, labels = jnp.zeros((1, 3, 4)), jnp.array([[3, 2, -100]])
      >>> print(next_token_cross_entropy(logits, labels).round(4))
      1.3863
    """
    return token_cross_entropy(logits[:, :-1], labels[:, 1:])


def entropy(logits: jax.Array, mask: Array | None = None) -> jax.Array:
    """Returns the mean entropy of the predicted distributions, in nats, without labels.

    Args:
      logits: `f32[..., classes]`. A logit of -inf adds nothing, neither to the value
        nor to the gradient; `heads.logits` pads with such logits. If a logit is NaN,
        the entropy is NaN.
      mask: `bool[...]`, False for samples that only pad a batch; by default every
        sample counts. Masked logits may hold any values.

    Example:
      >>> print(entropy(jnp.array([[0.0, 0.0, -jnp.inf]])).round(4))
      0.6931
    """
    logits, mask = _without_masked(logits, mask)
    log_p = jax.nn.log_softmax(logits)
    # Else 0 · -inf would be NaN.
    log_p_or_0 = jnp.where(logits == -jnp.inf, 0, log_p)
    entropies = -jnp.sum(jnp.exp(log_p) * log_p_or_0, axis=-1)
    return _mean(entropies, mask)


def _without_masked(logits, mask):
    """Returns the logits with zeros where the mask is False, and the mask as `bool`.

    To mask only the loss is not enough: its gradient would still be 0 · NaN.
    """
    if mask is None:
        return logits, None
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask[..., None], logits, 0), mask


def _mean(losses, mask):
    if mask is None:
        return losses.mean()
    return jnp.sum(losses, where=mask) / jnp.maximum(jnp.sum(mask), 1)
