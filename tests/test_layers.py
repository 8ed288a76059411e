"""The layers against Flax's and plain autodiff: values, tangents and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen as nn
from oracles import normal
from test_activations import plain_quick_gelu
from tiny import random_params, tiny_clip

from jaxarith import tangent, tree
from jaxarith.models import clip, layers

CLOSE = dict(rtol=1e-10, atol=1e-10)  # for float64
EPS = 1e-5


def plain_standardize(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + EPS)


def test_the_stated_derivative_is_that_of_autodiff(x64):
    ours, plain = (lambda x: layers.standardize(x, EPS)), plain_standardize
    x, dx, g = (normal((7, i), 3, 5, scale=2.0) for i in range(3))
    pushed, expected = (jax.jvp(f, (x,), (dx,)) for f in (ours, plain))
    np.testing.assert_allclose(pushed[0], expected[0], **CLOSE)
    np.testing.assert_allclose(pushed[1], expected[1], **CLOSE)
    pulled, expected = (jax.vjp(f, x)[1](g)[0] for f in (ours, plain))
    np.testing.assert_allclose(pulled, expected, **CLOSE)
    assert np.abs(pulled).min() > 1e-6
    # Of the linearised function in its tangent, and of many tangents at once.
    square = lambda f: jax.grad(lambda d: jnp.sum(jax.jvp(f, (x,), (d,))[1] ** 2))(dx)  # noqa: E731
    np.testing.assert_allclose(square(ours), square(plain), **CLOSE)
    many = jax.vmap(lambda d: jax.jvp(ours, (x,), (d,))[1])(jnp.stack([dx, g]))
    np.testing.assert_allclose(many[1], jax.jvp(plain, (x,), (g,))[1], **CLOSE)


def test_layer_norm_is_that_of_flax_under_the_same_names():
    x = normal(0, 2, 3, 8)
    flax = nn.LayerNorm(EPS, use_fast_variance=False)
    params = {"scale": 1 + normal(1, 8, scale=0.3), "bias": normal(2, 8)}
    assert jax.tree.structure(flax.init(jax.random.key(0), x)["params"]) == (
        jax.tree.structure(layers.LayerNorm(EPS).init(jax.random.key(0), x)["params"])
    )

    def gradients(module):
        loss = lambda params, x: jnp.sum(module.apply({"params": params}, x) ** 3)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    ours, theirs = gradients(layers.LayerNorm(EPS)), gradients(flax)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        *(ours, theirs),
    )


def test_layer_norm_keeps_its_precision_where_the_mean_is_large():
    rng = np.random.default_rng(0)
    x = (100 + 0.1 * rng.normal(size=(2, 64))).astype(np.float32)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    # A mean of 100 has an error of 4e-6 in float32, 4e-5 of the standard deviation.
    np.testing.assert_allclose(layers.standardize(x, 1e-8), expected, atol=2e-4)


def test_layer_norm_of_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jnp.asarray(3 + normal(0, 2, 512), jnp.bfloat16)
    dx = jnp.asarray(normal(1, 2, 512), jnp.bfloat16)
    params = {"scale": 1 + normal(2, 512, scale=0.3), "bias": normal(3, 512)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    norm = lambda x: layers.LayerNorm(EPS).apply({"params": params}, x)  # noqa: E731
    found = jax.jvp(norm, (x,), (dx,))

    def plain(x):
        return plain_standardize(x) * params["scale"][None] + params["bias"][None]

    exact = jax.jvp(plain, *(((a.astype(jnp.float32)),) for a in (x, dx)))
    for ours, expected in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        ours = np.asarray(ours, np.float32)
        # Half of the last of 8 bits, and no more.
        np.testing.assert_allclose(ours, expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 3, 5)])
def test_dense_is_that_of_flax(x64, shape):
    x, params = normal(0, *shape), {"kernel": normal(1, 5, 4), "bias": normal(2, 4)}

    def everything(kind):
        apply = lambda params, x: kind(4).apply({"params": params}, x)  # noqa: E731
        loss = lambda params, x: jnp.sum(apply(params, x) ** 3)  # noqa: E731
        grads = jax.grad(loss, argnums=(0, 1))(params, x)
        pushed = jax.jvp(apply, (params, x), (params, 2 * x))
        many = jax.vmap(apply)(tree.stack([params, params]), jnp.stack([x, -x]))
        return grads, pushed, many

    compare = lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)  # noqa: E731
    jax.tree.map(compare, everything(layers.Dense), everything(nn.Dense))


@pytest.mark.parametrize("dtype", [float, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_a_product_with_a_transposed_kernel_is_the_plain_one(x64, shape, dtype):
    x = jnp.asarray(normal(0, *shape), dtype)
    kernel = jnp.asarray(normal(1, 7, 5), dtype)

    def everything(product):
        loss = lambda x, kernel: jnp.sum(product(x, kernel) ** 3)  # noqa: E731
        pushed = jax.jvp(product, (x, kernel), (2 * x, kernel))
        many = jax.vmap(product)(jnp.stack([x, -x]), jnp.stack([kernel, kernel]))
        return jax.grad(loss, argnums=(0, 1))(x, kernel), pushed, many

    expected = everything(lambda x, kernel: jnp.einsum("...i,oi->...o", x, kernel))
    found = everything(layers.times_transposed)
    for leaf, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(other).max()
        tolerance = (1e-10 if dtype is float else 1e-5) * scale
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


def test_dense_takes_a_precision_and_a_dtype():
    x = normal(0, 2, 3, 5)
    layer = layers.Dense(4, dtype=jnp.bfloat16, precision="highest")
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 4)


def plain_vision(config, params, images):
    """CLIP's image encoder as one would write it down, all tokens in every block."""
    c, tower = config.vision, params["vision_model"]

    def norm(x, p):
        return plain_standardize(x) * p["scale"][None, None] + p["bias"][None, None]

    def dense(x, p):
        return jnp.einsum("bsi,io->bso", x, p["kernel"]) + p["bias"][None, None]

    kernel = tower["embeddings"]["patch_embedding"]["kernel"]
    strides = (c.patch_size, c.patch_size)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, kernel, strides, "VALID", dimension_numbers=numbers
    )
    x = x.reshape(len(images), -1, c.hidden_size)
    first = tower["embeddings"]["class_embedding"]
    first = jnp.broadcast_to(first, (len(x), 1, c.hidden_size))
    x = jnp.concatenate([first, x], axis=1)
    x = x + tower["embeddings"]["position_embedding"]["embedding"][None]
    x = norm(x, tower["pre_layrnorm"])
    for i in range(c.num_hidden_layers):
        p = tower["encoder"]["layers"][str(i)]
        attention, normed = p["self_attn"], norm(x, p["layer_norm1"])
        heads = []
        for h in jnp.split(jnp.arange(c.hidden_size), c.num_attention_heads):
            q, k, v = (dense(normed, attention[f"{r}_proj"])[..., h] for r in "qkv")
            scores = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(len(h))
            weights = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
            heads.append(weights @ v)
        x = x + dense(jnp.concatenate(heads, -1), attention["out_proj"])
        hidden = dense(norm(x, p["layer_norm2"]), p["mlp"]["fc1"])
        x = x + dense(plain_quick_gelu(hidden), p["mlp"]["fc2"])
    return (
        norm(x, tower["post_layernorm"])[:, 0] @ params["visual_projection"]["kernel"]
    )


def losses_of(apply_fn, params, tau, images):
    """An ordinary and a linearised loss, their gradients, and the linearised move."""
    ordinary = lambda params: jnp.sum(apply_fn(params, images) ** 2)  # noqa: E731
    linear = lambda tau: jnp.sum(tangent.jvp(apply_fn, params, tau, images)[1] ** 2)  # noqa: E731
    moved = tangent.jvp(apply_fn, params, tau, images)
    return jax.value_and_grad(ordinary)(params), jax.value_and_grad(linear)(tau), moved


@pytest.fixture
def encoder(x64):
    config = tiny_clip()
    layout = tree.select(clip.layout(config), clip.IMAGE_ENCODER)
    params, tau = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf, float), random_params(s, layout))
        for s in (0, 1)
    )
    return config, params, tau, normal(2, 4, 12, 12, 3)


def assert_leaves_close(actual, expected, dtype):
    """To 1e-10 in float64; in float32 to 1e-5 of the largest entry of a leaf."""
    exact = dtype is float
    for path, leaf in tree.flatten(expected).items():
        atol = 1e-10 if exact else 1e-5 * max(np.abs(leaf).max(), 1)
        found = tree.flatten(actual)[path]
        assert_close(found, leaf, rtol=1e-10, atol=atol)
        # Softmax does not see what is added to all keys.
        assert np.abs(leaf).max() > 1e-6 or "k_proj/bias" in path


@pytest.mark.parametrize("dtype", [float, np.float32], ids=["float64", "float32"])
def test_the_encoder_is_the_plain_one_in_values_tangents_and_gradients(encoder, dtype):
    config, *args = encoder
    plain = lambda *args: plain_vision(config, *args)  # noqa: E731
    run = jax.jit(losses_of, static_argnums=0)
    expected = run(plain, *args)
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), args)
    actual = run(clip.image_encoder(config), *args)
    assert_leaves_close(actual, expected, dtype)


def test_rematerialising_changes_no_value_and_no_gradient(encoder):
    config, *args = encoder
    plain, remat = (
        jax.jit(losses_of, static_argnums=0)(
            clip.image_encoder(config, remat=flag), *args
        )
        for flag in (False, True)
    )
    compare = lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)  # noqa: E731
    jax.tree.map(compare, remat, plain)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(remat[2]))


def test_rematerialising_works_on_several_tasks_at_once(encoder):
    config, params, tau, images = encoder
    taus = tree.stack([tau, jax.tree.map(jnp.negative, tau)])

    def gradients(remat):
        apply_fn = clip.image_encoder(config, remat=remat)
        loss = lambda tau, x: jnp.sum(tangent.jvp(apply_fn, params, tau, x)[1] ** 2)  # noqa: E731
        batches = jnp.stack([images, images + 1])
        return jax.jit(jax.vmap(jax.grad(loss)))(taus, batches)

    compare = lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)  # noqa: E731
    jax.tree.map(compare, gradients(True), gradients(False))


def test_rematerialising_takes_less_memory():
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 8, "image_size": 32, "patch_size": 8}
    config = clip.CLIPConfig.from_json(
        {"vision_config": vision, "text_config": {"num_hidden_layers": 1}}
    )
    layout = tree.select(clip.layout(config), clip.IMAGE_ENCODER)
    params, tau = random_params(0, layout), random_params(1, layout)

    def bytes_needed(remat):
        apply_fn = clip.image_encoder(config, remat=remat)

        def loss(tau, images):
            return jnp.sum(tangent.jvp(apply_fn, params, tau, images)[1] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(tau, jnp.zeros((64, 32, 32, 3)))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    # The more blocks the more; at the size of ViT-B/32 it is a quarter.
    assert bytes_needed(False) > 2.5 * bytes_needed(True)
