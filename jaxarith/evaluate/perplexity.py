r"""The perplexity of a causal language model on a stream of tokens.

.. math:: \exp\Bigl(-\frac{1}{|S|}\sum_{t \in S} \log p(x_t \mid x_{c(t)}, …,
          x_{t-1})\Bigr)

S is the set of tokens that are scored, and c(t) is the first token of the window that
contains t. No token is scored twice. Context makes text more predictable, so only
values for the same window and stride are comparable: for the smallest GPT-2 on
WikiText-103, the published perplexity is 25.2 with a stride of half the window (Ilharco
et al. 2023) and 29.4 in blocks (τJp paper, Yoshida et al. 2025).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith.tree import counted
from jaxarith.typing import ApplyFn, Array, Params


def strided(
    apply_fn: ApplyFn,
    params: Params,
    tokens: Array,
    *,
    window: int = 1024,
    stride: int = 512,
    batch_size: int = 4,
) -> float:
    """Returns the perplexity in overlapping windows; each scores only its new tokens.

    Windows begin at 0, `stride`, 2 · `stride`, … and are `window` tokens long. The last
    one reaches the end of the stream and may be shorter. Each window scores the tokens
    after the end of the previous one, with at least `window` - `stride` tokens of
    context. So every token is scored except the first of the stream, which nothing
    predicts. If `stride` equals `window`, the first token of a window is never scored.

    The method is that of transformers' guide "Perplexity of fixed-length models".

    Args:
      apply_fn: `apply_fn(params, input_ids[B, S], attention_mask[B, S])`, which returns
        logits `[B, S, V]` of the next token, such as `gpt2.language_model` or its
        linearisation.
      params: its parameters.
      tokens: the stream, `i32[N]`.
      window: tokens in a window, at most the number of the model's positions.
      stride: tokens from one window to the next, from 1 to `window`.
      batch_size: windows that run at a time; their logits are `batch_size` · `window`
        · V numbers.

    Returns:
      A number of at least 1; for a model with uniform predictions it is V.

    Raises:
      ValueError: there are fewer than two tokens, the model lacks a token, logits are
        NaN, or a setting is out of range.

    Example:
      >>> def uniform(params, input_ids, attention_mask):
      ...     return jnp.zeros((*input_ids.shape, 50))
      >>> round(strided(uniform, {}, np.arange(20), window=8, stride=4), 4)
      50.0
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens have shape {list(tokens.shape)} and type {tokens.dtype}; expected "
            "one stream of integers [N]."
        )
    if len(tokens) < 2:
        raise ValueError(
            f"a stream of {counted(len(tokens), 'token')} has no perplexity; give at "
            "least two."
        )
    if window < 2:
        raise ValueError(f"window is {window}; expected 2 or more.")
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride is {stride} and window {window}; expected a stride from 1 to the "
            "window, so that no token is left out."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
    return _perplexity(apply_fn, params, tokens, window, stride, batch_size)


def blocks(
    apply_fn: ApplyFn,
    params: Params,
    tokens: Array,
    *,
    window: int = 1024,
    batch_size: int = 4,
) -> float:
    """Returns the perplexity in disjoint blocks: `strided` with `stride=window`.

    Every token of a block except its first is scored. The last block may be shorter.

    The τJp paper (Yoshida et al. 2025) measures in such blocks. Its code joins 1000
    lines at a time and drops the tokens after the last whole block of each group of
    lines. Here there is one stream, and its last tokens are kept.

    Args:
      apply_fn, params, tokens, window, batch_size: as for `strided`.

    Returns:
      A number of at least 1.

    Raises:
      ValueError: as for `strided`.

    Example:
      >>> def successor(params, input_ids, attention_mask):
      ...     return 100 * jax.nn.one_hot(input_ids + 1, 20)
      >>> blocks(successor, {}, np.arange(20), window=8)
      1.0
    """
    return strided(
        apply_fn, params, tokens, window=window, stride=window, batch_size=batch_size
    )


def _perplexity(apply_fn, params, tokens, window, stride, batch_size):
    from tqdm import tqdm  # here, so that `import jaxarith` stays light

    spans = _spans(len(tokens), window, stride)
    # One shape, so one compilation.
    shape = min(batch_size, len(spans)), min(window, len(tokens))
    _check_vocabulary(apply_fn, params, tokens, shape)
    params = jax.device_put(params)
    total, count = 0.0, 0
    with tqdm(total=len(spans), desc="perplexity", unit="window") as bar:
        for i in range(0, len(spans), shape[0]):
            batch = spans[i : i + shape[0]]
            input_ids, mask, scored = _windows(tokens, batch, shape)
            nll = np.asarray(_nll(apply_fn, params, input_ids, mask))
            total += nll[scored[:, 1:]].sum(dtype=np.float64)
            count += scored.sum()
            bar.update(len(batch))
    if np.isnan(total):
        raise ValueError(
            "the model's logits are NaN for these tokens, so there is no perplexity. "
            "Look for NaN or very large weights."
        )
    with np.errstate(over="ignore"):  # a broken model gives infinity
        return float(np.exp(total / count))


def _spans(length, window, stride):
    """Returns `(begin, first scored, end)` of every window."""
    spans, scored = [], 0
    for begin in range(0, length, stride):
        if scored < length:
            end = min(begin + window, length)
            spans.append((begin, max(scored, begin + 1), end))
            scored = end
    return spans


def _windows(tokens, spans, shape):
    """Returns the padded windows of one batch, their masks, and what they score."""
    input_ids = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.int32)
    scored = np.zeros(shape, bool)
    for row, (begin, first, end) in enumerate(spans):
        input_ids[row, : end - begin] = tokens[begin:end]
        mask[row, : end - begin] = 1
        scored[row, first - begin : end - begin] = True
    return input_ids, mask, scored


@functools.partial(jax.jit, static_argnames="apply_fn")
def _nll(apply_fn, params, input_ids, attention_mask):
    """Returns the negative log-likelihood of all tokens but the first, `[B, S - 1]`."""
    logits = apply_fn(params, input_ids, attention_mask)[:, :-1]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    of_next = jnp.take_along_axis(logits, input_ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_next


def _check_vocabulary(apply_fn, params, tokens, shape):
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    size = jax.eval_shape(apply_fn, params, ids, ids).shape[-1]
    if tokens.min() < 0 or tokens.max() >= size:
        raise ValueError(
            f"the tokens are from {tokens.min()} to {tokens.max()}, but the model has "
            f"logits for 0 to {size - 1}. Use the model's own tokenizer."
        )
