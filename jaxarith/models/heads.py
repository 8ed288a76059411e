"""Frozen classification heads, so that fine-tuning changes only the encoder.

A head that is trained with the encoder is one more leaf of the parameters. It starts at
zero and is added to the frozen head of its task, so every task trains its own head:

    frozen = heads.pad([head_of_one_task, head_of_another])
    params_0 = model.params | {"head": jnp.zeros_like(frozen["head"][0])}

    def apply_fn(params, *inputs):
        return encode(params, *inputs), params["head"]

    def loss_fn(outputs, batch, constants):
        features, moved = outputs
        head = constants["head"] + constants["trains"] * moved
        scores = heads.logits(head, features, constants["valid"])
        return losses.cross_entropy(scores, batch["label"])

    constants = frozen | {"trains": jnp.array([1.0, 0.0])}  # the second stays frozen
    taus = train.fine_tune(
        apply_fn, params_0, loss_fn, batches, config, names=names, constants=constants
    )
    encoders = [tree.select(tau, "(?!head).*") for tau in taus]  # merge these
    trained = [head + tau["head"] for head, tau in zip(frozen["head"], taus)]

The τJp penalty measures all outputs, so give it an `apply_fn` without the head.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.typing import Array, Numbers


def zero_shot(
    encode: Callable[[list[str]], jax.Array],
    classes: Sequence[str],
    templates: Sequence[str],
    logit_scale: float,
) -> jax.Array:
    """Makes a head from class names: text features that classify images.

    Every template is filled with every class name and encoded. The features of a class
    are normalised, averaged, normalised again, and scaled by `exp(logit_scale)`
    (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).

    Args:
      encode: function from texts to features, `list[str] -> [len(texts), D]`.
      classes: C class names.
      templates: P texts with one `{}` each, such as "a photo of a {}.".
      logit_scale: logarithm of the inverse temperature, as checkpoints store it.

    Returns:
      The head, `[C, D]`.

    Raises:
      ValueError: there is no class or no template, or a template does not contain
        exactly one `{}`.
    """
    if not classes or not templates:
        raise ValueError("a zero-shot head needs at least one class and one template.")
    if wrong := [t for t in templates if t.count("{}") != 1]:
        raise ValueError(f"the template {wrong[0]!r} must contain exactly one '{{}}'.")
    texts = [template.format(name) for name in classes for template in templates]
    features = normalize(encode(texts)).reshape(len(classes), len(templates), -1)
    return normalize(features.mean(axis=1)) * jnp.exp(logit_scale)


def class_means(
    features: Array,
    labels: Array | Sequence[int],
    classes: int,
    *,
    scale: float = 20.0,
) -> jax.Array:
    """Makes a head from features of labelled samples: the mean of every class.

    The features are normalised before they are averaged, and the means are normalised
    again. So a sample belongs to the class with the closest mean direction, as in
    prototypical networks (Snell, Swersky, Zemel. NeurIPS 2017. arXiv:1703.05175).

    Args:
      features: features of the pre-trained encoder, `[N, D]`.
      labels: class of each sample, `i32[N]`.
      classes: C, the number of classes.
      scale: the length of each row, an inverse temperature. sentence-transformers
        compare normalised features with 20.

    Returns:
      The head `[C, D]`, for `logits`.

    Raises:
      ValueError: a class has no sample, or the mean of its features is zero.

    Example:
      >>> features = jnp.array([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
      >>> print(class_means(features, [1, 0, 1], 2, scale=1.0))
      [[0. 1.]
       [1. 0.]]
    """
    features, labels = normalize(jnp.asarray(features)), jnp.asarray(labels)
    sums = jax.ops.segment_sum(features, labels, classes)
    if missing := [
        int(c) for c in jnp.flatnonzero(jnp.linalg.norm(sums, axis=-1) == 0)
    ]:
        raise ValueError(
            f"no features for the classes {missing} of {classes}; give samples of each."
        )
    return scale * normalize(sums)


def label_words(words: jax.Array, bias: jax.Array, ids: Numbers) -> jax.Array:
    """Makes a head from a masked language model: the rows of its label words.

    Schick, Schütze. Exploiting Cloze-Questions for Few-Shot Text Classification and
    Natural Language Inference. EACL 2021. arXiv:2001.07676.

    Args:
      words: the model's output matrix, `[V, D]`.
      bias: bias of the model's logits, `[V]`.
      ids: the token of every class's label word, C tokens.

    Returns:
      The head `[C, D + 1]`, for `affine_logits`.

    Example:
      >>> label_words(jnp.ones((5, 2)), jnp.arange(5.0), [3, 0]).tolist()
      [[1.0, 1.0, 3.0], [1.0, 1.0, 0.0]]
    """
    rows = jnp.asarray(ids)
    return jnp.concatenate([words[rows], bias[rows][:, None]], axis=1)


def logits(
    head: jax.Array, features: jax.Array, valid: Array | None = None
) -> jax.Array:
    """Returns class logits, which depend only on the direction of the features.

    Args:
      head: head `[C, D]` from `zero_shot` or `class_means`.
      features: features `[B, D]`; this function normalises them.
      valid: `bool[C]`, False for classes that only pad the head (see `pad`).

    Returns:
      Logits `[B, C]`; -inf for padding.
    """
    return _valid(normalize(features) @ head.T, valid)


def affine_logits(head: Array, features: Array, valid: Array | None = None) -> Array:
    """Like `logits`, but without normalisation; the head's last column is a bias."""
    return _valid(features @ head[:, :-1].T + head[None, :, -1], valid)


def _valid(scores, valid):
    return scores if valid is None else jnp.where(valid, scores, -jnp.inf)


def pad(heads: Sequence[Array]) -> dict[str, jax.Array]:
    """Joins the heads of several tasks in one array, to train along a task axis.

    Args:
      heads: T heads `[C_t, D]`, or `[C_t, D + 1]`.

    Returns:
      `{"head": [T, max C, D], "valid": bool[T, max C]}`.
    """
    width = max(len(head) for head in heads)
    padded = [jnp.pad(head, ((0, width - len(head)), (0, 0))) for head in heads]
    valid = [jnp.arange(width) < len(head) for head in heads]
    return {"head": jnp.stack(padded), "valid": jnp.stack(valid)}


def normalize(features: jax.Array) -> jax.Array:
    """Divides features by their Euclidean norm over the last axis; zero stays zero."""
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    return features / jnp.where(squares == 0, 1, tree.safe_sqrt(squares))
