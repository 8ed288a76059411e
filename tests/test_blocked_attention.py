"""Attention by blocks against its definition, in values, derivatives and memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checks import assert_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import normal
from tiny_gpt2 import random_params

from experiments.bench import long_texts
from jaxarith import precision, tangent, tree
from jaxarith.merge import capture
from jaxarith.models import bert, blocked_attention, clip, generate, gpt2, t5
from jaxarith.models.bert_network import BertConfig
from jaxarith.models.blocked_attention import Causal, RelativeBias, causal
from jaxarith.models.layers import attend

HEADS, WIDTH = 2, 3


def plain(q, k, v, mask, bias):
    """The definition, all scores at once."""
    length = k.shape[1]
    if isinstance(mask, Causal):
        mask = np.tril(np.ones((length, length), bool))[None, None] & mask.real
    if isinstance(bias, RelativeBias):
        tokens = np.arange(length)
        offset = tokens[None] - tokens[:, None]
        bias = bias.diagonals[..., offset + length - 1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def real(*shape):
    """Two texts, the first padded on both sides; the second has no token at all."""
    mask = np.zeros((2, *shape), bool)
    mask[0, ..., 5:-70] = True
    return mask


def bias_of(*shape):
    return normal(3, 1, HEADS, *shape)


# The number of queries and of keys, the mask, and the bias.
CASES = {
    "nothing": (513, 513, None, None),
    "padding": (700, 700, real(1, 1, 700), None),
    "causal": (513, 513, Causal(real(1, 1, 513)), None),
    "relative": (515, 515, real(1, 1, 515), RelativeBias(bias_of(1029))),
    "relative, causal": (
        700,
        700,
        Causal(real(1, 1, 700)),
        RelativeBias(bias_of(1399)),
    ),
    "cross": (300, 1000, real(1, 300, 1000), bias_of(300, 1000)),
    "few queries": (100, 3000, real(1, 1, 3000), bias_of(1, 3000)),
    # Shorter ones have all scores at once.
    "short": (9, 33, None, None),
    "short, padding, bias": (77, 77, real(1, 1, 77), bias_of(77, 77)),
    "short, causal": (111, 111, causal(jnp.asarray(real(1, 1, 111))), None),
    "short, one query": (1, 81, real(1, 1, 81), None),
}


def case(name, dtype):
    """q, k, v and the bias; a direction; a cotangent; and the mask."""
    queries, keys, mask, bias = CASES[name]
    lengths = queries, keys, keys

    def arrays(seed):
        qkv = [normal((seed, i), 2, n, HEADS, WIDTH) for i, n in enumerate(lengths)]
        return *qkv, jax.tree.map(lambda x: normal((seed, 9), *x.shape), bias)

    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    cotangent = normal(8, 2, queries, HEADS * WIDTH)
    return cast(arrays(0)), cast(arrays(1)), cast(cotangent), mask


def derivatives(attention, point, direction, cotangent, mask):
    """The value, the tangent, its transpose and the gradient of the value."""

    def run(point):
        return attention(*point[:3], mask, point[3])

    def paired(direction):
        return jnp.sum(jax.jvp(run, (point,), (direction,))[1] * cotangent)

    value, tangent = jax.jvp(run, (point,), (direction,))
    return (
        value,
        tangent,
        jax.grad(paired)(direction),
        jax.vjp(run, point)[1](cotangent),
    )


def ours(q, k, v, mask, bias):
    return attend(q, k, v, mask=mask, bias=bias)


@pytest.mark.parametrize("name", CASES)
def test_attention_gives_the_definition_and_all_of_its_derivatives(x64, name):
    args = case(name, float)
    run = jax.jit(derivatives, static_argnums=0)
    found, expected = run(ours, *args), run(plain, *args)
    assert_close(found, expected, 1e-10)
    assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(expected))


def test_float32_is_that_of_float64_to_1e_5(x64):
    expected = jax.jit(derivatives, static_argnums=0)(plain, *case("cross", float))
    args = case("cross", jnp.float32)
    found = jax.jit(derivatives, static_argnums=0)(ours, *args)
    scale = {path: np.abs(x).max() for path, x in tree.flatten(expected).items()}
    for path, leaf in tree.flatten(found).items():
        assert leaf.dtype == jnp.float32
        expected_leaf = tree.flatten(expected)[path]
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-5 * scale[path])


def test_bfloat16_has_a_softmax_in_float32():
    queries = [normal((0, i), 1, 520, HEADS, WIDTH) for i in range(3)]
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in queries]
    found = ours(*rounded, None, None)
    assert found.dtype == jnp.bfloat16
    expected = plain(*(x.astype(jnp.float32) for x in rounded), None, None)
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def test_several_tasks_at_once(x64):
    *one, mask = case("relative", float)
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x[::-1]]), one)

    def run(attention):
        each = lambda *args: derivatives(attention, *args, mask)  # noqa: E731
        return jax.jit(jax.vmap(each))(*both)

    assert_close(run(ours), run(plain), 1e-10)


def test_the_mask_of_a_shorter_text_is_an_array():
    assert isinstance(causal(real(1, 1, 511)), jax.Array)
    assert isinstance(causal(real(1, 1, 512)), Causal)


def tokens_of(length, texts=1):
    """Texts padded on both sides, and their masks."""
    ids = np.random.default_rng(0).integers(1, 20, (texts, length))
    mask = np.ones_like(ids)
    mask[:, :3] = mask[:, -40:] = 0
    return ids, mask


def gpt2_of(length, texts=1, layers=1):
    sizes = {"vocab_size": 20, "n_embd": 16, "n_head": 4, "n_inner": 16}
    config = gpt2.GPT2Config(**sizes, n_layer=layers, n_positions=length)
    params = random_params(config=config)
    return gpt2.encoder(config), params, tokens_of(length, texts)


def t5_of(length, targets, texts=1):
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4}
    config = t5.T5Config(**sizes, num_layers=1)
    params = tiny.random_params(0, t5.layout(config))
    inputs = *tokens_of(length, texts), *tokens_of(targets, texts)
    return t5.hidden_states(config), params, inputs


def bert_of(length):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    params = tiny.random_params(0, bert.layout(config))
    return bert.encoder(config), params, tokens_of(length)


def clip_of(remat):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 46, "patch_size": 2}
    raw = {"vision_config": vision, "text_config": {"num_hidden_layers": 1}}
    config = clip.CLIPConfig.from_json(raw)
    params = tiny.random_params(0, tree.select(clip.layout(config), clip.IMAGE_ENCODER))
    images = normal(0, 1, 46, 46, 3)
    return clip.image_encoder(config, remat=remat), params, (images,)


MODELS = {
    "gpt2": lambda: gpt2_of(520),
    "t5": lambda: t5_of(512, 515),
    "t5, few targets": lambda: t5_of(1500, 180),
    "bert": lambda: bert_of(512),
    "clip": lambda: clip_of(remat=False),
    "clip, remat": lambda: clip_of(remat=True),
}


def linearized_step(apply_fn, params, tau, inputs):
    """The outputs, their tangent, and a gradient in `tau`."""

    def total(tau):
        outputs, moved = tangent.jvp(apply_fn, params, tau, *inputs)
        return jnp.sum((outputs + moved) ** 2), (outputs, moved)

    return jax.grad(total, has_aux=True)(tau)


def transposed_step(apply_fn, params, tau, inputs):
    """The gradient by `jax.linearize` and its transpose."""
    outputs, push = jax.linearize(lambda params: apply_fn(params, *inputs), params)
    return jax.linear_transpose(push, params)(outputs + push(tau))[0]


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_with_blocks(x64, monkeypatch, name):
    apply_fn, params, inputs = MODELS[name]()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    tau = jax.tree.map(lambda leaf: 0.1 * jnp.sin(9 * leaf), params)

    def run():
        step = jax.jit(lambda *args: linearized_step(apply_fn, *args))
        loops = str(jax.make_jaxpr(step)(params, tau, inputs)).count("scan[")
        return step(params, tau, inputs), loops

    found, loops = run()
    monkeypatch.setattr(blocked_attention, "LENGTH", 10_000)
    expected, none = run()
    assert loops and not none
    assert_close(found, expected, 1e-10)


def bytes_needed(step, model):
    apply_fn, params, inputs = model
    lowered = jax.jit(lambda *args: step(apply_fn, *args)).lower(params, params, inputs)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("step", [linearized_step, transposed_step])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_memory_is_linear_in_the_length(monkeypatch, name, step):
    model_of = gpt2_of if name == "gpt2" else lambda length: t5_of(length, length)
    short, long = (bytes_needed(step, model_of(length)) for length in (512, 1024))
    assert long < 2.2 * short
    monkeypatch.setattr(blocked_attention, "LENGTH", 10_000)
    assert 4 * long < bytes_needed(step, model_of(1024))


def test_a_batch_over_devices_needs_nothing_of_the_others(x64):
    apply_fn, params, inputs = gpt2_of(520, texts=8)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    step = jax.jit(lambda params, *ids: tangent.jvp(apply_fn, params, params, *ids))
    expected = step(params, *inputs)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    compiled = step.lower(params, *spread).compile()
    assert "all-" not in compiled.as_text()
    assert_close(compiled(params, *spread), expected, 1e-10)


def test_a_long_prompt_goes_on_as_the_whole_text_says(monkeypatch):
    sizes = {"vocab_size": 20, "n_embd": 16, "n_head": 4, "n_inner": 16}
    config = gpt2.GPT2Config(**sizes, n_layer=2, n_positions=530)
    params, (ids, mask) = random_params(config=config), tokens_of(520)
    ids, mask = ids[:, :515], np.maximum(mask[:, :515], np.arange(515) > 400)
    new = generate.generate(gpt2.decoder(config), params, ids, mask, max_new_tokens=3)
    monkeypatch.setattr(blocked_attention, "LENGTH", 10_000)
    for i in range(3):
        logits = gpt2.language_model(config)(params, ids, mask)
        assert int(new[0, i]) == int(logits[0, -1].argmax())
        ids = np.concatenate([ids, new[:, i : i + 1]], axis=1)
        mask = np.concatenate([mask, np.ones((1, 1), int)], axis=1)


def test_inputs_of_layers_are_captured_as_without_blocks(monkeypatch):
    apply_fn, params, (ids, mask) = bert_of(512)
    batch = {"input_ids": ids, "attention_mask": mask}

    def grams():
        return capture.input_grams(
            lambda *args: apply_fn(*args), params, [batch], inputs=tuple(batch)
        )

    found = grams()
    monkeypatch.setattr(blocked_attention, "LENGTH", 10_000)
    assert_close(found, grams(), 1e-5)


def test_rounded_products_leave_the_point_as_it_is():
    """A tangent computes scores anew, here large ones that rounding would move."""
    q, k, v = (normal((0, i), 1, 520, HEADS, 8, scale=4.0) for i in range(3))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    _, push = jax.linearize(lambda v: attend(q, k, v), v)
    found = jax.jit(precision.products_in(push, jnp.bfloat16))(v)
    expected = push(v)
    error = jnp.abs(found - expected).max() / jnp.abs(expected).max()
    assert 1e-4 < error < 0.01


def test_the_report_has_both_forms_of_attention(tmp_path):
    config = long_texts.Config(
        tmp_path, model="t5-small-encoder", lengths=(512,), layers=1, repetitions=1
    )
    found = long_texts.main(config)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    whole, blocks = found["rows"]
    assert (whole["attention"], blocks["attention"]) == ("whole", "blocks")
    assert blocks["temporary MB, over whole"] < 1


def test_masks_and_biases_may_be_arrays_of_numpy():
    q, k, v = (normal((0, i), 2, 600, HEADS, WIDTH) for i in range(3))
    mask, bias = real(1, 600, 600), bias_of(600, 600)
    found = attend(q, k, v, mask=mask, bias=bias)
    assert_close(found, plain(q, k, v, mask, bias), 1e-5)
