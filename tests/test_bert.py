"""The BERT and RoBERTa port against transformers' PyTorch models and a float64 text."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from flax import serialization
from layouts import generate
from oracles import central_difference, normal
from safetensors.numpy import load_file, save_file
from tiny import random_params

from jaxarith import hub, tangent, tree
from jaxarith.merge import capture
from jaxarith.models import bert

KINDS = ["bert", "roberta"]
HEADS = [None, "masked_lm", "classifier"]
MASK = 4  # the mask token of the tiny vocabulary
FIRST = 5  # of its words
CLASSES = {None: "Model", "masked_lm": "ForMaskedLM"}
CLASSES["classifier"] = "ForSequenceClassification"
ACTIVATIONS = {None: "gelu", "masked_lm": "relu", "classifier": "gelu_new"}
APPLY = {None: bert.encoder, "masked_lm": bert.masked_lm, "classifier": bert.classifier}
close = {"rtol": 1e-5, "atol": 1e-5}


def tiny_config(kind, head=None) -> dict:
    """The `config.json` of a model of two blocks, for texts of at most 14 tokens."""
    sizes = {
        "bert": {"max_position_embeddings": 14, "type_vocab_size": 2},
        "roberta": {"max_position_embeddings": 16, "type_vocab_size": 1},
    }
    return {
        "architectures": [{"bert": "Bert", "roberta": "Roberta"}[kind] + CLASSES[head]],
        "model_type": kind,
        "vocab_size": 30,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "hidden_act": ACTIVATIONS[head],
        "layer_norm_eps": 1e-3,
        "pad_token_id": {"bert": 0, "roberta": 1}[kind],
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes[kind],
    }


def tiny(kind, head=None) -> bert.BertConfig:
    return bert.BertConfig.from_json(tiny_config(kind, head))


layout = functools.cache(bert.layout)


def tiny_params(kind, head=None, *, seed=0, pooler=False):
    return random_params(seed, layout(tiny(kind), head, pooler=pooler))


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
    hub.save(folder, params, raw)
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


# Layouts and names.


def committed_layout(name):
    return json.loads((generate.FOLDER / f"{name}.json").read_text())


REAL = ["bert-base-uncased", "roberta-base", "roberta-large"]


@pytest.mark.parametrize("name", REAL)
def test_layout_equals_that_of_the_real_checkpoint(name):
    config = bert.BertConfig.from_json(generate.LANGUAGE_MODELS[name][1])
    leaves = tree.flatten(bert.layout(config, "masked_lm"))
    shapes = {path: list(leaf.shape) for path, leaf in leaves.items()}
    assert shapes == committed_layout(name)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


@pytest.mark.torch
@pytest.mark.parametrize("name", REAL)
def test_committed_layout_equals_that_of_transformers(torch, name):
    state_dict = generate.state_dict(name)
    assert generate.flax_layout(state_dict) == committed_layout(name)


@pytest.mark.parametrize("name", REAL)
def test_patterns_select_the_blocks_and_their_matrices(name):
    config = bert.BertConfig.from_json(generate.LANGUAGE_MODELS[name][1])
    leaves = bert.layout(config, "masked_lm", pooler=True)
    count = config.num_hidden_layers

    def selected(pattern):
        return set(tree.flatten(tree.select(leaves, pattern)))

    blocks = selected(bert.BLOCKS)
    assert len(blocks) == 16 * count
    assert all("/encoder/layer/" in path for path in blocks)
    matrices = selected(bert.BLOCK_LINEAR_WEIGHTS)
    assert matrices < blocks and len(matrices) == 6 * count
    attention = selected(bert.ATTENTION_WEIGHTS)
    assert attention < matrices and len(attention) == 4 * count


def test_heads_and_pooler_add_the_leaves_of_hugging_face():
    def added(kind, head, **options):
        config = tiny(kind)
        base = tree.flatten(layout(config)).keys()
        return tree.flatten(layout(config, head, **options)).keys() - base

    pooler = {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
    assert added("bert", None, pooler=True) == pooler
    assert added("bert", "classifier") == pooler | {
        "classifier/kernel",
        "classifier/bias",
    }
    assert added("roberta", "classifier") == {
        f"classifier/{layer}/{leaf}"
        for layer in ("dense", "out_proj")
        for leaf in ("kernel", "bias")
    }
    for function in (bert.layout, functools.partial(bert.init, jax.random.key(0))):
        with pytest.raises(ValueError, match="'lm'; expected None, masked_lm or class"):
            function(tiny("bert"), "lm")


def test_random_parameters_have_the_spread_that_the_config_states():
    raw = tiny_config("bert") | {"initializer_range": 0.1, "num_hidden_layers": 1}
    raw |= {"hidden_size": 96, "max_position_embeddings": 90}
    config = bert.BertConfig.from_json(raw)
    params = bert.init(jax.random.key(0), config, "masked_lm")
    for path, leaf in tree.flatten(params).items():
        if path.endswith(("kernel", "embedding")):
            np.testing.assert_allclose(leaf.std(), 0.1, rtol=0.3, err_msg=path)
        else:
            assert (leaf == path.endswith("scale")).all(), path


# Files.


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


def saved(folder, kind, head, *, pooler=False):
    """A folder to tamper with, and what it holds."""
    params = tiny_params(kind, head, pooler=pooler)
    hub.save(folder, params, tiny_config(kind, head))
    return params, load_file(folder / "model.safetensors")


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_come_back_as_they_were_saved(kind, head, tmp_path):
    """With the pooler that the file has, though only one model here reads it."""
    params, tensors = saved(tmp_path / "a", kind, head, pooler=True)
    assert f"{kind}.pooler.dense.weight" in tensors
    loaded = bert.load(tmp_path / "a")
    equal(loaded.params, params)
    hub.save(tmp_path / "b", loaded.params, hub.read_json(tmp_path / "a"))
    assert hub.names(tmp_path / "b") == hub.names(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_what_hub_files_hold_besides_is_left_out(kind, tmp_path):
    params, tensors = saved(tmp_path, kind, "masked_lm")
    words = tensors[f"{kind}.embeddings.word_embeddings.weight"]
    tensors |= {
        f"{kind}.embeddings.position_ids": np.arange(14)[None],
        f"{kind}.embeddings.token_type_ids": np.zeros((1, 14), np.int64),
    }
    if kind == "bert":
        tensors |= {
            "cls.predictions.decoder.weight": words.copy(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
            "cls.seq_relationship.weight": np.ones((2, 24), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }
    else:
        tensors |= {
            "lm_head.decoder.weight": words.copy(),
            "lm_head.decoder.bias": tensors["lm_head.bias"].copy(),
        }
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)

    copy = next(name for name in tensors if name.endswith("decoder.weight"))
    tensors[copy][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=copy.replace(".", "[./]")):
        bert.load(tmp_path)
    equal(bert.load(tmp_path, head=None).params, {kind: params[kind]})


def test_older_names_of_norms_load(tmp_path):
    params, tensors = saved(tmp_path, "bert", "masked_lm")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in older.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    assert "cls.predictions.transform.LayerNorm.gamma" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("kind", KINDS)
def test_bases_without_the_name_in_front_load(kind, tmp_path):
    params, tensors = saved(tmp_path, kind, None, pooler=True)
    tensors = {name.removeprefix(f"{kind}."): array for name, array in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(14)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("prefixed", [True, False])
def test_msgpack_files_of_flax_load(prefixed, tmp_path):
    params, _ = saved(tmp_path, "bert", None, pooler=True)
    (tmp_path / "model.safetensors").unlink()
    content = serialization.msgpack_serialize(params if prefixed else params["bert"])
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["masked_lm", "classifier"])
def test_bases_load_from_checkpoints_with_any_head(kind, head, tmp_path):
    params, tensors = saved(tmp_path, kind, head)
    base = bert.load(tmp_path, head=None)
    equal(base.params, {kind: params[kind]})
    tensors |= {"qa_outputs.weight": np.ones((2, 24), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path, head=None).params, {kind: params[kind]})
    raw = hub.read_json(tmp_path) | {"architectures": ["BertForQuestionAnswering"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, {kind: params[kind]})
    equal(bert.load(tmp_path, head=head).params, params)


def test_pretraining_checkpoints_load_as_masked_lms(tmp_path):
    params, _ = saved(tmp_path, "bert", "masked_lm")
    raw = hub.read_json(tmp_path) | {"architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, params)
    del raw["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, {"bert": params["bert"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["masked_lm", "classifier"])
def test_missing_head_is_an_error_that_names_it(kind, head, tmp_path):
    saved(tmp_path, kind, None, pooler=True)
    with pytest.raises(ValueError, match=f"has no {head} head(?s:.*)head=None"):
        bert.load(tmp_path, head=head)
    with pytest.raises(ValueError, match="head 'lm'; expected"):
        bert.load(tmp_path, head="lm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_unknown_and_missing_tensors_are_errors_that_name_them(kind, head, tmp_path):
    _, tensors = saved(tmp_path, kind, head)
    heads = {"bert": ["cls/predictions/extra"], "roberta": ["lm_head/extra"]}
    extra = [f"{kind}/extra", f"{kind}/encoder/layer/2/output/dense/bias", "adapter/up"]
    extra += heads[kind] if head == "masked_lm" else []
    extra += ["classifier/extra"] if head == "classifier" else []
    for name in extra:
        wrong = {**tensors, name.replace("/", "."): np.ones(3, np.float32)}
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"\+ {name}  f32\[3\]"):
            bert.load(tmp_path)
    name = f"{kind}.encoder.layer.1.attention.self.key.bias"
    wrong = {key: array for key, array in tensors.items() if key != name}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"- {name.replace('.', '/')}"):
        bert.load(tmp_path)


def test_classifier_of_a_bert_needs_a_pooler(tmp_path):
    _, tensors = saved(tmp_path, "bert", "classifier")
    wrong = {name: array for name, array in tensors.items() if "pooler" not in name}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="- bert/pooler/dense/kernel"):
        bert.load(tmp_path)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    _, tensors = saved(tmp_path, "roberta", "masked_lm")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bert", "masked_lm")))
    with pytest.raises(ValueError, match="has no masked_lm head"):
        bert.load(tmp_path)
    with pytest.raises(ValueError, match=r"does not match(?s:.*)roberta/\.\.\."):
        bert.load(tmp_path, head=None)
    raw = tiny_config("bert", "classifier") | {"id2label": {"0": "a"}}
    saved(tmp_path, "bert", "classifier")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"classifier/kernel: model f32\[24, 1\]"):
        bert.load(tmp_path)


# Configurations.


@pytest.mark.parametrize("kind", KINDS)
def test_default_config_equals_that_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    cls = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    raw = json.loads(cls().to_json_string(use_diff=False))
    stated = bert.BertConfig.from_json(raw)
    assert stated == bert.BertConfig.from_json({"model_type": kind})
    assert kind == "roberta" or stated == bert.BertConfig()


def test_number_of_labels_is_that_of_their_names():
    def labels(**raw):
        return bert.BertConfig.from_json({"model_type": "bert", **raw}).num_labels

    assert labels() == 2
    assert labels(num_labels=5) == 5
    assert labels(id2label={"0": "a", "1": "b", "2": "c"}) == 3


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"model_type": "t5"}, "describes a 't5'; expected a BERT or RoBERTa"),
        ({"model_type": None}, "describes a 'model'; expected a BERT or RoBERTa"),
        ({"hidden_act": "silu"}, "activation 'silu'; this port has gelu, gelu_new"),
        (
            {"position_embedding_type": "relative_key"},
            "'relative_key'; this port has absolute",
        ),
        ({"is_decoder": True}, "is_decoder: causal attention"),
    ],
)
def test_configs_that_this_port_lacks_are_errors_that_say_so(stated, message):
    with pytest.raises(ValueError, match=message):
        bert.BertConfig.from_json({**tiny_config("bert"), **stated})
