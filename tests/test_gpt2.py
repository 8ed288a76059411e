"""The GPT-2 port against transformers' PyTorch models."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from flax import serialization
from oracles import central_difference
from safetensors.numpy import load_file, save_file

from jaxarith import hub, tangent, tree
from jaxarith.models import gpt2
from jaxarith.models.generate import generate

close = {"rtol": 1e-5, "atol": 1e-5}
V, PAD, EOS = 61, 60, 59


def tiny_config(architecture="GPT2LMHeadModel") -> dict:
    """The `config.json` of a GPT-2 whose inner width is not four times its width."""
    return {
        "architectures": [architecture],
        "model_type": "gpt2",
        "vocab_size": V,
        "n_positions": 40,
        "n_embd": 18,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 30,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }


CONFIG = gpt2.GPT2Config.from_json(tiny_config())


def random_params(seed=2, classifier=False, config=CONFIG, scale=0.3):
    """Weights of which none is zero or one; the scales of the norms are near one.

    Positions matter much and biases little, so greedy decoding does not repeat itself.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        factor = 3.0 if "/wpe/" in path else 0.3 if path.endswith("/bias") else 1.0
        noise = factor * scale * rng.normal(size=expected.shape)
        return np.asarray(noise + path.endswith("/scale"), np.float32)

    layout = gpt2.layout(config, classifier=classifier)
    return tree.map_with_path(leaf, layout)


PARAMS = random_params()


def random_tokens(length=24):
    """Texts padded nowhere, after, before and on both sides."""
    rng = np.random.default_rng(1)
    input_ids = rng.integers(0, EOS, size=(4, length))
    mask = np.ones_like(input_ids)
    mask[1, length // 2 :] = 0
    mask[2, : length // 3] = 0
    mask[3, :3] = mask[3, -5:] = 0
    return np.where(mask, input_ids, PAD), mask


def loaded_by_transformers(folder, params, raw):
    import transformers

    hub.save(folder, params, raw)
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


# Names, files and configurations.


@pytest.mark.parametrize(
    "name, sizes, count",
    [
        ("gpt2", {}, 124_439_808),
        ("medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
        ("large", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, sizes, count):
    config = gpt2.GPT2Config.from_json({"model_type": "gpt2", **sizes})
    leaves = tree.flatten(gpt2.layout(config))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == count
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_layout_of_the_smallest_gpt2_is_that_of_transformers():
    file = Path(__file__).parent / "layouts" / "gpt2.json"
    expected = json.loads(file.read_text())
    actual = tree.flatten(gpt2.layout(gpt2.GPT2Config()))
    assert {path: list(leaf.shape) for path, leaf in actual.items()} == expected


def test_layout_of_a_classifier_is_that_of_the_language_model_and_a_score():
    plain = tree.flatten(gpt2.layout(CONFIG))
    whole = tree.flatten(gpt2.layout(CONFIG, classifier=True))
    assert whole.keys() - plain.keys() == {"score/kernel"}
    assert whole["score/kernel"].shape == (CONFIG.n_embd, 3)
    # Each reads its own leaves of a tree that may hold more.
    params = random_params(classifier=True)
    tokens = random_tokens()
    logits = gpt2.language_model(CONFIG)(params, *tokens)
    expected = gpt2.language_model(CONFIG)(
        {"transformer": params["transformer"]}, *tokens
    )
    np.testing.assert_array_equal(logits, expected)


def test_patterns_name_the_blocks_and_their_weights():
    layout = gpt2.layout(CONFIG, classifier=True)
    outside = (
        tree.flatten(layout).keys()
        - tree.flatten(tree.select(layout, gpt2.BLOCKS)).keys()
    )
    assert outside == {
        "transformer/wte/embedding",
        "transformer/wpe/embedding",
        "transformer/ln_f/scale",
        "transformer/ln_f/bias",
        "score/kernel",
    }
    weights = tree.flatten(tree.select(layout, gpt2.BLOCK_LINEAR_WEIGHTS))
    assert len(weights) == 4 * CONFIG.n_layer
    assert all(len(leaf.shape) == 2 for leaf in weights.values())


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


def saved(folder, *, prefix, extra):
    """PARAMS in a safetensors file with or without a prefix, and more tensors."""
    hub.save(folder, PARAMS, tiny_config())
    tensors = load_file(folder / "model.safetensors")
    if not prefix:
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    front = "transformer." if prefix else ""
    tensors |= {front * ("." in k and k[0] == "h") + k: v for k, v in extra.items()}
    save_file(tensors, folder / "model.safetensors")


WTE = PARAMS["transformer"]["wte"]["embedding"]


@pytest.mark.parametrize("prefix", [True, False])
def test_buffers_and_the_copy_of_the_embedding_are_left_out(prefix, tmp_path):
    extra = {f"h.{i}.attn.bias": np.ones((1, 1, 40, 40), "f4") for i in range(2)}
    extra |= {f"h.{i}.attn.masked_bias": np.array(-1e4, "f4") for i in range(2)}
    extra["lm_head.weight"] = WTE
    saved(tmp_path, prefix=prefix, extra=extra)
    assert len(hub.names(tmp_path)) == len(tree.flatten(PARAMS)) + 5
    loaded = gpt2.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_head_of_its_own_and_unknown_tensors_are_refused(prefix, tmp_path):
    saved(tmp_path, prefix=prefix, extra={"lm_head.weight": WTE + 1})
    with pytest.raises(ValueError, match="lm_head"):
        gpt2.load(tmp_path)
    saved(tmp_path, prefix=prefix, extra={"h.0.attn.rotary": np.ones(3, "f4")})
    with pytest.raises(ValueError, match="attn/rotary"):
        gpt2.load(tmp_path)
    saved(tmp_path, prefix=prefix, extra={"score.weight": np.ones((3, 18), "f4")})
    with pytest.raises(ValueError, match="score"):
        gpt2.load(tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_flax_files_load_with_equal_bits(prefix, tmp_path):
    held = PARAMS if prefix else PARAMS["transformer"]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(held))
    loaded = gpt2.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


@pytest.mark.torch
def test_random_parameters_have_the_spread_of_those_of_transformers(torch, tmp_path):
    import transformers

    raw = tiny_config("GPT2ForSequenceClassification")
    raw |= {"n_embd": 96, "n_inner": None, "n_layer": 2, "n_positions": 200}
    raw |= {"id2label": {str(i): str(i) for i in range(40)}}
    torch.manual_seed(0)
    raw = {**raw, "label2id": {str(i): i for i in range(40)}}
    config = transformers.GPT2Config(**raw)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = gpt2.load(tmp_path)
    expected = tree.flatten(loaded.params)
    init = jax.jit(functools.partial(gpt2.init, classifier=True), static_argnums=1)
    actual = tree.flatten(init(jax.random.key(0), loaded.config))
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        if leaf.std() == 0:
            np.testing.assert_array_equal(actual[path], leaf)
        else:
            assert leaf.std() > 0.005
            np.testing.assert_allclose(actual[path].std(), leaf.std(), rtol=0.07)


def test_default_config_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    raw = transformers.GPT2Config().to_dict()
    assert gpt2.GPT2Config.from_json(raw) == gpt2.GPT2Config()
    assert gpt2.GPT2Config.from_json({"model_type": "gpt2"}) == gpt2.GPT2Config()
    # What a file says in place of the number of labels, and what it says of it.
    for stated in ({"id2label": {"0": "x"}}, {"num_labels": 1}):
        config = gpt2.GPT2Config.from_json({"model_type": "gpt2", **stated})
        assert config.num_labels == 1


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "bert"])
def test_config_of_another_model_is_an_error_that_names_it(kind, tmp_path):
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a GPT-2"):
        gpt2.GPT2Config.from_json({**tiny_config(), "model_type": kind})
    with pytest.raises(ValueError, match="describes a 'model'; expected a GPT-2"):
        gpt2.GPT2Config.from_json({"n_embd": 512})
    hub.save(tmp_path, PARAMS, {**tiny_config(), "model_type": kind})
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a GPT-2"):
        gpt2.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
    ],
)
def test_variants_that_the_port_lacks_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name} {value!r}; this port of GPT-2 has"):
        gpt2.GPT2Config.from_json(tiny_config() | change)


def test_heads_that_cannot_share_the_width_are_refused():
    with pytest.raises(ValueError, match="n_embd 18 and n_head 4; expected a width"):
        gpt2.GPT2Config.from_json(tiny_config() | {"n_head": 4})


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
