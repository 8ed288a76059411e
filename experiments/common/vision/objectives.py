"""Losses for image encoders below frozen heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxarith import losses
from jaxarith.models import heads


def loss(features, batch, constants) -> jax.Array:
    """Returns the cross-entropy of the features below a frozen head."""
    scores = heads.logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def ascent(features, batch, constants) -> jax.Array:
    """Returns the negative of `loss`, for gradient ascent (editing paper, App. B.2)."""
    return -loss(features, batch, constants)


def joint(features, batch, constants) -> jax.Array:
    """Returns the mean loss over samples of all tasks, each below its own head."""
    of_heads = jax.vmap(lambda head, valid: heads.logits(head, features, valid))
    scores = of_heads(constants["head"], constants["valid"])  # [T, B, C]
    own = scores[batch["task"], jnp.arange(len(features))]
    return losses.cross_entropy(own, batch["label"])


LOSSES: dict[str, Callable] = {
    "gradient_ascent": ascent,
    "multi_task": joint,
    "multi_task_linear": joint,
}
