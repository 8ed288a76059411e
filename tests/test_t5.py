"""T5's encoder against transformers' PyTorch model and T5 written out in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from oracles import central_difference, normal
from tiny_t5 import (
    KINDS,
    plain_t5,
    random_params,
    random_tokens,
    tiny_t5,
    tiny_t5_config,
)

from jaxarith import hub, tangent, tree
from jaxarith.models import t5
from jaxarith.models.t5_stacks import RMSNorm, relative_position_bucket, rms_normalize

close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=KINDS)
def oracle(torch, request, tmp_path_factory):
    """A config, its random parameters, and transformers' model with the same."""
    from transformers import T5EncoderModel

    raw = tiny_t5_config(request.param, architectures=["T5EncoderModel"])
    config = t5.T5Config.from_json(raw)
    params = random_params(0, config, part=t5.ENCODER)
    folder = tmp_path_factory.mktemp(request.param)
    hub.save(folder, params, raw, overwrite=True)
    model, info = T5EncoderModel.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return config, params, model.eval()


def oracle_hidden(torch, model, input_ids, mask):
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask)
        )
    return output.last_hidden_state.numpy()


# Hidden states.


@pytest.mark.torch
def test_hidden_states_equal_those_of_transformers(torch, oracle):
    config, params, model = oracle
    input_ids, mask = random_tokens()
    expected = oracle_hidden(torch, model, input_ids, mask)
    assert_not_degenerate(expected)
    unmasked = oracle_hidden(torch, model, input_ids, np.ones_like(mask))
    assert (np.abs(expected - unmasked)[1:].max(axis=(1, 2)) > 0.1).all()
    actual = jax.jit(t5.encoder(config))(params, input_ids, mask)
    np.testing.assert_allclose(actual, expected, **close)
    actual = t5.encoder(config)(params, input_ids, np.ones_like(mask, bool))
    np.testing.assert_allclose(actual, unmasked, **close)


@pytest.mark.torch
def test_every_block_equals_that_of_transformers(torch, oracle):
    config, params, model = oracle
    input_ids, mask = random_tokens()
    expected = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: expected.append(output[0]))
        for block in model.encoder.block
    ]
    oracle_hidden(torch, model, input_ids, mask)
    for hook in hooks:
        hook.remove()

    _, state = t5.Transformer(config).apply(
        {"params": params},
        input_ids,
        mask,
        method="encode",
        capture_intermediates=True,
        mutable="intermediates",
    )
    blocks = state["intermediates"]["encoder"]["block"]
    assert len(expected) == len(blocks) - 1 == config.num_layers  # and the call of all
    for i, hidden in enumerate(expected):
        assert_not_degenerate(hidden.numpy())
        [(actual, _, _)] = blocks[str(i)]["__call__"]
        np.testing.assert_allclose(actual, hidden.numpy(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_at_real_tokens(kind):
    config = tiny_t5(kind)
    params = random_params(0, config, part=t5.ENCODER)
    encode = jax.jit(t5.encoder(config))
    input_ids, mask = random_tokens()
    others = np.where(mask, input_ids, 31 - input_ids)
    assert (others != input_ids)[mask == 0].any()
    hidden, changed = encode(params, input_ids, mask), encode(params, others, mask)
    np.testing.assert_array_equal(hidden[mask == 1], changed[mask == 1])
    assert np.abs(hidden - changed)[mask == 0].max() > 0.1
    short = encode(params, input_ids[1:2, :30], mask[1:2, :30])
    np.testing.assert_allclose(hidden[1:2, :30], short, **close)


def test_every_real_token_reaches_every_other():
    config = tiny_t5()
    params = random_params(0, config, part=t5.ENCODER)
    input_ids = np.arange(2, 30)[None]
    mask = (np.arange(28) < 24).astype(np.int32)[None]
    encode = t5.encoder(config)

    def feature(words, at):
        hidden = encode({**params, "shared": {"embedding": words}}, input_ids, mask)
        return hidden[0, at].sum()

    gradient_of = jax.jit(jax.grad(feature))
    for at in (0, 23):
        gradient = gradient_of(params["shared"]["embedding"], at)
        reached = jnp.abs(gradient).max(axis=-1)
        assert (reached[2:26] > 1e-6).all()
        assert (reached[:2] == 0).all() and (reached[26:] == 0).all()


def test_texts_and_masks_of_unlike_shapes_are_refused():
    config = tiny_t5()
    params = random_params(0, config, part=t5.ENCODER)
    for shape in ((1, 5), (2, 1), (2,)):
        with pytest.raises(ValueError, match=r"input_ids of shape \[2, 5\]; expected"):
            t5.encoder(config)(params, jnp.zeros((2, 5), int), jnp.ones(shape))


# Relative positions.


@pytest.mark.torch
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "buckets, farthest", [(32, 128), (8, 20), (64, 256), (4, 100), (10, 1000)]
)
def test_buckets_equal_those_of_transformers(torch, buckets, farthest, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    position = np.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(position), bidirectional, buckets, farthest
    )
    actual = relative_position_bucket(position, buckets, farthest, bidirectional)
    np.testing.assert_array_equal(actual, expected.numpy())
    unused = bidirectional  # no token is 0 ahead
    assert len(np.unique(actual)) == buckets - unused


def test_buckets_begin_at_the_powers_that_the_paper_spaces_them_by():
    """From 8 on a bucket begins at 8 · 16^(k/8): 8, 11.3, 16, 22.6, 32, …, 90.5."""
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    behind = relative_position_bucket(-np.arange(500))
    assert [int(np.argmax(behind == bucket)) for bucket in range(16)] == first
    assert (behind[91:] == 15).all() and (np.diff(behind) >= 0).all()
    ahead = relative_position_bucket(np.arange(1, 500))
    np.testing.assert_array_equal(ahead, behind[1:] + 16)


def test_all_buckets_of_the_decoder_are_behind():
    """From 16 on a bucket begins at 16 · 8^(k/16): 16, 18.2, 20.7, 23.6, …, 112.4."""
    first = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    behind = relative_position_bucket(-np.arange(500), bidirectional=False)
    found = [int(np.argmax(behind == bucket)) for bucket in range(32)]
    assert found == [*range(16), *first]
    assert (behind[113:] == 31).all() and (np.diff(behind) >= 0).all()
    assert (relative_position_bucket(np.arange(500), bidirectional=False) == 0).all()


# Derivatives, in float64.


def short_tokens():
    """Without the text that is all padding, where the plain softmax is 0/0."""
    input_ids, mask = random_tokens(12)
    return input_ids[:3], mask[:3]


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_jvp_are_the_plain_encoder_and_its_central_difference(x64, kind):
    config = tiny_t5(kind)
    params = cast(random_params(0, config, part=t5.ENCODER), np.float64)
    tau = cast(random_params(1, config, scale=0.1, part=t5.ENCODER), np.float64)
    tokens = short_tokens()
    plain = jax.jit(lambda params: plain_t5(config, params, *tokens))
    jvp = jax.jit(functools.partial(tangent.jvp, t5.encoder(config)))
    outputs, tangents = jvp(params, tau, *tokens)
    assert outputs.dtype == np.float64
    assert_not_degenerate(outputs)
    assert_not_degenerate(tangents)
    np.testing.assert_allclose(outputs, plain(params), rtol=1e-10, atol=1e-10)
    expected = central_difference(plain, params, tau, h=1e-5)
    np.testing.assert_allclose(tangents, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_linearized_encoder_is_that_of_the_plain_one(x64, kind):
    config = tiny_t5(kind)
    input_ids, mask = short_tokens()
    params_0, params = (
        random_params(0, config, part=t5.ENCODER),
        random_params(1, config, part=t5.ENCODER),
    )
    target = normal(3, *input_ids.shape, config.d_model)

    def gradient(apply_fn, dtype):
        f_lin = tangent.linearize(apply_fn, cast(params_0, dtype))

        def loss(params):
            error = f_lin(params, input_ids, mask) - target.astype(dtype)
            return jnp.mean(error**2 * mask[..., None].astype(dtype))

        return tree.flatten(jax.jit(jax.grad(loss))(cast(params, dtype)))

    expected = gradient(functools.partial(plain_t5, config), np.float64)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        actual = gradient(t5.encoder(config), dtype)
        assert actual.keys() == expected.keys()
        for path, leaf in expected.items():
            size = np.abs(leaf).max()
            assert size > 1e-4, path
            assert actual[path].dtype == dtype
            np.testing.assert_allclose(
                actual[path], leaf, rtol=0, atol=tolerance * size, err_msg=path
            )


def plain_rms(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rms(x):
    return rms_normalize(x, 1e-6)


def same(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        actual,
        expected,
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_stated_derivative_is_that_of_the_formula(x64, scale):
    """Forward, in reverse, and in reverse through the tangent."""
    x, dx = normal(0, 3, 5, 7, scale=scale), normal(1, 3, 5, 7, scale=scale)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f):
        def pulled(function):
            return scale * jax.vjp(function, x)[1](normal(2, 3, 5, 7))[0]

        y, dy = jax.jvp(f, (x,), (dx,))
        return y, dy, pulled(f), pulled(lambda x: jax.jvp(f, (x,), (dx,))[1])

    expected = derivatives(plain_rms)
    assert min(np.abs(leaf).mean() for leaf in expected) > 0.05
    same(derivatives(rms), expected)


def test_vmapped_derivative_is_that_of_the_formula(x64):
    x, dx = normal(0, 3, 5, 7), normal(1, 4, 3, 5, 7)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f):
        push = jax.vmap(lambda dx: jax.jvp(f, (x,), (dx,))[1])
        pull = jax.vmap(jax.vjp(f, x)[1])
        jacobians = [jax.vmap(jac(f))(x[0]) for jac in (jax.jacfwd, jax.jacrev)]
        return push(dx), pull(dx)[0], jacobians

    expected = derivatives(plain_rms)
    assert min(np.abs(leaf).mean() for leaf in jax.tree.leaves(expected)) > 0.05
    same(derivatives(rms), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_of_half_precision_are_float32(dtype):
    """The squares overflow float16 and lose five digits in bfloat16."""
    x = jnp.asarray(normal(0, 4, 300, scale=300.0), dtype)
    assert jnp.abs(x).max() > 256
    actual = rms(x)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, plain_rms(x.astype(jnp.float32)), rtol=1e-6)
    norm = RMSNorm(1e-6)
    assert norm.apply(norm.init(jax.random.key(0), x), x).dtype == dtype


# Names, files and configurations.


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_hugging_face(kind):
    hidden = ["wi_0", "wi_1"] if kind == "gated-gelu" else ["wi"]
    names = {
        "shared/embedding",
        "encoder/final_layer_norm/weight",
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
    }
    for i in range(2):
        names |= {f"encoder/block/{i}/layer/{j}/layer_norm/weight" for j in (0, 1)}
        names |= {
            f"encoder/block/{i}/layer/0/SelfAttention/{role}/kernel" for role in "qkvo"
        }
        names |= {
            f"encoder/block/{i}/layer/1/DenseReluDense/{name}/kernel"
            for name in [*hidden, "wo"]
        }
    leaves = tree.flatten(tree.select(t5.layout(tiny_t5(kind)), t5.ENCODER))
    assert leaves.keys() == names
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


@pytest.mark.torch
def test_encoders_saved_by_transformers_load_with_equal_bits(oracle, tmp_path):
    config, params, model = oracle
    model.save_pretrained(tmp_path)
    loaded = t5.load(tmp_path)
    assert (loaded.config, loaded.folder) == (config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.torch
def test_a_whole_t5_under_the_name_of_an_encoder_is_refused(torch, oracle, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config, params, model = oracle
    raw = tiny_t5_config(config.feed_forward_proj)
    whole = T5ForConditionalGeneration(T5Config(**raw))
    whole.shared.load_state_dict(model.shared.state_dict())
    whole.encoder.load_state_dict(model.encoder.state_dict())
    whole.save_pretrained(tmp_path)
    loaded = tree.select(t5.load(tmp_path).params, t5.ENCODER)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    raw["architectures"] = ["T5EncoderModel"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r'decoder/\.\.\.(?s:.*)select="\.\*"'):
        t5.load(tmp_path)
    layout = tree.select(t5.layout(config), t5.ENCODER)
    loaded = hub.load(tmp_path, layout, select=".*")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_file_without_a_decoder_is_an_encoder_unless_its_config_objects(tmp_path):
    config = tiny_t5()
    params = random_params(0, config, part=t5.ENCODER)
    for architectures in (["T5EncoderModel"], [], None):
        raw = tiny_t5_config(architectures=architectures)
        hub.save(tmp_path, params, raw, overwrite=True)
        loaded = t5.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    hub.save(tmp_path, params, tiny_t5_config(), overwrite=True)
    with pytest.raises(ValueError, match="holds only encoder, shared"):
        t5.load(tmp_path)


@pytest.mark.torch
def test_random_parameters_have_the_spread_of_those_of_transformers(torch, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    raw = tiny_t5_config(
        "gated-gelu",
        d_model=64,
        d_kv=24,
        d_ff=160,
        num_layers=1,
        vocab_size=300,
        relative_attention_num_buckets=512,
        relative_attention_max_distance=2000,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**raw)).save_pretrained(tmp_path)
    expected = tree.flatten(t5.load(tmp_path).params)
    init = jax.jit(t5.init, static_argnums=1)
    actual = tree.flatten(init(jax.random.key(0), t5.T5Config.from_json(raw)))
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        if path.endswith("/weight"):
            assert (leaf == 1).all() and (actual[path] == 1).all()
        else:
            assert leaf.std() > 0.01
            np.testing.assert_allclose(actual[path].std(), leaf.std(), rtol=0.07)


def test_default_config_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    raw = transformers.T5Config().to_dict()
    assert t5.T5Config.from_json(raw) == t5.T5Config()
    assert t5.T5Config.from_json({"model_type": "t5"}) == t5.T5Config()


@pytest.mark.parametrize("kind", ["mt5", "umt5", "bert"])
def test_config_of_another_model_is_an_error_that_names_it(kind):
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a T5"):
        t5.T5Config.from_json({**tiny_t5_config(), "model_type": kind})
    with pytest.raises(ValueError, match="describes a 'model'; expected a T5"):
        t5.T5Config.from_json({"d_model": 512})


@pytest.mark.parametrize("kind", ["gelu", "gated-silu", "gated-relu", "gated"])
def test_a_feed_forward_layer_that_the_port_lacks_is_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}'; this port has relu, gated-gelu"):
        t5.T5Config.from_json(tiny_t5_config(kind))
