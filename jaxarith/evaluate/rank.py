"""Classification with an encoder-decoder, with texts as labels.

Rank classification (Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023.
arXiv:2212.04089, App. D.7) predicts the label to which the decoder gives the lowest
perplexity. The teacher-forced score of tokens is another metric, not an accuracy of a
classifier: every token of the true label, including the end token, is predicted from
the tokens before it.

Shapes: N inputs in batches of B, C candidate labels, T tokens, V in the vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from jaxarith import metrics, sharding
from jaxarith.batches import fields_of, mask_of
from jaxarith.losses import IGNORED
from jaxarith.tree import settled
from jaxarith.typing import ApplyFn, Params


def label_losses(
    apply_fn: ApplyFn,
    params: Params,
    batches: Sequence[dict],
    labels: np.ndarray,
    *,
    start_token_id: int = 0,
    mesh: Mesh | None = None,
) -> np.ndarray:
    r"""Returns the mean negative log-likelihood of every label's tokens, per input.

    .. math:: \ell_{nc} = -\frac1{T_c}\sum_{t=1}^{T_c}
              \log p(y_{ct} \mid y_{c1}, \dots, y_{c,t-1}, x_n)

    Its exponential is the perplexity, so `label_losses(...).argmin(axis=1)` is the
    prediction of rank classification.

    Args:
      apply_fn: `apply_fn(params, input_ids, attention_mask, decoder_input_ids)`. It
        maps `[B, S]`, `[B, S]` and `[B, C, T]` to logits `[B, C, T, V]`, as
        `t5.language_model(config)` does, which encodes an input once for all labels.
      params: its parameters.
      batches: dicts of `input_ids`, `attention_mask`, and `mask`, False for padding.
      labels: tokens of each label with the end token, then -100, `i32[C, T]`.
      start_token_id: the first input of the decoder.
      mesh: the devices that share every batch, see `sharding`; by default the devices
        that hold the parameters.

    Returns:
      `f32[N, C]`, where N is the number of True entries in all masks.

    Raises:
      ValueError: a label has no token, has -100 before a token, or equals another one;
        there is no batch; or a loss is NaN, for example because the model lacks a
        token.

    Example:
      >>> def apply_fn(params, input_ids, attention_mask, decoder_input_ids):
      ...     bias = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      ...     return jnp.zeros((*decoder_input_ids.shape, 1)) + bias[None, None, None]
      >>> ids, ones = np.ones((1, 4), int), np.ones((1, 4), int)
      >>> batch = {"input_ids": ids, "attention_mask": ones, "mask": np.array([True])}
      >>> labels = np.array([[2, 1], [0, -100]])
      >>> print(np.exp(label_losses(apply_fn, {}, [batch], labels)).round(4))
      [[4. 2.]]
    """
    labels = np.asarray(labels)
    _check_labels(labels)
    if not batches:
        raise ValueError("there is no batch to rank the labels for.")
    mesh = sharding.for_tasks(mesh or sharding.mesh_of(params), 1)
    params = sharding.shard(params, mesh)  # once, not with every batch
    start = np.int32(start_token_id)
    rows = []
    for batch in batches:
        texts = fields_of(batch, ["input_ids", "attention_mask"])
        texts = sharding.spread(texts, mesh)
        losses = settled(_losses(apply_fn, mesh, params, *texts, labels, start))
        # Rows beyond the mask only filled up the devices.
        rows.append(np.compress(mask_of(batch), np.asarray(losses), axis=0))
    losses = np.concatenate(rows)
    if np.isnan(losses).any():
        raise ValueError(
            f"the loss of label {np.isnan(losses).any(axis=0).argmax()} is NaN for an "
            "input. Are there tokens beyond the model's vocabulary, or NaN weights?"
        )
    return losses


# Compiled once per model and shape, however many datasets and coefficients follow.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(apply_fn, mesh, params, input_ids, attention_mask, labels, start):
    counts = labels != IGNORED
    tokens = jnp.where(counts, labels, 0)
    # No token sees a later one, so the values after the end do not matter.
    inputs = jnp.roll(tokens, 1, axis=1).at[:, 0].set(start)
    inputs, tokens, counts = (
        jnp.broadcast_to(each[None], (len(input_ids), *each.shape))
        for each in (inputs, tokens, counts)
    )
    apply_fn = sharding.on_mesh(apply_fn, mesh)
    logits = apply_fn(params, input_ids, attention_mask, inputs)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    found = jnp.mean(losses, axis=-1, where=counts)
    return sharding.constrain(found, mesh, P())  # every process reads all of it


def _check_labels(labels):
    if labels.ndim != 2 or labels.shape[0] == 0:
        raise ValueError(f"labels of shape {list(labels.shape)}; expected [C, T].")
    counts = labels != IGNORED
    lengths = counts.sum(axis=1)
    whole = (lengths > 0) & (
        counts == (np.arange(labels.shape[1]) < lengths[:, None])
    ).all(1)
    if not whole.all():
        c = int(np.argmin(whole))
        raise ValueError(
            f"label {c} is {labels[c].tolist()}; expected one token or more, and "
            f"{IGNORED} only after the last token."
        )
    _, first = np.unique(labels, axis=0, return_index=True)
    if len(first) < len(labels):
        again = min(set(range(len(labels))) - set(first.tolist()))
        raise ValueError(
            f"label {again}, {labels[again].tolist()}, is there twice; labels must "
            "differ. If their texts differ, their tokens were cut too short."
        )


def predicted_tokens(
    logits: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the predicted and the true tokens at all positions where a label counts.

    Args:
      logits: outputs of `apply_fn` for labels shifted to the right, `[..., T, V]`.
      labels: tokens including the end token; -100 where nothing counts, `i32[..., T]`.

    Returns:
      `predicted` and `expected`, `i32[n]` each.

    Raises:
      ValueError: the shapes do not fit, or no label counts.

    Example:
      >>> predicted, expected = predicted_tokens(np.eye(3)[None], [[0, 2, -100]])
      >>> print(predicted, expected)
      [0 1] [0 2]
    """
    labels = np.asarray(labels)
    if np.shape(logits)[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {list(np.shape(logits))} for labels of shape "
            f"{list(labels.shape)}; expected the labels' shape and then the vocabulary."
        )
    counts = labels != IGNORED
    if not counts.any():
        raise ValueError(f"there is no token to score: every label is {IGNORED}.")
    predicted = np.asarray(logits).argmax(-1)[counts]
    return predicted.astype(np.int32), labels[counts].astype(np.int32)


def token_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Returns the share of true tokens that have the largest logit at their position.

    With several labels to choose from, it says little: tokens that the labels share,
    such as the end token, are right for any input.

    Args:
      logits, labels: as for `predicted_tokens`.

    Example:
      >>> token_accuracy(np.eye(3)[None], [[0, 2, -100]])
      0.5
    """
    predicted, expected = predicted_tokens(logits, labels)
    return float(np.mean(predicted == expected))


def token_matthews(logits: ArrayLike, labels: ArrayLike) -> float:
    """Returns the Matthews correlation of predicted and true tokens.

    Every token is a class.

    Gorodkin. Comparing Two K-Category Assignments by a K-Category Correlation
    Coefficient. Computational Biology and Chemistry 28, 2004.

    Args:
      logits, labels: as for `predicted_tokens`.

    Returns:
      A number from -1 to 1; 0 if all predicted tokens are the same.

    Raises:
      ValueError: as for `predicted_tokens`, or all true tokens are the same.

    Example:
      >>> token_matthews(np.eye(3)[None], [[0, 1, 2]])
      1.0
    """
    return metrics.matthews(*predicted_tokens(logits, labels))
