"""The whole T5 against transformers' PyTorch model and T5 written out in float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from oracles import central_difference
from tiny_t5 import (
    START,
    VARIANTS,
    plain_t5,
    random_params,
    random_tokens,
    tiny_t5,
    tiny_t5_config,
)

from jaxarith import hub, tangent, tree
from jaxarith.hub import layouts
from jaxarith.merge import capture
from jaxarith.models import t5
from jaxarith.models.generate import generate

close = {"rtol": 1e-5, "atol": 1e-5}


def opened(torch, folder):
    """transformers' model of a folder that fits it name by name."""
    from transformers import T5ForConditionalGeneration

    model, info = T5ForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def oracle(torch, request, tmp_path_factory):
    """A config, its random parameters, and transformers' model with the same."""
    raw = tiny_t5_config(**VARIANTS[request.param])
    config = t5.T5Config.from_json(raw)
    params = random_params(0, config)
    folder = tmp_path_factory.mktemp(request.param)
    hub.save(folder, params, raw, overwrite=True)
    model = opened(torch, folder)
    head = model.lm_head.weight is model.shared.weight
    assert head == config.tie_word_embeddings == (request.param != "v1.1")
    assert model.config.scale_decoder_outputs == config.scale_decoder_outputs
    assert config.scale_decoder_outputs == (request.param == "v1.0")
    return config, params, model


def random_targets(length=30):
    """Start tokens and what follows; padded nowhere, behind, in front, nowhere."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 30, size=(4, length))
    ids[:, 0] = START
    mask = np.ones_like(ids)
    mask[1, 2 * length // 3 :] = 0
    mask[2, : length // 4] = 0
    return ids, mask


def oracle_output(torch, model, input_ids, mask, decoder_ids, decoder_mask=None):
    def tensor(array):
        return None if array is None else torch.from_numpy(array)

    with torch.no_grad():
        return model(
            input_ids=tensor(input_ids),
            attention_mask=tensor(mask),
            decoder_input_ids=tensor(decoder_ids),
            decoder_attention_mask=tensor(decoder_mask),
            output_hidden_states=True,
            use_cache=False,
        )


# Logits and hidden states.


@pytest.mark.torch
def test_logits_and_hidden_states_equal_those_of_transformers(torch, oracle):
    config, params, model = oracle
    texts, (ids, decoder_mask) = random_tokens(), random_targets()
    apply_fn = jax.jit(t5.language_model(config))
    hidden_states = jax.jit(t5.hidden_states(config))
    outputs = []
    for targets in ((ids, np.ones_like(ids)), (ids, decoder_mask)):
        expected = oracle_output(torch, model, *texts, *targets)
        logits = apply_fn(params, *texts, *targets)
        np.testing.assert_allclose(logits, expected.logits.numpy(), **close)
        hidden = hidden_states(params, *texts, *targets)
        last = expected.decoder_hidden_states[-1].numpy()
        np.testing.assert_allclose(hidden, last, **close)
        assert_not_degenerate(last)
        outputs.append(np.asarray(logits))
    unmasked, masked = outputs
    assert_not_degenerate(masked)
    assert np.abs(masked - unmasked)[2, 8:].max() > 0.05
    texts = texts[0], np.ones_like(texts[1])
    unpadded = apply_fn(params, *texts, ids, np.ones_like(ids))
    assert (np.abs(unpadded - unmasked)[1:].max(axis=(1, 2)) > 0.05).all()


@pytest.mark.torch
def test_every_block_of_the_decoder_equals_that_of_transformers(torch, oracle):
    config, params, model = oracle
    texts, targets = random_tokens(), random_targets()
    expected = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: expected.append(output[0]))
        for block in model.decoder.block
    ]
    oracle_output(torch, model, *texts, *targets)
    for hook in hooks:
        hook.remove()

    @jax.jit
    def intermediates(params):
        return t5.Transformer(config).apply(
            {"params": params},
            *texts,
            *targets,
            capture_intermediates=True,
            mutable="intermediates",
        )

    _, state = intermediates(params)
    blocks = state["intermediates"]["decoder"]["block"]
    assert len(expected) == len(blocks) - 1 == config.num_decoder_layers == 2
    for i, hidden in enumerate(expected):
        assert_not_degenerate(hidden.numpy())
        [(actual, _, _)] = blocks[str(i)]["__call__"]
        np.testing.assert_allclose(actual, hidden.numpy(), **close)


def test_sequences_of_one_text_give_what_each_gives_alone():
    config = tiny_t5("gated-gelu", num_layers=1)
    params = random_params(0, config)
    texts = random_tokens()
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 30, size=(4, 3, 7))
    mask = np.ones_like(ids)
    mask[:, 1, 5:] = mask[:, 2, 2:] = 0
    apply_fn = jax.jit(t5.language_model(config))
    together = apply_fn(params, *texts, ids, mask)
    assert together.shape == (4, 3, 7, 30)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.1
    for c in range(3):
        alone = apply_fn(params, *texts, ids[:, c], mask[:, c])
        np.testing.assert_allclose(together[:, c], alone, **close)


def test_no_token_of_the_decoder_reaches_one_before_it():
    """By the gradient of words that occur once, in the order of the text."""
    config = tiny_t5()
    params = random_params(0, config)
    input_ids = np.arange(16, 30)[None]
    mask = (np.arange(14) < 10).astype(np.int32)[None]
    decoder_ids = np.arange(2, 14)[None]
    hidden_states = t5.hidden_states(config)

    def feature(words, at):
        shared = {**params, "shared": {"embedding": words}}
        return hidden_states(shared, input_ids, mask, decoder_ids)[0, at].sum()

    gradient_of = jax.jit(jax.grad(feature))
    for at in (0, 5, 11):
        gradient = gradient_of(params["shared"]["embedding"], at)
        reached = np.asarray(jnp.abs(gradient).max(axis=-1))
        assert (reached[2 : 3 + at] > 1e-6).all()
        assert (reached[3 + at : 16] == 0).all()
        assert (reached[16:26] > 1e-6).all()  # all of the text, but for its padding
        assert (reached[26:] == 0).all() and (reached[:2] == 0).all()


@pytest.mark.torch
def test_labels_shifted_to_the_right_are_those_of_transformers(torch, oracle):
    config, _, model = oracle
    labels = np.array([[7, 8, 1, -100, -100], [9, 3, 4, 5, 1]])
    expected = model._shift_right(torch.from_numpy(labels)).numpy()
    np.testing.assert_array_equal(t5.shift_right(labels, config), expected)
    np.testing.assert_array_equal(t5.shift_right(labels[None], config)[0], expected)
    assert (expected[:, 0] == START).all()


# Generation.


def livelier(params):
    """Greater weights, with which tokens are not followed by themselves for ever."""

    def leaf(path, values):
        return 2 * values if re.fullmatch(t5.BLOCK_LINEAR_WEIGHTS, path) else values

    return tree.map_with_path(leaf, params)


@pytest.mark.torch
def test_greedy_tokens_equal_those_of_transformers(torch, oracle, tmp_path):
    """Twenty of them. Rows end at different lengths, and one does not end."""
    config, params, _ = oracle
    params = livelier(params)
    raw = {**tiny_t5_config(), **dataclasses.asdict(config)}
    hub.save(tmp_path, params, raw, overwrite=True)
    model = opened(torch, tmp_path)
    rng = np.random.default_rng(5)
    input_ids = rng.integers(2, 30, size=(8, 12))
    mask = np.ones_like(input_ids)
    mask[::2, 7:] = 0
    settings = {"max_new_tokens": 20, "do_sample": False, "num_beams": 1}
    text = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
    }
    decoder = t5.decoder(config)
    free = model.generate(**text, **settings, eos_token_id=None).numpy()[:, 1:]
    assert free.shape == (8, 20)

    # The end is a token that most, but not all, rows write.
    writes = (free[..., None] == np.arange(30)).any(axis=1)
    eos = int(np.argmax(writes.sum(axis=0) % 8))
    assert len(np.unique(free)) > 8 and 0 < writes[:, eos].sum() < 8
    expected = model.generate(**text, **settings, eos_token_id=eos).numpy()[:, 1:]
    ends = {"eos_token_id": eos, "pad_token_id": config.pad_token_id}
    actual = generate(decoder, params, input_ids, mask, max_new_tokens=20, **ends)
    np.testing.assert_array_equal(actual, expected)
    assert (expected != free).any()


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_steps_with_a_cache_equal_the_full_forward(variant):
    config = tiny_t5(**{**VARIANTS[variant], "num_layers": 1})
    params = random_params(0, config)
    texts, (ids, _) = random_tokens(), random_targets()
    expected = jax.jit(t5.language_model(config))(params, *texts, ids)
    start, step = t5.decoder(config)
    room = ids.shape[1] - 1
    start = jax.jit(start, static_argnames="room")
    cache, logits = start(params, *texts, room=room)
    step = jax.jit(step)
    steps = [logits]
    for tokens in ids.T[1:]:
        shapes = jax.tree.map(jnp.shape, cache)
        cache, logits = step(params, cache, tokens)
        assert shapes == jax.tree.map(jnp.shape, cache)
        steps.append(logits)
    assert step._cache_size() == 1
    assert_not_degenerate(expected)
    np.testing.assert_allclose(jnp.stack(steps, axis=1), expected, **close)


# Derivatives, in float64.


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def short_inputs():
    """Without the text that is all padding, where the plain softmax is 0/0."""
    input_ids, mask = random_tokens(12)
    return input_ids[:3], mask[:3], random_targets(9)[0][:3]


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_logits_and_jvp_are_the_plain_t5_and_its_central_difference(x64, variant):
    config = tiny_t5(**{**VARIANTS[variant], "num_layers": 1})
    params = cast(random_params(0, config), np.float64)
    tau = cast(random_params(1, config, scale=0.1), np.float64)
    inputs = short_inputs()
    plain = jax.jit(lambda params: plain_t5(config, params, *inputs))
    jvp = jax.jit(functools.partial(tangent.jvp, t5.language_model(config)))
    logits, tangents = jvp(params, tau, *inputs)
    assert logits.dtype == np.float64
    assert_not_degenerate(logits)
    assert_not_degenerate(tangents)
    np.testing.assert_allclose(logits, plain(params), rtol=1e-10, atol=1e-10)
    expected = central_difference(plain, params, tau, h=1e-5)
    np.testing.assert_allclose(tangents, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_linearized_model_is_that_of_the_plain_one(x64):
    config = tiny_t5(num_layers=1, num_decoder_layers=2)
    inputs = short_inputs()
    params_0, params = (cast(random_params(s, config), np.float64) for s in (0, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(apply_fn, params_0, params):
        f_lin = tangent.linearize(apply_fn, params_0)
        return jax.grad(lambda p: jnp.mean(f_lin(p, *inputs) ** 2))(params)

    plain = functools.partial(plain_t5, config)
    expected = tree.flatten(gradient(plain, params_0, params))
    actual = tree.flatten(gradient(t5.language_model(config), params_0, params))
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        size = np.abs(leaf).max()
        assert size > 1e-5, path
        assert actual[path].dtype == np.float64
        np.testing.assert_allclose(
            actual[path], leaf, rtol=0, atol=1e-10 * size, err_msg=path
        )


def test_inputs_of_every_linear_layer_are_captured():
    config = tiny_t5("gated-gelu", num_layers=1, tie_word_embeddings=False)
    params = random_params(0, config)
    apply_fn = t5.language_model(config)
    inputs = short_inputs()
    seen = jax.eval_shape(lambda p: capture.dense_inputs(apply_fn, p, *inputs), params)
    kernels = {path for path in tree.flatten(params) if path.endswith("/kernel")}
    assert seen.keys() == kernels
    assert {len(calls) for calls in seen.values()} == {1}


# Models of transformers.


@pytest.mark.torch
def test_a_model_that_transformers_saves_again_loads_with_equal_bits(oracle, tmp_path):
    """Its config.json says that the head is tied, whether it is or not."""
    config, params, model = oracle
    model.save_pretrained(tmp_path)
    assert hub.read_json(tmp_path)["tie_word_embeddings"] is True
    loaded = t5.load(tmp_path)
    assert (loaded.config, loaded.folder) == (config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.torch
def test_what_was_loaded_and_saved_loads_in_transformers(torch, oracle, tmp_path):
    _, _, model = oracle
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    edited = jax.tree.map(lambda leaf: 0.9 * leaf, t5.load(first).params)
    hub.save(second, edited, hub.read_json(first), copy_from=first)
    again = opened(torch, second)
    saved = layouts.to_torch(tree.flatten(edited))
    tensors = {name: tensor.numpy() for name, tensor in again.state_dict().items()}
    for name, array in saved.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    # The others are the tied ones.
    assert {name.rpartition(".")[0] for name in tensors.keys() - saved.keys()} <= {
        "encoder.embed_tokens",
        "decoder.embed_tokens",
        "lm_head",
    }


@pytest.mark.parametrize(
    "decoder_shape, mask_shape, message",
    [
        ((3, 4), None, r"shape \[3, 4\] for 2 texts; expected \[2, T\]"),
        ((2,), None, r"shape \[2\] for 2 texts"),
        ((2, 4), (2, 1), r"decoder_attention_mask of shape \[2, 1\]"),
        ((2, 3, 4), (2, 4), r"decoder_attention_mask of shape \[2, 4\]"),
    ],
)
def test_targets_of_unlike_shapes_are_refused(decoder_shape, mask_shape, message):
    config = tiny_t5()
    params = random_params(0, config)
    tokens = jnp.ones((2, 5), int)
    targets = [jnp.ones(s, int) for s in (decoder_shape, mask_shape) if s is not None]
    with pytest.raises(ValueError, match=message):
        t5.language_model(config)(params, tokens, tokens, *targets)
