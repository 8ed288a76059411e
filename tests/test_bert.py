"""BERT and RoBERTa against transformers' PyTorch models and an encoder written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from oracles import central_difference, normal
from tiny import random_params
from tiny_bert import HEADS, KINDS, layout, tiny, tiny_config, tiny_params

from jaxarith import hub, tangent, tree
from jaxarith.merge import capture
from jaxarith.models import bert

MASK = 4  # the mask token of the tiny vocabulary
FIRST = 5  # of its words
APPLY = {None: bert.encoder, "masked_lm": bert.masked_lm, "classifier": bert.classifier}
close = {"rtol": 1e-5, "atol": 1e-5}


def random_texts(config, length=12):
    """Token ids, mask and types; padded nowhere, after, before, wholly.

    One text has a padding token among its words, and each a mask token; one has two.
    """
    rng = np.random.default_rng(1)
    input_ids = rng.integers(FIRST, 30, size=(5, length))
    mask = np.ones_like(input_ids)
    mask[1, 8:] = 0
    mask[2, :4] = 0
    mask[3] = 0
    input_ids[0, 3] = input_ids[1, 2] = input_ids[2, 9] = MASK
    input_ids[4, [6, 7]] = MASK
    input_ids[mask == 0] = config.pad_token_id
    input_ids[4, 2] = config.pad_token_id
    types = rng.integers(config.type_vocab_size, size=input_ids.shape)
    return input_ids, mask, types


@pytest.fixture(scope="module", params=[(k, h) for k in KINDS for h in HEADS])
def oracle(torch, request, tmp_path_factory):
    """Kind, head, random parameters, and transformers' model with the same.

    It loads what `hub.save` writes, with nothing missing and nothing unexpected.
    """
    import transformers

    kind, head = request.param
    raw = tiny_config(kind, head)
    params = tiny_params(kind, head, pooler=head is None)
    folder = tmp_path_factory.mktemp(f"{kind}-{head}")
    hub.save(folder, params, raw, overwrite=True)
    model, info = getattr(transformers, raw["architectures"][0]).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return kind, head, params, model.eval()


def oracle_outputs(torch, model, input_ids, mask, types):
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            token_type_ids=None if types is None else torch.from_numpy(types),
        )
    return output[0].numpy()


# Outputs.


@pytest.mark.torch
def test_outputs_equal_those_of_transformers(torch, oracle):
    kind, head, params, model = oracle
    config = tiny(kind, head)
    input_ids, mask, types = random_texts(config)
    expected = oracle_outputs(torch, model, input_ids, mask, types)
    assert_not_degenerate(expected)
    actual = APPLY[head](config)(params, input_ids, mask, types)
    np.testing.assert_allclose(actual, expected, **close)

    untyped = oracle_outputs(torch, model, input_ids, mask, None)
    actual = APPLY[head](config)(params, input_ids, mask.astype(bool))
    np.testing.assert_allclose(actual, untyped, **close)
    assert kind == "roberta" or np.abs(untyped - expected).max() > 0.1
    unmasked = oracle_outputs(torch, model, input_ids, np.ones_like(mask), types)
    assert np.abs(unmasked - expected)[1:3].max() > 0.1


@pytest.mark.torch
@pytest.mark.parametrize("oracle", [("bert", None), ("roberta", None)], indirect=True)
def test_every_block_equals_that_of_transformers(torch, oracle):
    kind, head, params, model = oracle
    config = tiny(kind)
    texts = random_texts(config)
    expected = []
    for block in model.encoder.layer:
        block.register_forward_hook(lambda _, __, output: expected.append(output))
    oracle_outputs(torch, model, *texts)
    expected = [x[0] if isinstance(x, tuple) else x for x in expected]

    _, state = bert.Model(config).apply(
        {"params": params}, *texts, capture_intermediates=True, mutable="intermediates"
    )
    blocks = state["intermediates"][kind]["encoder"]["layer"]
    assert len(expected) == len(blocks) - 1 == config.num_hidden_layers
    for i, hidden in enumerate(expected):
        assert_not_degenerate(hidden.numpy())
        [actual] = blocks[str(i)]["__call__"]
        np.testing.assert_allclose(actual, hidden.numpy(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_encoder_gives_the_logits_at_the_first_mask_token(kind):
    config = tiny(kind, "masked_lm")
    params = tiny_params(kind, "masked_lm")
    texts = random_texts(config)
    features = bert.mask_encoder(config, MASK)(params, *texts)
    assert features.shape == (5, 24)
    leaves = tree.flatten(params)
    words = leaves[f"{kind}/embeddings/word_embeddings/embedding"]
    bias = leaves["cls/predictions/bias" if kind == "bert" else "lm_head/bias"]
    logits = bert.masked_lm(config)(params, *texts)
    assert_not_degenerate(logits)
    at = [3, 2, 9, 0, 6]  # without a mask token the first one
    np.testing.assert_allclose(
        features @ words.T + bias[None], logits[np.arange(5), at], **close
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mean_encoder_averages_the_hidden_states_of_real_tokens(kind):
    config = tiny(kind)
    params = tiny_params(kind)
    input_ids, mask, types = random_texts(config)
    hidden = np.asarray(bert.encoder(config)(params, input_ids, mask, types))
    means = bert.mean_encoder(config)(params, input_ids, mask, types)
    rows = zip(hidden, mask, strict=True)
    expected = [row[real == 1].mean(axis=0) for row, real in rows if real.any()]
    np.testing.assert_allclose(np.delete(means, 3, axis=0), expected, **close)
    assert (means[3] == 0).all()  # a text that is all padding


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_at_real_tokens(kind):
    """Behind a text; and for RoBERTa, which counts its tokens, before it as well."""
    config = tiny(kind)
    params = tiny_params(kind)
    encode = bert.encoder(config)
    input_ids, mask, types = random_texts(config)
    hidden = encode(params, input_ids, mask, types)
    short = encode(params, input_ids[1:2, :8], mask[1:2, :8], types[1:2, :8])
    np.testing.assert_allclose(hidden[1:2, :8], short, **close)
    short = encode(params, input_ids[2:3, 4:], mask[2:3, 4:], types[2:3, 4:])
    if kind == "roberta":
        np.testing.assert_allclose(hidden[2:3, 4:], short, **close)
    else:
        assert np.abs(hidden[2:3, 4:] - short).max() > 0.1
    changed = encode(params, np.where(mask, input_ids, FIRST), mask, types)
    np.testing.assert_array_equal(hidden[1, :8], changed[1, :8])
    assert np.abs(hidden[1, 8:] - changed[1, 8:]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_real_token_reaches_every_other(kind):
    config = tiny(kind)
    leaves = tree.flatten(tiny_params(kind))
    path = f"{kind}/embeddings/word_embeddings/embedding"
    input_ids = np.arange(FIRST, FIRST + 12)[None]
    mask = (np.arange(12) < 9).astype(np.int32)[None]

    def feature(words, at):
        params = tree.unflatten({**leaves, path: words})
        # One feature: their sum is the same at every token, after the norm.
        return bert.encoder(config)(params, input_ids, mask)[0, at, 0]

    gradient_of = jax.jit(jax.grad(feature))
    for at in (0, 8):
        reached = jnp.abs(gradient_of(leaves[path], at)).max(axis=-1)
        assert (reached[FIRST : FIRST + 9] > 1e-5).all()
        assert (reached[:FIRST] == 0).all() and (reached[FIRST + 9 :] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [None, "masked_lm"])
def test_models_read_only_their_own_leaves(kind, head):
    params = tiny_params(kind, head)
    other = tiny_params(kind, "classifier", seed=1, pooler=True)
    more = {**other, **params, kind: {**other[kind], **params[kind]}}
    assert tree.flatten(more).keys() > tree.flatten(params).keys()
    apply_fn = APPLY[head](tiny(kind))
    texts = random_texts(tiny(kind))
    np.testing.assert_array_equal(apply_fn(params, *texts), apply_fn(more, *texts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_longer_texts_than_the_positions_are_refused(kind, head):
    params = tiny_params(kind, head)
    apply_fn = APPLY[head](tiny(kind))
    tokens = np.full((1, 15), FIRST)
    assert np.isfinite(apply_fn(params, tokens[:, 1:], tokens[:, 1:])).all()
    with pytest.raises(ValueError, match="15 tokens; this model takes at most 14"):
        apply_fn(params, tokens, tokens)


def test_inputs_of_unlike_shapes_are_refused():
    config, params = tiny("bert"), tiny_params("bert")
    tokens = np.full((2, 5), FIRST)
    for shape in ((1, 5), (2, 1), (2,)):
        with pytest.raises(ValueError, match=r"attention_mask of .* shape \[2, 5\]; "):
            bert.encoder(config)(params, tokens, np.ones(shape, int))
    with pytest.raises(ValueError, match=r"token_type_ids of shape \[1, 5\] for input"):
        bert.encoder(config)(params, tokens, tokens, np.zeros((1, 5), int))


def test_statistics_of_the_inputs_of_every_dense_layer_are_captured():
    for kind in KINDS:
        config = tiny(kind, "masked_lm")
        params = tiny_params(kind, "masked_lm")
        texts = random_texts(config)
        paths = capture.dense_paths(bert.mask_encoder(config, MASK), params, *texts)
        kernels = {path for path in tree.flatten(params) if path.endswith("/kernel")}
        assert set(paths) == kernels and len(kernels) == 13


# Derivatives, in float64.


def plain_encoder(config, params, input_ids, attention_mask, token_type_ids):
    """The encoder of a BERT or RoBERTa written out, to be differentiated by steps."""
    leaves = {
        path.split("/", 1)[1]: leaf for path, leaf in tree.flatten(params).items()
    }
    batch, length = input_ids.shape

    def dense(x, path):
        return x @ leaves[f"{path}/kernel"] + leaves[f"{path}/bias"][None, None]

    def normed(x, path):
        centred = x - x.mean(-1, keepdims=True)
        root = jnp.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        scale, bias = leaves[f"{path}/scale"], leaves[f"{path}/bias"]
        return centred / root * scale[None, None] + bias[None, None]

    def split(x):
        return x.reshape(batch, length, config.num_attention_heads, -1).swapaxes(1, 2)

    positions = np.tile(np.arange(length), (batch, 1))
    if config.model_type == "roberta":
        pad = config.pad_token_id
        for row, ids in zip(positions, input_ids, strict=True):
            row[ids == pad] = pad
            row[ids != pad] = pad + 1 + np.arange(np.sum(ids != pad))
    x = leaves["embeddings/word_embeddings/embedding"][input_ids]
    x = x + leaves["embeddings/position_embeddings/embedding"][positions]
    x = x + leaves["embeddings/token_type_embeddings/embedding"][token_type_ids]
    x = normed(x, "embeddings/LayerNorm")
    for i in range(config.num_hidden_layers):
        path = f"encoder/layer/{i}"
        q, k, v = (
            split(dense(x, f"{path}/attention/self/{role}"))
            for role in ("query", "key", "value")
        )
        weights = jnp.exp(q @ k.mT / np.sqrt(q.shape[-1]))
        weights = weights * attention_mask[:, None, None]
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        mixed = mixed.swapaxes(1, 2).reshape(batch, length, -1)
        x = x + dense(mixed, f"{path}/attention/output/dense")
        x = normed(x, f"{path}/attention/output/LayerNorm")
        h = dense(x, f"{path}/intermediate/dense")
        h = h * (1 + jax.scipy.special.erf(h / np.sqrt(2))) / 2
        x = normed(x + dense(h, f"{path}/output/dense"), f"{path}/output/LayerNorm")
    return x


def padded_texts(config):
    """Without the text that is all padding, where the plain softmax is 0/0."""
    return tuple(np.delete(array, 3, axis=0) for array in random_texts(config, 10))


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_jvp_are_the_plain_encoder_and_its_central_difference(x64, kind):
    config = tiny(kind)
    params = cast(tiny_params(kind), np.float64)
    tau = cast(tiny_params(kind, seed=1), np.float64)
    texts = padded_texts(config)
    plain = jax.jit(lambda params: plain_encoder(config, params, *texts))
    jvp = jax.jit(functools.partial(tangent.jvp, bert.encoder(config)))
    outputs, tangents = jvp(params, tau, *texts)
    assert outputs.dtype == np.float64
    assert_not_degenerate(outputs)
    assert_not_degenerate(tangents)
    np.testing.assert_allclose(outputs, plain(params), rtol=1e-10, atol=1e-10)
    expected = central_difference(plain, params, tau, h=1e-5)
    np.testing.assert_allclose(tangents, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind, head", [("bert", "masked_lm"), ("roberta", "classifier")]
)
def test_jvp_of_heads_is_the_central_difference(x64, kind, head):
    """The word embeddings of a masked LM have one tangent for both of their uses."""
    config = dataclasses.replace(tiny(kind), num_hidden_layers=1)
    params, tau = (
        cast(random_params(seed, layout(config, head)), np.float64) for seed in range(2)
    )
    texts = padded_texts(config)
    apply_fn = jax.jit(APPLY[head](config))
    _, tangents = jax.jit(functools.partial(tangent.jvp, apply_fn))(params, tau, *texts)
    assert_not_degenerate(tangents)
    expected = central_difference(lambda p: apply_fn(p, *texts), params, tau, h=1e-5)
    np.testing.assert_allclose(tangents, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_linearized_encoder_is_that_of_the_plain_one(x64):
    config = dataclasses.replace(tiny("roberta"), num_hidden_layers=1)
    texts = padded_texts(config)
    params_0, params = (random_params(seed, layout(config)) for seed in range(2))
    target = normal(3, *texts[0].shape, config.hidden_size)
    real = texts[1][..., None]

    def gradient(apply_fn, dtype):
        f_lin = tangent.linearize(apply_fn, cast(params_0, dtype))

        def loss(params):
            error = f_lin(params, *texts) - target.astype(dtype)
            return jnp.mean(error**2 * real.astype(dtype))

        return tree.flatten(jax.jit(jax.grad(loss))(cast(params, dtype)))

    expected = gradient(functools.partial(plain_encoder, config), np.float64)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        actual = gradient(bert.encoder(config), dtype)
        assert actual.keys() == expected.keys()
        for path, leaf in expected.items():
            size = np.abs(leaf).max()
            if path.endswith("self/key/bias"):
                assert size < 1e-12, path  # one number more for every score of a token
                size = 1
            assert size > 1e-3, path
            assert actual[path].dtype == dtype
            np.testing.assert_allclose(
                actual[path], leaf, rtol=0, atol=tolerance * size, err_msg=path
            )


# Models of transformers.


@pytest.mark.torch
def test_models_saved_by_transformers_load_with_equal_bits(oracle, tmp_path):
    kind, head, params, model = oracle
    model.save_pretrained(tmp_path)
    loaded = bert.load(tmp_path)
    assert (loaded.config, loaded.folder) == (tiny(kind, head), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_base_models_that_transformers_makes_load(torch, kind, tmp_path):
    """Their names have no `bert.` in front, unlike those of a model that was loaded."""
    import transformers

    raw = tiny_config(kind)
    cls = getattr(transformers, raw["architectures"][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**raw)).eval()
    model.save_pretrained(tmp_path)
    assert "pooler/dense/weight" in hub.names(tmp_path)
    loaded = bert.load(tmp_path)
    texts = padded_texts(loaded.config)
    expected = oracle_outputs(torch, model, *texts)
    assert_not_degenerate(expected)
    actual = bert.encoder(loaded.config)(loaded.params, *texts)
    np.testing.assert_allclose(actual, expected, **close)
