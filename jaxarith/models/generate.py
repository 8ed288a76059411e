"""Generates text with a cache, greedy or sampled, as one compiled program.

A model provides a `Decoder`, such as `gpt2.decoder(config)`. This module does not
depend on any model.

Shapes: B texts, V tokens in the vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.typing import Params


class Decoder(NamedTuple):
    """A model that writes one token at a time. The cache is any pytree of arrays.

    Attributes:
      start: `start(params, *inputs, room) -> (cache, logits[B, V])`. It reads the
        prompt. `room`, a static int, is the number of `step` calls that the cache must
        have room for.
      step: `step(params, cache, tokens[B]) -> (cache, logits[B, V])`. The shapes and
        dtypes of the cache do not change.
    """

    start: Callable
    step: Callable


def generate(
    decoder: Decoder,
    params: Params,
    *inputs: Any,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Generates the tokens that a model appends to each text of a batch.

    At temperature 0, each token is the one with the largest logit. Otherwise the logits
    are divided by the temperature, cut to `top_k`, then cut to `top_p`, and the token
    is drawn from their softmax. Row b draws its token i with the key
    `fold_in(fold_in(key, b), i)`, so its text does not depend on the other rows.

    It ends early when every row has written `eos_token_id`. Keep the decoder: the same
    decoder with the same settings is not compiled again.

    Args:
      decoder: `start` and `step` of the model.
      params: parameters of the model.
      *inputs: the prompt, passed on to `decoder.start`.
      max_new_tokens: the length of the result.
      eos_token_id: the token that ends a text: after it, a row holds only padding. None
        if no token ends a text.
      pad_token_id: the padding; by default `eos_token_id`.
      temperature: 0 is greedy; below 1 is less random than the model, above 1 more.
      top_k: number of likeliest tokens that can be drawn; None for all.
      top_p: the probability that the likeliest tokens must reach together; only they
        can be drawn. None for 1.
      key: key of the random draws; not used at temperature 0.

    Returns:
      i32[B, max_new_tokens], without the prompt; it includes the end token.

    Raises:
      ValueError: a setting is out of range, or the temperature is not 0 and there is no
        key.

    Example:
      >>> def start(params, token, room):
      ...     return None, jax.nn.one_hot(token + 1, 5)
      >>> def step(params, cache, tokens):
      ...     return None, jax.nn.one_hot(tokens + 1, 5)
      >>> count = Decoder(start, step)
      >>> inputs = jnp.array([0, 1])
      >>> print(generate(count, {}, inputs, max_new_tokens=4, eos_token_id=3))
      [[1 2 3 3]
       [2 3 3 3]]
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; expected a finite number, 0 or more."
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"temperature is {temperature}, but there is no key to draw tokens with; "
            "pass key=jax.random.key(seed), or temperature=0 for greedy decoding."
        )
    if top_k is not None:
        _check_top_k(top_k)
    if top_p is not None:
        _check_top_p(top_p)
    if pad_token_id is None:
        pad_token_id = 0 if eos_token_id is None else eos_token_id  # 0 is never written
    return _generate(
        decoder,
        params,
        inputs,
        key if temperature > 0 else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def linearized(decoder: Decoder) -> Decoder:
    r"""Makes a decoder of the tangent-space model (Ortiz-Jimenez et al. 2023, Eq. 3).

    Its logits are :math:`f(x; \theta_0) + J(x; \theta_0)\tau`. It keeps the cache of
    the model at θ0 and the tangent of that cache, so a token takes three times as many
    matrix products as with the network.

    Args:
      decoder: decoder of the network.

    Returns:
      A `Decoder` with parameters `(params_0, tau)`; `tau` may cover only a part.

    Example:
      >>> def start(params, token, room):
      ...     square = params["w"] ** 2
      ...     return square, jnp.outer(square * token, jnp.arange(3))
      >>> state = {"w": jnp.array(1.0)}, {"w": jnp.array(-1.0)}
      >>> (cache, move), logits = linearized(Decoder(start, None)).start(
      ...     state, jnp.array([1.0]), room=0
      ... )
      >>> print(cache, move, logits)
      1.0 -2.0 [[ 0. -1. -2.]]
    """

    def start(state, *inputs, room):
        params_0, tau = state
        (cache, logits), (moves, moved) = jax.jvp(
            lambda params: decoder.start(params, *inputs, room=room),
            (params_0,),
            (tree.fill(tau, params_0),),
        )
        return (cache, _without_float0(moves, cache)), logits + moved

    def step(state, caches, tokens):
        params_0, tau = state
        cache, moves = caches
        (cache, logits), (moves, moved) = jax.jvp(
            lambda params, cache: decoder.step(params, cache, tokens),
            (params_0, cache),
            (tree.fill(tau, params_0), _with_float0(moves, cache)),
        )
        return (cache, _without_float0(moves, cache)), logits + moved

    return Decoder(start, step)


# Tangents of integers have a dtype of their own, which no loop can carry.


def _without_float0(moves, cache):
    def leaf(move, kept):
        return jnp.zeros(kept.shape) if move.dtype == jax.dtypes.float0 else move

    return jax.tree.map(leaf, moves, cache)


def _with_float0(moves, cache):
    def leaf(move, kept):
        if jnp.issubdtype(kept.dtype, jnp.floating):
            return move
        return np.zeros(kept.shape, jax.dtypes.float0)

    return jax.tree.map(leaf, moves, cache)


@functools.partial(
    jax.jit,
    static_argnames=(
        "decoder",
        "max_new_tokens",
        "eos_token_id",
        "pad_token_id",
        "temperature",
        "top_k",
        "top_p",
    ),
)
def _generate(
    decoder,
    params,
    inputs,
    key,
    *,
    max_new_tokens,
    eos_token_id,
    pad_token_id,
    temperature,
    top_k,
    top_p,
):
    def choose(logits, i):
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)

        def draw(b, logits):
            drawn = jax.random.fold_in(jax.random.fold_in(key, b), i)
            return jax.random.categorical(drawn, logits)

        return jax.vmap(draw)(jnp.arange(len(logits)), logits).astype(jnp.int32)

    def ended(new):
        return (
            jnp.zeros(new.shape, bool) if eos_token_id is None else new == eos_token_id
        )

    def proceeds(state):
        i, _, _, _, over = state
        return (i < max_new_tokens) & ~over.all()

    def proceed(state):
        i, cache, tokens, last, over = state
        cache, logits = decoder.step(params, cache, last)
        new = jnp.where(over, pad_token_id, choose(logits, i))
        return i + 1, cache, tokens.at[:, i].set(new), new, over | ended(new)

    # The last token is written but not read, so there is one step fewer than tokens.
    cache, logits = decoder.start(params, *inputs, room=max_new_tokens - 1)
    first = choose(logits, 0)
    tokens = jnp.full((len(first), max_new_tokens), pad_token_id, jnp.int32)
    tokens = tokens.at[:, 0].set(first)
    state = (1, cache, tokens, first, ended(first))
    return jax.lax.while_loop(proceeds, proceed, state)[2]


def keep_top_k(logits: jax.Array, top_k: int) -> jax.Array:
    """Sets all but the `top_k` largest logits to -inf; ties with the last one stay.

    Fan et al. Hierarchical Neural Story Generation. ACL 2018. arXiv:1805.04833.

    Args:
      logits: logits, `[..., V]`.
      top_k: number of logits to keep, 1 or more; above V, all are kept.

    Raises:
      ValueError: `top_k` is below 1.

    Example:
      >>> print(keep_top_k(jnp.array([1.0, 3.0, 2.0]), 2))
      [-inf   3.   2.]
    """
    _check_top_k(top_k)
    largest, _ = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    return jnp.where(logits < largest[..., -1:], -jnp.inf, logits)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Sets all logits to -inf except the likeliest, which together reach `top_p`.

    The token that crosses `top_p` is kept, so at least one token is kept.

    Holtzman et al. The Curious Case of Neural Text Degeneration. ICLR 2020.
    arXiv:1904.09751.

    Args:
      logits: logits, `[..., V]`.
      top_p: the probability to reach, above 0 and at most 1.

    Raises:
      ValueError: `top_p` is out of range.

    Example:
      >>> probabilities = jnp.array([0.5, 0.2, 0.3])
      >>> print(jnp.isfinite(keep_top_p(jnp.log(probabilities), 0.6)))
      [ True False  True]
    """
    _check_top_p(top_p)
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    # Summed from the small end: rounding of a sum near 1 would lose the tail.
    up_to = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (up_to > 1 - top_p).at[..., -1].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def _check_top_k(top_k):
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more, or None for all.")


def _check_top_p(top_p):
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number above 0 and at most 1.")
