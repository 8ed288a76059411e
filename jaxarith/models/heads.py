"""Classification heads: frozen, so that fine-tuning moves nothing but the encoder.

A head that is trained beside the encoder is one more leaf of the parameters. It starts
at zero and is added to the frozen head of its task, so every task trains its own:

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
    encoders = [tree.select(tau, "(?!head).*") for tau in taus]  # what is merged
    trained = [head + tau["head"] for head, tau in zip(frozen["head"], taus)]

The τJp penalty measures all outputs, so it takes an `apply_fn` without the head.
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
    """The head of a task from its class names: text features that classify images.

    Every template is filled with every class name and encoded; the features of a class
    are normalised, averaged and normalised again, and scaled by `exp(logit_scale)`
    (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).

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


def class_means(
    features: Array,
    labels: Array | Sequence[int],
    classes: int,
    *,
    scale: float = 20.0,
) -> jax.Array:
    """The head of a task from features of labelled samples: the mean of every class.

    Features are normalised before the mean and the means after it, so that a sample
    belongs to the class whose mean direction is closest, as in prototypical networks
    (Snell, Swersky, Zemel. NeurIPS 2017. arXiv:1703.05175).

    Args:
      features: `[N, D]` of the pre-trained encoder.
      labels: `i32[N]`.
      classes: C, their number.
      scale: the length of a row, an inverse temperature; 20 is what
        sentence-transformers compare normalised features with.

    Returns:
      `[C, D]`, for `logits`.

    Raises:
      ValueError: a class has no sample, or its features have the mean zero.

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
    """The head of a task from a masked language model: the rows of its label words.

    Schick, Schütze. Exploiting Cloze-Questions for Few-Shot Text Classification and
    Natural Language Inference. EACL 2021. arXiv:2001.07676.

    Args:
      words: the output matrix of the model, `[V, D]`.
      bias: bias of its logits, `[V]`.
      ids: the word of every class, C tokens.

    Returns:
      `[C, D + 1]`, for `affine_logits`.

    Example:
      >>> label_words(jnp.ones((5, 2)), jnp.arange(5.0), [3, 0]).tolist()
      [[1.0, 1.0, 3.0], [1.0, 1.0, 0.0]]
    """
    rows = jnp.asarray(ids)
    return jnp.concatenate([words[rows], bias[rows][:, None]], axis=1)


def logits(
    head: jax.Array, features: jax.Array, valid: Array | None = None
) -> jax.Array:
    """Class logits of features by their direction.

    Args:
      head: `[C, D]`, from `zero_shot` or `class_means`.
      features: `[B, D]`; normalised here.
      valid: `bool[C]`, False for classes that only pad the head (see `pad`).

    Returns:
      `[B, C]`; -inf for padding.
    """
    return _valid(normalize(features) @ head.T, valid)


def affine_logits(head: Array, features: Array, valid: Array | None = None) -> Array:
    """Like `logits`, with features as they are and a bias in the head's last column."""
    return _valid(features @ head[:, :-1].T + head[None, :, -1], valid)


def _valid(scores, valid):
    return scores if valid is None else jnp.where(valid, scores, -jnp.inf)


def pad(heads: Sequence[Array]) -> dict[str, jax.Array]:
    """Heads of several tasks in one array, to train the tasks along one axis.

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
    """Features divided by their Euclidean norm over the last axis; zero stays zero."""
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    return features / jnp.where(squares == 0, 1, tree.safe_sqrt(squares))
