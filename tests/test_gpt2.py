"""GPT-2 against transformers' PyTorch models: logits, generation, derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from oracles import central_difference
from tiny_gpt2 import (
    CONFIG,
    EOS,
    PAD,
    PARAMS,
    V,
    random_params,
    random_tokens,
    tiny_config,
)

from jaxarith import hub, tangent
from jaxarith.models import gpt2
from jaxarith.models.generate import generate

close = {"rtol": 1e-5, "atol": 1e-5}


def loaded_by_transformers(folder, params, raw):
    import transformers

    hub.save(folder, params, raw, overwrite=True)
    kind = getattr(transformers, raw["architectures"][0])
    model, info = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return model.eval()


@pytest.fixture(scope="module")
def oracle(torch, tmp_path_factory):
    """transformers' language model with the parameters `PARAMS`."""
    folder = tmp_path_factory.mktemp("lm") / "model"
    return loaded_by_transformers(folder, PARAMS, tiny_config())


def oracle_inputs(torch, input_ids, mask):
    """With the positions that transformers' `generate` gives to padded texts."""
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)),
    }


# Parity.


@pytest.mark.torch
def test_logits_and_hidden_states_equal_those_of_transformers(torch, oracle):
    input_ids, mask = random_tokens()
    with torch.no_grad():
        output = oracle(
            **oracle_inputs(torch, input_ids, mask), output_hidden_states=True
        )
    logits, hidden = output.logits.numpy(), output.hidden_states[-1].numpy()
    assert_not_degenerate(np.asarray(logits)[mask == 1], 0.1)
    assert_not_degenerate(np.asarray(hidden)[mask == 1], 0.1)
    actual = jax.jit(gpt2.language_model(CONFIG))(PARAMS, input_ids, mask)
    np.testing.assert_allclose(actual[mask == 1], logits[mask == 1], **close)
    actual = jax.jit(gpt2.encoder(CONFIG))(PARAMS, input_ids, mask)
    np.testing.assert_allclose(actual[mask == 1], hidden[mask == 1], **close)


@pytest.mark.torch
def test_padding_after_a_text_needs_no_positions_in_transformers(torch, oracle):
    input_ids, mask = (array[:2] for array in random_tokens())
    inputs = oracle_inputs(torch, input_ids, mask)
    del inputs["position_ids"]
    with torch.no_grad():
        expected = oracle(**inputs).logits.numpy()
    model = jax.jit(gpt2.language_model(CONFIG))
    actual = model(PARAMS, input_ids, mask.astype(bool))
    np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], **close)


@pytest.mark.torch
def test_every_block_equals_that_of_transformers(torch, oracle):
    input_ids, mask = random_tokens()
    expected = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: expected.append(output))
        for block in oracle.transformer.h
    ]
    with torch.no_grad():
        oracle(**oracle_inputs(torch, input_ids, mask))
    for hook in hooks:
        hook.remove()
    inputs = gpt2._positions_and_mask(CONFIG, input_ids, mask)
    _, state = gpt2.Model(CONFIG).apply(
        {"params": PARAMS},
        input_ids,
        *inputs,
        capture_intermediates=True,
        mutable="intermediates",
    )
    blocks = state["intermediates"]["transformer"]["h"]
    assert len(expected) == len(blocks) - 1 == CONFIG.n_layer  # and the call of all
    for i, hidden in enumerate(expected):
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).numpy()
        assert_not_degenerate(np.asarray(hidden)[mask == 1], 0.1)
        [(actual, _)] = blocks[str(i)]["__call__"]
        np.testing.assert_allclose(actual[mask == 1], hidden[mask == 1], **close)


@pytest.mark.torch
def test_classifier_equals_that_of_transformers(torch, tmp_path):
    raw = tiny_config("GPT2ForSequenceClassification")
    params = random_params(classifier=True)
    model = loaded_by_transformers(tmp_path / "saved", params, raw)
    input_ids, mask = random_tokens()
    with torch.no_grad():
        expected = model(**oracle_inputs(torch, input_ids, mask)).logits.numpy()
    assert expected.shape == (4, 3) and expected.std(axis=0).min() > 0.1
    classify = jax.jit(gpt2.classifier(CONFIG))
    np.testing.assert_allclose(classify(params, input_ids, mask), expected, **close)

    model.save_pretrained(tmp_path / "theirs")
    loaded = gpt2.load(tmp_path / "theirs")
    assert loaded.config == CONFIG and loaded.config.num_labels == 3
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.torch
def test_a_text_that_ends_with_the_padding_token_is_read_to_its_end(torch, tmp_path):
    """The one case in which transformers' classifier reads another token."""
    raw = tiny_config("GPT2ForSequenceClassification") | {"pad_token_id": EOS}
    params = random_params(classifier=True)
    model = loaded_by_transformers(tmp_path, params, raw)
    input_ids, mask = random_tokens()
    input_ids[0, -1] = EOS
    with torch.no_grad():
        theirs = model(**oracle_inputs(torch, input_ids, mask)).logits.numpy()[0]
    classify = jax.jit(gpt2.classifier(CONFIG))
    actual = classify(params, input_ids, mask)[0]
    cut = mask.copy()
    cut[0, -1] = 0
    before = classify(params, input_ids, cut)[0]
    np.testing.assert_allclose(theirs, before, **close)
    assert np.abs(actual - before).max() > 0.1


# Attention and padding.


def test_no_token_reaches_an_earlier_one():
    """And every one reaches itself and all later ones."""
    input_ids, mask = np.arange(12)[None], np.ones((1, 12), int)
    model = jax.jit(gpt2.encoder(CONFIG))

    def feature(words, at):
        transformer = {**PARAMS["transformer"], "wte": {"embedding": words}}
        return model({"transformer": transformer}, input_ids, mask)[0, at].sum()

    gradient_of = jax.jit(jax.grad(feature))
    for at in (0, 5, 11):
        gradient = gradient_of(PARAMS["transformer"]["wte"]["embedding"], at)
        reached = np.abs(gradient).max(axis=1)
        assert (reached[: at + 1] > 1e-4).all()
        assert (reached[at + 1 :] == 0).all()


def test_padding_changes_nothing_wherever_it_is():
    model = jax.jit(gpt2.language_model(CONFIG))
    input_ids, mask = random_tokens()
    logits = model(PARAMS, input_ids, mask)
    others = np.where(mask, input_ids, 7)
    changed = model(PARAMS, others, mask)
    np.testing.assert_array_equal(changed[mask == 1], logits[mask == 1])
    assert np.abs(changed - logits)[mask == 0].max() > 0.1
    # Every text moved to the beginning of its row.
    order = np.argsort(1 - mask, axis=1, kind="stable")
    moved = [np.take_along_axis(array, order, axis=1) for array in (input_ids, mask)]
    assert (moved[1] != mask).any(axis=1).tolist() == [False, False, True, True]
    expected = model(PARAMS, *moved)
    np.testing.assert_allclose(logits[mask == 1], expected[moved[1] == 1], **close)


def test_a_text_of_padding_alone_is_finite():
    input_ids, mask = np.full((2, 5), PAD), np.zeros((2, 5), int)
    mask[1] = 1
    params = random_params(classifier=True)
    for model in (gpt2.language_model, gpt2.classifier):
        assert np.isfinite(jax.jit(model(CONFIG))(params, input_ids, mask)).all()


# Generation.


def left_padded_prompts():
    rng = np.random.default_rng(3)
    input_ids = rng.integers(0, EOS, size=(5, 9))
    mask = np.ones_like(input_ids)
    for row, pads in enumerate((0, 3, 8, 1, 6)):
        mask[row, :pads] = 0
    return np.where(mask, input_ids, PAD), mask


def oracle_generation(torch, model, input_ids, mask, eos):
    with torch.no_grad():
        tokens = model.generate(
            torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=PAD,
        )
    tokens = tokens.numpy()[:, input_ids.shape[1] :]
    return np.pad(tokens, [(0, 0), (0, 20 - tokens.shape[1])], constant_values=PAD)


@pytest.mark.torch
def test_twenty_greedy_tokens_equal_those_of_transformers(torch, oracle):
    prompt = left_padded_prompts()
    oracle.generation_config.eos_token_id = None
    free = oracle_generation(torch, oracle, *prompt, None)
    assert free.shape == (5, 20) and len(np.unique(free)) > 15
    assert all(len(np.unique(row)) > 8 for row in free)
    write = functools.partial(generate, gpt2.decoder(CONFIG), PARAMS)
    actual = write(*prompt, max_new_tokens=20, pad_token_id=PAD)
    np.testing.assert_array_equal(actual, free)

    # The token that ends some rows early, at different steps, and others never.
    first = np.stack([(free == token).argmax(axis=1) for token in range(V)])
    ends = [(free == token).any(axis=1).sum() for token in range(V)]
    eos = max(
        (token for token in range(V) if 1 < ends[token] < 5),
        key=lambda token: len(np.unique(first[token])),
    )
    ended = oracle_generation(torch, oracle, *prompt, eos)
    assert (ended == PAD).any() and (ended != free).any(axis=1).sum() > 1
    assert (ended[:, -1] != PAD).any()
    settings = {"eos_token_id": eos, "pad_token_id": PAD}
    actual = write(*prompt, max_new_tokens=20, **settings)
    np.testing.assert_array_equal(actual, ended)


def test_generation_is_the_same_wherever_the_prompt_is_padded():
    input_ids, mask = left_padded_prompts()
    order = np.argsort(1 - mask, axis=1, kind="stable")
    right = (np.take_along_axis(array, order, axis=1) for array in (input_ids, mask))
    write = functools.partial(generate, gpt2.decoder(CONFIG), PARAMS, max_new_tokens=20)
    expected = write(input_ids, mask)
    assert len(np.unique(expected)) > 15
    np.testing.assert_array_equal(write(*right), expected)


def test_logits_of_cached_steps_equal_those_of_the_whole_text():
    model = jax.jit(gpt2.language_model(CONFIG))
    decoder = gpt2.decoder(CONFIG)
    start = jax.jit(decoder.start, static_argnames="room")
    step = jax.jit(decoder.step)
    input_ids, mask = left_padded_prompts()
    new = np.random.default_rng(4).integers(0, V, size=(5, 6))
    cache, logits = start(PARAMS, input_ids, mask, room=6)
    shapes = jax.tree.map(jnp.shape, cache)
    whole = np.concatenate([input_ids, new], axis=1)
    expected = model(PARAMS, whole, np.pad(mask, [(0, 0), (0, 6)], constant_values=1))
    assert np.std(expected, axis=0).mean() > 0.1
    np.testing.assert_allclose(logits, expected[:, 8], **close)
    for i in range(6):
        cache, logits = step(PARAMS, cache, new[:, i])
        np.testing.assert_allclose(logits, expected[:, 9 + i], **close)
    assert jax.tree.map(jnp.shape, cache) == shapes


def test_equal_configurations_have_one_decoder():
    assert gpt2.decoder(CONFIG) is gpt2.decoder(
        gpt2.GPT2Config.from_json(tiny_config())
    )


# Derivatives.


def test_jvp_is_the_central_difference_through_the_tied_head(x64):
    """Of the language model; every leaf moves, the embedding in both of its places."""
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(np.float64))
    params, tau = cast(PARAMS), cast(random_params(1, scale=0.1))
    input_ids, mask = (array[1:] for array in random_tokens(8))
    apply_fn = gpt2.language_model(CONFIG)
    model = jax.jit(lambda params: apply_fn(params, input_ids, mask))
    outputs, tangents = jax.jit(functools.partial(tangent.jvp, apply_fn))(
        params, tau, input_ids, mask
    )
    assert outputs.dtype == np.float64
    assert_not_degenerate(np.asarray(tangents)[mask == 1], 0.1)
    np.testing.assert_allclose(outputs, model(params), rtol=1e-10, atol=1e-10)
    expected = central_difference(model, params, tau, h=1e-4)
    np.testing.assert_allclose(tangents, expected, rtol=1e-6, atol=1e-6)


# Models and inputs.


@pytest.mark.torch
def test_models_of_transformers_load_with_equal_bits(oracle, tmp_path):
    """Whole, and without the head, whose names lack `transformer.`."""
    oracle.save_pretrained(tmp_path / "lm")
    oracle.transformer.save_pretrained(tmp_path / "base")
    assert "h/0/attn/c_attn/weight" in hub.names(tmp_path / "base")
    for folder in (tmp_path / "lm", tmp_path / "base"):
        loaded = gpt2.load(folder)
        assert loaded.config == CONFIG and loaded.folder == folder
        jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


def test_texts_that_are_too_long_and_masks_of_another_shape_are_refused():
    params = random_params(classifier=True)
    models = [gpt2.encoder, gpt2.language_model, gpt2.classifier]
    long = np.zeros((1, 41), int)
    for model in models:
        with pytest.raises(ValueError, match="41 tokens long; .* n_positions 40"):
            model(CONFIG)(params, long, long)
        for shape in ((1, 5), (2, 1), (2,)):
            match = r"input_ids of shape \[2, 5\]; expected the same shape"
            with pytest.raises(ValueError, match=match):
                model(CONFIG)(params, np.zeros((2, 5), int), np.ones(shape))
    prompt = np.zeros((1, 21), int), np.ones((1, 21), int)
    write = functools.partial(generate, gpt2.decoder(CONFIG), params, *prompt)
    assert write(max_new_tokens=20).shape == (1, 20)
    with pytest.raises(ValueError, match="new tokens are 41 tokens long; .* 40"):
        write(max_new_tokens=21)
