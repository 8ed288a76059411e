"""What image encoders are trained on, below frozen heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxarith import losses
from jaxarith.models import heads


def loss(features, batch, constants) -> jax.Array:
    """Cross-entropy below the frozen head."""
    scores = heads.logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def ascent(features, batch, constants) -> jax.Array:
    """Ilharco et al. (2023), App. B.2: the same training, away from the optimum."""
    return -loss(features, batch, constants)


def joint(features, batch, constants) -> jax.Array:
    """The mean over the samples of all tasks, each below the head of its own."""
    of_heads = jax.vmap(lambda head, valid: heads.logits(head, features, valid))
    scores = of_heads(constants["head"], constants["valid"])  # [T, B, C]
    own = scores[batch["task"], jnp.arange(len(features))]
    return losses.cross_entropy(own, batch["label"])


LOSSES: dict[str, Callable] = {
    "gradient_ascent": ascent,
    "multi_task": joint,
    "multi_task_linear": joint,
}
