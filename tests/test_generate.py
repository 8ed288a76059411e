"""Generation against transformers' filters, closed forms and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith.models.generate import Decoder, generate, keep_top_k, keep_top_p

V = 7


def table_decoder(vocabulary=V):
    """The logits of the next token are row `(token + tokens so far) % V` of a table."""

    def start(params, first, room):
        at = jnp.zeros(first.shape, jnp.int32) + params["offset"]
        return {"at": at}, params["table"][(first + at) % vocabulary]

    def step(params, cache, tokens):
        at = cache["at"] + 1
        return {"at": at}, params["table"][(tokens + at) % vocabulary]

    return Decoder(start, step)


DECODER = table_decoder()


def table(seed=4, vocabulary=V):
    logits = normal(seed, vocabulary, vocabulary, scale=2.0).astype(np.float32)
    return {"table": jnp.asarray(logits), "offset": jnp.int32(0)}


def greedy(params, first, length, eos=None, pad=0):
    """One row after another, in Python."""
    rows = []
    for token in np.asarray(first):
        row = []
        for i in range(length):
            token = int(np.argmax(params["table"][(token + i) % V]))
            row.append(token)
            if token == eos:
                break
        rows.append(row + [pad] * (length - len(row)))
    return np.array(rows)


def test_greedy_tokens_are_those_of_a_plain_loop():
    params, first = table(), jnp.arange(V)
    expected = greedy(params, first, 30)
    assert len(np.unique(expected)) == V
    actual = generate(DECODER, params, first, max_new_tokens=30)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, expected)
    one = generate(DECODER, params, first, max_new_tokens=1)
    np.testing.assert_array_equal(one, expected[:, :1])


def test_rows_hold_padding_after_the_end_of_text():
    params, first = table(), jnp.arange(V)
    free = greedy(params, first, 20)
    eos = int(np.bincount(free[:, 3:8].ravel()).argmax())
    expected = greedy(params, first, 20, eos=eos, pad=-1)
    ends = (expected == eos).argmax(axis=1)
    assert (expected == eos).any(axis=1).sum() >= 2 and len(np.unique(ends)) > 2
    actual = generate(
        DECODER,
        params,
        first,
        max_new_tokens=20,
        eos_token_id=eos,
        pad_token_id=-1,
    )
    np.testing.assert_array_equal(actual, expected)


def test_it_stops_when_every_row_has_ended():
    calls = []

    def step(params, cache, tokens):
        jax.debug.callback(lambda: calls.append(1))
        return cache, jax.nn.one_hot(jnp.minimum(tokens + 1, 5), V)

    def start(params, first, room):
        assert room == 99  # the last token is not read
        return None, jax.nn.one_hot(first + 1, V)

    tokens = generate(
        Decoder(start, step), {}, jnp.array([0, 3]), max_new_tokens=100, eos_token_id=5
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens[:, :6], [[1, 2, 3, 4, 5, 5], [4, 5, *[5] * 4]])
    assert (tokens[:, 5:] == 5).all()
    assert len(calls) == 4


def test_equal_settings_are_compiled_once():
    traces = []

    def start(params, first, room):
        traces.append(room)
        return DECODER.start(params, first, room)

    decoder = Decoder(start, DECODER.step)
    for seed in range(3):
        generate(
            decoder,
            table(seed),
            jnp.arange(V),
            max_new_tokens=4,
            temperature=0.7,
            key=jax.random.key(seed),
        )
    assert traces == [3]


# Sampling.


def sample(key, first=None, params=None, **settings):
    settings = {"max_new_tokens": 12, "temperature": 1.0} | settings
    first = jnp.zeros(64, jnp.int32) if first is None else first
    params = table() if params is None else params
    key = jax.random.key(key)
    return np.asarray(generate(DECODER, params, first, key=key, **settings))


def test_draws_have_the_frequencies_of_the_softmax():
    """χ² with 6 degrees of freedom is below 22.5 with probability 0.999."""
    logits = table()["table"][0]
    for temperature in (1.0, 2.0, 4.0):
        first = jnp.zeros(20_000, jnp.int32)
        drawn = sample(0, first, max_new_tokens=1, temperature=temperature)
        expected = len(first) * np.asarray(jax.nn.softmax(logits / temperature))
        counts = np.bincount(drawn.ravel(), minlength=V)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert expected.min() > 1 and chi_squared < 22.5


def test_a_seed_gives_one_text_and_another_seed_another():
    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).mean() > 0.3


def test_rows_and_steps_draw_independently():
    """Under a uniform model two rows, or two steps, agree one time in V."""
    params = table() | {"table": jnp.zeros((V, V))}
    drawn = sample(3, jnp.zeros(300, jnp.int32), params)
    assert abs((drawn[:-1] == drawn[1:]).mean() - 1 / V) < 0.03
    assert abs((drawn[:, :-1] == drawn[:, 1:]).mean() - 1 / V) < 0.03


def test_a_row_does_not_depend_on_the_other_rows():
    first = jnp.arange(V)
    expected = sample(5, first)
    others = first.at[2:].set(V - 1 - first[2:])
    np.testing.assert_array_equal(sample(5, others)[:2], expected[:2])
    np.testing.assert_array_equal(sample(5, first[:2]), expected[:2])
    shorter = sample(5, first, max_new_tokens=5)
    np.testing.assert_array_equal(shorter, expected[:, :5])


def test_draws_stay_among_the_tokens_that_the_filters_keep():
    params = table() | {"table": jnp.tile(jnp.log(jnp.arange(1.0, V + 1)), (V, 1))}
    assert set(sample(0, params=params).ravel()) == set(range(V))
    assert set(sample(0, params=params, top_k=3).ravel()) == {4, 5, 6}
    # 7/28 and 6/28 fall short of a half, which 5/28 then crosses.
    assert set(sample(0, params=params, top_p=0.5).ravel()) == {4, 5, 6}
    # Of the three that top_k leaves, 7/18 and 6/18 reach it.
    both = sample(0, params=params, top_k=3, top_p=0.5)
    assert set(both.ravel()) == {5, 6}


def test_one_kept_token_is_greedy_decoding():
    first = jnp.arange(V)
    expected = generate(DECODER, table(), first, max_new_tokens=12)
    np.testing.assert_array_equal(sample(0, first, top_k=1), expected)
    np.testing.assert_array_equal(sample(0, first, top_p=1e-9), expected)
    np.testing.assert_array_equal(sample(0, first, temperature=1e-4), expected)
    assert (sample(0, first) != expected).mean() > 0.3


def test_no_cut_leaves_the_draws_as_they_are():
    np.testing.assert_array_equal(sample(0, top_k=100, top_p=1.0), sample(0))


# The filters.


def test_filters_with_ties_and_certain_tokens():
    inf = jnp.inf
    np.testing.assert_array_equal(
        keep_top_k(jnp.array([[2.0, 1.0, 2.0, 0.0], [0.0, 3.0, 1.0, 2.0]]), 1),
        [[2.0, -inf, 2.0, -inf], [-inf, 3.0, -inf, -inf]],
    )
    certain = jnp.array([0.0, 200.0, 1.0])
    np.testing.assert_array_equal(keep_top_p(certain, 0.9), [-inf, 200.0, -inf])
    assert np.isfinite(keep_top_p(jnp.zeros(4), 0.5)).sum() == 2
    once_cut = jnp.array([-inf, 1.0, 1.0])
    np.testing.assert_array_equal(keep_top_p(once_cut, 1.0), once_cut)


@pytest.mark.torch
def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch", reason="PyTorch, the oracle, is missing")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = normal(0, 40, 200, scale=3.0).astype(np.float32)

    def oracle(warper):
        return warper(None, torch.from_numpy(logits.copy())).numpy()

    counts = []
    for k in (1, 5, 199, 200, 1000):
        expected = oracle(TopKLogitsWarper(k))
        counts.append(np.isfinite(expected).sum(axis=-1))
        np.testing.assert_array_equal(keep_top_k(logits, k), expected)
    for p in (1e-6, 0.1, 0.5, 0.9, 0.99):
        expected = oracle(TopPLogitsWarper(p))
        counts.append(np.isfinite(expected).sum(axis=-1))
        np.testing.assert_array_equal(keep_top_p(logits, p), expected)
    assert len(np.unique(counts)) > 20


@pytest.mark.torch
def test_temperature_then_top_k_then_top_p_as_in_transformers():
    """The tokens that many draws reach are those that the three warpers leave."""
    torch = pytest.importorskip("torch", reason="PyTorch, the oracle, is missing")
    from transformers import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    params = table()
    scores = torch.from_numpy(np.array(params["table"][:1]))
    warpers = TemperatureLogitsWarper(2.0), TopKLogitsWarper(5), TopPLogitsWarper(0.8)
    for warper in warpers:
        scores = warper(None, scores)
    kept = np.flatnonzero(np.isfinite(scores.numpy()[0]))
    logits = params["table"][0]
    other_orders = [
        keep_top_k(keep_top_p(logits / 2.0, 0.8), 5),
        keep_top_p(keep_top_k(logits, 5), 0.8),
    ]
    assert [np.isfinite(other).sum() for other in other_orders] == [4, 1]
    assert len(kept) == 3
    first = jnp.zeros(2000, jnp.int32)
    settings = {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "max_new_tokens": 1}
    assert set(sample(0, first, params, **settings).ravel()) == set(kept)


# Errors.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 1.0}, "no key to draw tokens with; pass key="),
        ({"temperature": -1.0}, r"temperature is -1\.0; expected a finite number"),
        ({"temperature": float("nan")}, "temperature is nan; expected a finite"),
        ({"temperature": float("inf")}, "temperature is inf; expected a finite"),
        ({"top_k": 0}, "top_k is 0; expected 1 or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0; expected a number above 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1; expected a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    settings = {"max_new_tokens": 3} | settings
    with pytest.raises(ValueError, match=message):
        generate(DECODER, table(), jnp.arange(V), **settings)
