"""Zero-shot classification heads: frozen text features that classify image features.

Radford et al. 2021 (arXiv:2103.00020), section 3.1.4.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def zero_shot(
    encode: Callable[[list[str]], jax.Array],
    classes: Sequence[str],
    templates: Sequence[str],
    logit_scale: float,
) -> jax.Array:
    """The head of a task from its class names.

    Every template is filled with every class name and encoded; the features of a class
    are normalised, averaged and normalised again, and scaled by `exp(logit_scale)`.

    Args:
      encode: texts to features, `list[str] -> [len(texts), D]`.
      classes: C class names.
      templates: P texts with one `{}` each, such as "a photo of a {}.".
      logit_scale: the logarithm of the inverse temperature, as checkpoints hold it.

    Returns:
      `[C, D]`.

    Raises:
      ValueError: there is no class or no template, or a template has no `{}`.
    """
    if not classes or not templates:
        raise ValueError("a zero-shot head needs at least one class and one template.")
    if wrong := [t for t in templates if t.count("{}") != 1]:
        raise ValueError(f"the template {wrong[0]!r} must hold exactly one '{{}}'.")
    texts = [template.format(name) for name in classes for template in templates]
    features = normalize(encode(texts)).reshape(len(classes), len(templates), -1)
    return normalize(features.mean(axis=1)) * jnp.exp(logit_scale)


def logits(head: jax.Array, features: jax.Array, valid=None) -> jax.Array:
    """Class logits of image features.

    Args:
      head: `[C, D]`, from `zero_shot`.
      features: `[B, D]`; normalised here.
      valid: `bool[C]`, False for classes that only pad the head (see `pad`).

    Returns:
      `[B, C]`; -inf for padding.
    """
    scores = normalize(features) @ head.T
    return scores if valid is None else jnp.where(valid, scores, -jnp.inf)


def pad(heads: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Heads of several tasks in one array, to train the tasks along one axis.

    Args:
      heads: T heads `[C_t, D]`.

    Returns:
      `{"head": [T, max C, D], "valid": bool[T, max C]}`.
    """
    width = max(len(head) for head in heads)
    padded = [jnp.pad(head, ((0, width - len(head)), (0, 0))) for head in heads]
    valid = [jnp.arange(width) < len(head) for head in heads]
    return {"head": jnp.stack(padded), "valid": jnp.stack(valid)}


def normalize(features: jax.Array) -> jax.Array:
    """Features divided by their Euclidean norm over the last axis."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
