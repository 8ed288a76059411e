"""Perplexity against closed forms and a float64 transcription of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import tree
from jaxarith.evaluate import perplexity
from jaxarith.models import gpt2

V = 11


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, V, size=length)


def average_model(params, input_ids, attention_mask):
    """The next token's logits are the mean of the rows of all tokens so far."""
    rows = params["table"][input_ids] * attention_mask[..., None]
    count = jnp.arange(1, input_ids.shape[1] + 1)[None, :, None]
    return jnp.cumsum(rows, axis=1) / count


def average_params():
    table = normal(1, V, V, scale=6.0).astype(np.float32)
    return {"table": jnp.asarray(table)}


def nll_in_context(params, context, token):
    """-log p(token | context) of `average_model`, in float64."""
    logits = np.asarray(params["table"], np.float64)[context].mean(axis=0)
    return np.log(np.exp(logits).sum()) - logits[token]


def plain(params, stream, window, stride):
    """Token by token: the window that is the first to hold it scores it."""
    nlls, begin, scored = [], 0, 0
    while scored < len(stream):
        end = min(begin + window, len(stream))
        for t in range(scored, end):
            if t > begin:
                nlls.append(nll_in_context(params, stream[begin:t], stream[t]))
        begin, scored = begin + stride, end
    return np.exp(np.mean(nlls)), len(nlls)


@pytest.mark.parametrize(
    "length, window, stride",
    [
        (50, 8, 4),
        (50, 8, 3),
        (50, 8, 1),
        (50, 8, 7),
        (50, 8, 8),
        (49, 8, 8),  # a last block of one token, which scores nothing
        (48, 8, 4),  # a whole last window
        (5, 8, 4),  # shorter than the window
        (2, 8, 8),
        (20, 2, 1),
    ],
)
def test_strided_perplexity_is_the_plain_one(length, window, stride):
    params, stream = average_params(), tokens(length)
    expected, scored = plain(params, stream, window, stride)
    if stride < window:
        assert scored == length - 1
    assert abs(expected - V) > 0.5
    for batch_size in (1, 4, 100):
        actual = perplexity.strided(
            average_model,
            params,
            stream,
            window=window,
            stride=stride,
            batch_size=batch_size,
        )
        assert type(actual) is float
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("length", [16, 17, 23, 5])
def test_blocks_are_scored_by_themselves_and_the_rest_is_kept(length):
    params, stream = average_params(), tokens(length)
    nlls = [
        nll_in_context(params, stream[begin:t], stream[t])
        for begin in range(0, length, 8)
        for t in range(begin + 1, min(begin + 8, length))
    ]
    assert len(nlls) == length - -(-length // 8)
    actual = perplexity.blocks(average_model, params, stream, window=8)
    assert type(actual) is float
    np.testing.assert_allclose(actual, np.exp(np.mean(nlls)), rtol=1e-5)


def test_more_context_and_smaller_steps_are_other_numbers():
    """The settings of the tables differ: a test of one could pass with another's."""
    params, stream = average_params(), tokens(60)
    results = [
        perplexity.strided(average_model, params, stream, window=w, stride=s)
        for w, s in [(8, 8), (8, 4), (8, 1), (16, 8), (60, 60)]
    ]
    assert min(abs(np.diff(np.sort(results)))) > 1e-3


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    def uniform(params, input_ids, attention_mask):
        return jnp.full((*input_ids.shape, V), 3.0)

    for stride in (1, 4, 8):
        actual = perplexity.strided(uniform, {}, tokens(99), window=8, stride=stride)
        assert actual == pytest.approx(V, rel=1e-6)
    assert perplexity.blocks(uniform, {}, tokens(99), window=8) == pytest.approx(V)


def test_a_broken_model_has_infinite_perplexity():
    def certain(params, input_ids, attention_mask):
        return 1e4 * jax.nn.one_hot((input_ids + 1) % V, V)

    assert perplexity.blocks(certain, {}, np.zeros(9, int), window=4) == np.inf
    assert perplexity.blocks(certain, {}, np.arange(9), window=4) == 1.0


def test_long_streams_sum_in_float64():
    """In float32 a running sum of 2 ** 18 numbers near 12 has lost its last digits."""
    nll = np.float32(12.3456789)

    def constant(params, input_ids, attention_mask):
        rest = jnp.log(-jnp.expm1(-nll)) - jnp.log(2.0)
        logits = jnp.array([-nll, rest, rest])
        return jnp.broadcast_to(logits, (*input_ids.shape, 3))

    actual = perplexity.blocks(
        constant, {}, np.zeros(2**18, int), window=2**12, batch_size=8
    )
    assert np.log(actual) == pytest.approx(nll, rel=2e-7)


def test_gpt2_in_windows_and_one_compilation():
    config = gpt2.GPT2Config(V, 8, n_embd=12, n_layer=2, n_head=3)
    rng = np.random.default_rng(0)
    params = tree.map_with_path(
        lambda path, leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2,
        gpt2.layout(config),
    )
    model = gpt2.language_model(config)
    stream = tokens(30)
    shapes = []

    def apply_fn(params, input_ids, attention_mask):
        shapes.append(input_ids.shape)
        return model(params, input_ids, attention_mask)

    compiled = jax.jit(model)

    def nll(begin, scored):
        ids = stream[None, begin : begin + 8]
        logits = compiled(params, ids, np.ones_like(ids))[0]
        logits = np.asarray(logits, np.float64)
        return [
            np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, ids[0, t]]
            for t in scored
        ]

    # By the positions in each window that it is the first to hold.
    nlls = nll(0, range(1, 8))
    for begin in (4, 8, 12, 16, 20):
        nlls += nll(begin, range(4, 8))
    nlls += nll(24, range(4, 6))
    assert len(nlls) == 29
    expected = np.exp(np.mean(nlls))
    assert abs(expected - V) > 1
    for _ in range(2):
        actual = perplexity.strided(
            apply_fn, params, stream, window=8, stride=4, batch_size=4
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # Once for the size of the vocabulary and once to be compiled.
    assert shapes == [(4, 8)] * 2


def test_bad_streams_and_settings_are_refused():
    params = average_params()

    stream = tokens(20)

    def refused(match, stream=stream, **settings):
        with pytest.raises(ValueError, match=match):
            perplexity.strided(average_model, params, stream, **settings)

    refused("a stream of 1 token has no perplexity", tokens(1))
    refused("a stream of 0 tokens has no perplexity", tokens(0))
    refused(r"shape \[2, 10\] and type int64; expected one", stream.reshape(2, 10))
    refused("type float64; expected one stream of integers", np.zeros(20))
    refused("stride is 9 and window 8; expected a stride", window=8, stride=9)
    refused("stride is 0 and window 8; expected a stride", window=8, stride=0)
    refused("window is 1; expected 2 or more", window=1, stride=1)
    refused("batch_size is 0; expected 1 or more", batch_size=0)
    refused("tokens are from 0 to 11, but the model has logits for 0 to 10", [0, V])
    refused("tokens are from -1 to 3", [-1, 3])
