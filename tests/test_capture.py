"""What enters Dense layers, against Flax's own intermediates and NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import normal

from jaxarith import tree
from jaxarith.merge import capture
from jaxarith.models import clip

CONFIG = tiny.tiny_clip()
PARAMS = tiny.random_params(0, clip.layout(CONFIG))
IMAGE_DENSES = len(["q", "k", "v", "out", "fc1", "fc2"]) * 2 + 1


def gram(rows):
    rows = np.asarray(rows, np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


def image_batches(count, size, padding=7.0):
    images = normal(1, count, 12, 12, 3).astype(np.float32)
    padded = np.full((-(-count // size) * size, 12, 12, 3), padding, np.float32)
    padded[:count] = images
    mask = np.arange(len(padded)) < count
    rows = range(0, len(padded), size)
    return images, [
        {"image": padded[i : i + size], "mask": mask[i : i + size]} for i in rows
    ]


def test_image_encoder_grams_are_those_of_the_outputs_before_the_layers():
    images, batches = image_batches(5, 3)
    grams = capture.input_grams(clip.image_encoder(CONFIG), PARAMS, batches)
    tower = functools.partial(
        clip.ImageTower(CONFIG).apply, {"params": PARAMS}, capture_intermediates=True
    )
    _, seen = jax.jit(tower)(images)
    seen = seen["intermediates"]["vision_model"]
    blocks = seen["encoder"]["layers"]
    visual = "vision_model/encoder/layers"
    expected = {
        f"{visual}/0/self_attn/q_proj/kernel": blocks["0"]["layer_norm1"],
        f"{visual}/0/self_attn/v_proj/kernel": blocks["0"]["layer_norm1"],
        f"{visual}/1/self_attn/k_proj/kernel": blocks["1"]["layer_norm1"],
        f"{visual}/1/mlp/fc1/kernel": blocks["1"]["layer_norm2"],
        "visual_projection/kernel": seen["post_layernorm"],
    }
    fc1 = np.asarray(blocks["1"]["mlp"]["fc1"]["__call__"][0])
    quick_gelu = fc1 / (1 + np.exp(-1.702 * fc1))
    np.testing.assert_allclose(
        grams[f"{visual}/1/mlp/fc2/kernel"], gram(quick_gelu), rtol=2e-4, atol=1e-5
    )
    for path, before in expected.items():
        found, rows = grams[path], before["__call__"][0]
        assert np.abs(found).max() > 0.1
        np.testing.assert_allclose(found, gram(rows), rtol=2e-4, atol=1e-5)
    # Nothing but the kernels of Dense layers.
    assert len(grams) == IMAGE_DENSES
    leaves = tree.flatten(PARAMS)
    for path, found in grams.items():
        assert found.shape == (leaves[path].shape[0],) * 2


def test_paths_are_in_the_order_of_the_calls():
    paths = capture.dense_paths(
        clip.image_encoder(CONFIG), PARAMS, np.zeros((1, 12, 12, 3), np.float32)
    )
    assert [path.split("/")[-2] for path in paths[:6]] == [
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ]
    assert paths[-1] == "visual_projection/kernel"
    assert len(paths) == IMAGE_DENSES


def test_neither_padding_nor_the_batch_size_changes_a_gram():
    encode = clip.image_encoder(CONFIG)
    expected = capture.input_grams(encode, PARAMS, image_batches(5, 5)[1])
    for size, padding in [(3, 7.0), (4, np.nan), (8, 1e6)]:
        batches = image_batches(5, size, padding)[1]
        assert not batches[-1]["mask"].all()
        found = capture.input_grams(encode, PARAMS, batches)
        for path in expected:
            np.testing.assert_allclose(
                found[path], expected[path], rtol=1e-4, atol=1e-5
            )


def test_only_real_tokens_count():
    """Causal text: the tokens before the padding do not see it."""
    length, start = np.array([4, 7, 2]), "text_model/encoder/layers"
    ids = np.random.default_rng(0).integers(2, 28, (3, 10))
    real = np.arange(10)[None] < length[:, None]
    ids = np.where(np.arange(10)[None] == length[:, None] - 1, 29, ids)
    batch = {"input_ids": ids, "attention_mask": real.astype(np.int32)}
    batches = [{**batch, "mask": np.array([True, True, False])}]
    encode = clip.text_encoder(CONFIG)
    kwargs = dict(inputs=("input_ids",), token_mask="attention_mask")
    grams = capture.input_grams(encode, PARAMS, batches, **kwargs)
    rows = jax.jit(lambda ids: capture.dense_inputs(encode, PARAMS, ids))(ids)
    first, last = f"{start}/0/mlp/fc1/kernel", "text_projection/kernel"
    np.testing.assert_allclose(
        grams[first],
        gram(np.concatenate([rows[first][0][i, : length[i]] for i in (0, 1)])),
        **dict(rtol=1e-4, atol=1e-5),
    )
    np.testing.assert_allclose(
        grams[last], gram(rows[last][0][:2]), rtol=1e-4, atol=1e-5
    )
    by_path = capture.input_grams(
        encode,
        PARAMS,
        batches,
        inputs=("input_ids",),
        token_mask=lambda path: "attention_mask" if "fc1" in path else None,
    )
    second = f"{start}/0/mlp/fc2/kernel"
    np.testing.assert_allclose(by_path[first], grams[first], rtol=1e-6)
    assert np.abs(by_path[second] - grams[second]).max() > 1e-3
    # Masked tokens may hold anything.
    noise = np.where(real, ids, 5)
    assert np.any(noise != ids)
    found = capture.input_grams(
        encode, PARAMS, [{**batches[0], "input_ids": noise}], **kwargs
    )
    for path in grams:
        np.testing.assert_allclose(found[path], grams[path], rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="shared")
        return nn.Dense(2, name="head")(jnp.tanh(dense(dense(x))).mean(1))


def test_layers_that_are_called_twice_have_the_mean_of_both_calls():
    with jax.enable_x64(True):
        w, b = normal(0, 3, 3), normal(1, 3)
        params = {
            "shared": {"kernel": w, "bias": b},
            "head": {"kernel": normal(2, 3, 2), "bias": np.zeros(2)},
        }
        x = normal(3, 4, 5, 3)
        batch = {"image": x, "mask": np.array([True, True, True, False])}
        grams = capture.input_grams(apply_shared, params, [batch])
        x = x[:3]
        hidden = x @ w + b
        expected = gram(np.concatenate([x, hidden]))
        assert grams["shared/kernel"].dtype == jnp.float64
        np.testing.assert_allclose(grams["shared/kernel"], expected, rtol=1e-12)
        pooled = np.tanh(hidden @ w + b).mean(1)
        np.testing.assert_allclose(grams["head/kernel"], gram(pooled), rtol=1e-12)


def apply_shared(params, x):
    return Shared().apply({"params": params}, x)


DENSE = {"kernel": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
BATCH = {"image": np.ones((3, 2), np.float32), "mask": np.ones(3, bool)}


def apply_dense(params, x):
    return nn.Dense(2).apply({"params": params}, x)


def flattened(params, x):
    return apply_dense(params, x.reshape(-1, 2))


class Wrapped(nn.Module):
    """A Dense layer before another one inside a Flax transformation."""

    wrap: callable

    @nn.compact
    def __call__(self, x):
        return self.wrap(nn.Dense)(2, name="inside")(nn.Dense(2, name="before")(x))


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit])
def test_layers_whose_inputs_cannot_leave_them_are_an_error(wrap):
    def apply_fn(params, x):
        return Wrapped(wrap).apply({"params": params}, x)

    params = {"before": DENSE, "inside": DENSE}
    with pytest.raises(ValueError, match=r"without remat, .* layer out with select"):
        capture.input_grams(apply_fn, params, [BATCH])
    found = capture.input_grams(apply_fn, params, [BATCH], select="before/.*")
    np.testing.assert_allclose(found["before/kernel"], np.ones((2, 2)))


TOKENS = {**BATCH, "image": np.ones((3, 4, 2), np.float32), "tokens": np.ones((3, 5))}


@pytest.mark.parametrize(
    ("apply_fn", "params", "batches", "options", "message"),
    [
        (lambda params, x: x, DENSE, [BATCH], {}, "called no flax.linen.Dense"),
        (
            lambda params, x: apply_dense(params["a"], x),
            {"a": DENSE},
            [BATCH],
            {},
            "kernel at kernel, which is not a leaf",
        ),
        (apply_dense, DENSE, [], {}, "no real sample"),
        (apply_dense, DENSE, [{**BATCH, "mask": np.zeros(3)}], {}, "no real sample"),
        (apply_dense, DENSE, [BATCH], {"select": "fc1"}, "no Dense layer .* kernel"),
        (flattened, DENSE, [TOKENS], {}, "first axis must be the samples"),
        (
            apply_dense,
            DENSE,
            [TOKENS],
            {"token_mask": "tokens"},
            r"\[3, 4, 2\] and its token mask \[3, 5\]; expected \[3, 4\]",
        ),
    ],
)
def test_what_cannot_be_captured_is_an_error(
    apply_fn, params, batches, options, message
):
    with pytest.raises(ValueError, match=message):
        capture.input_grams(apply_fn, params, batches, **options)
