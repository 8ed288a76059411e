"""Products in fewer bits: exactly the rounding that is meant, and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import normal
from tiny import random_params, tiny_clip

from jaxarith import precision, tangent, train, tree
from jaxarith.models import clip

CLOSE = dict(rtol=1e-6, atol=1e-6)  # products accumulate in float32


def rounded(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def products_in_bfloat16(function):
    return precision.products_in(function, jnp.bfloat16)


@pytest.fixture
def operands():
    return tuple(
        np.asarray(normal((3, i), *shape), np.float32)
        for i, shape in enumerate([(4, 6), (6, 5), (4, 5)])
    )


def test_operands_are_rounded_and_products_accumulate_in_float32(operands):
    a, b, _ = operands
    actual = products_in_bfloat16(jnp.dot)(a, b)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, rounded(a) @ rounded(b), **CLOSE)
    assert np.abs(actual - a.astype(float) @ b).max() > 1e-3


def test_the_gradient_is_made_of_rounded_products_too(operands):
    a, b, g = operands
    _, pull_back = jax.vjp(products_in_bfloat16(jnp.dot), a, b)
    grad_a, grad_b = pull_back(g)
    assert grad_a.dtype == grad_b.dtype == jnp.float32
    np.testing.assert_allclose(grad_a, rounded(g) @ rounded(b).T, **CLOSE)
    np.testing.assert_allclose(grad_b, rounded(a).T @ rounded(g), **CLOSE)


def in_scan(a, b):
    return jax.lax.scan(lambda carry, row: (carry, row @ b), 0.0, a)[1]


def unreached(a, b):
    return jnp.dot(0 * a, b)


PLACES = {
    "jit": jax.jit(jnp.dot),
    "checkpoint": jax.checkpoint(jnp.dot),
    "cond": lambda *args: jax.lax.cond(args[0][0, 0] < 9, jnp.dot, unreached, *args),
    "scan": in_scan,
    "vmap": jax.vmap(jnp.dot, (0, None)),
    "nested": jax.jit(lambda a, b: jax.checkpoint(jax.jit(in_scan))(a, b)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_products_are_found_wherever_they_are(operands, place, outer):
    a, b, _ = operands
    actual = outer(products_in_bfloat16(PLACES[place]))(a, b)
    np.testing.assert_allclose(actual, rounded(a) @ rounded(b), **CLOSE)


def test_batched_products_and_pytrees(operands):
    a, b, _ = operands
    function = lambda x: {"y": jnp.einsum("bij,bjk->bik", x["a"], x["b"])}  # noqa: E731
    batch = {"a": np.stack([a, -a]), "b": np.stack([b, b + 1])}
    actual = products_in_bfloat16(function)(batch)["y"]
    expected = np.einsum("bij,bjk->bik", rounded(batch["a"]), rounded(batch["b"]))
    np.testing.assert_allclose(actual, expected, **CLOSE)


def test_all_else_is_left_as_it_was(operands):
    a, b, _ = operands
    integers = np.arange(6).reshape(2, 3)
    function = lambda a: (jnp.tanh(a) * a.sum(), jnp.dot(integers, integers.T))  # noqa: E731
    for actual, expected in zip(
        jax.jit(products_in_bfloat16(function))(a), jax.jit(function)(a), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    narrow = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    actual = products_in_bfloat16(jnp.dot)(*narrow)
    np.testing.assert_array_equal(actual, jnp.dot(*narrow))


@pytest.fixture(scope="module")
def encoder():
    config = tiny_clip()
    layout = tree.select(clip.layout(config), clip.IMAGE_ENCODER)
    images = np.asarray(normal(2, 4, 12, 12, 3), np.float32)
    return config, random_params(0, layout), random_params(1, layout), images


def norm_of(tree):
    return np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))


def apart(a, b):
    return norm_of(jax.tree.map(np.subtract, a, b)) / norm_of(b)


def test_a_tangent_of_rounded_products_is_near_the_exact_one(encoder):
    config, params, tau, images = encoder

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def step(remat, dtype, tau):
        def loss(tau):
            outputs, moved = tangent.jvp(
                clip.image_encoder(config, remat=remat),
                params,
                tau,
                images,
                product_dtype=dtype,
            )
            return jnp.sum((outputs + moved) ** 2), (outputs, moved)

        return jax.grad(loss, has_aux=True)(tau)

    grad, (f0, moved) = step(False, None, tau)
    rounded_grad, (rounded_f0, rounded_moved) = step(False, jnp.bfloat16, tau)
    np.testing.assert_allclose(rounded_f0, f0, rtol=1e-6, atol=1e-6)
    # A rounding of 2^-9 in every operand of a dozen products in turn.
    assert 1e-4 < apart(rounded_moved, moved) < 1e-2
    assert 1e-4 < apart(rounded_grad, grad) < 1e-2
    # What `remat` computes anew is not a tangent and is not rounded.
    again = step(True, jnp.bfloat16, tau)
    assert apart(again[0], rounded_grad) < 1e-5
    assert apart(again[1], (rounded_f0, rounded_moved)) < 1e-5


def test_products_of_constants_alone_are_not_rounded(operands):
    a, b, _ = operands
    function = jax.checkpoint(lambda x: jnp.dot(a, b).sum() * x)
    actual = jax.jit(products_in_bfloat16(function))(1.0)
    np.testing.assert_allclose(actual, (a.astype(float) @ b).sum(), rtol=1e-5)


def test_a_product_with_a_number_has_a_gradient():
    x = np.asarray(normal(0, 5), np.float32)
    function = products_in_bfloat16(lambda s: jnp.einsum("i,->i", x, s))
    gradient = jax.grad(lambda s: function(s).sum())(2.0)
    np.testing.assert_allclose(gradient, rounded(x).sum(), rtol=1e-5)


def test_linearize_passes_the_dtype_on(operands):
    a, b, x = operands
    apply_fn = lambda params, x: x @ params["b"]  # noqa: E731
    f_lin = tangent.linearize(apply_fn, {"b": b}, product_dtype=jnp.bfloat16)
    actual = f_lin({"b": b + 1}, a)
    np.testing.assert_allclose(actual, a @ b + rounded(a) @ np.ones_like(b), **CLOSE)


def test_forward_mode_through_rounded_products_is_refused(operands):
    a, b, _ = operands
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(products_in_bfloat16(jnp.dot), (a, b), (a, b))


def test_training_takes_the_dtype_for_linearised_models_only():
    assert train.TrainConfig(linearized=True, product_dtype="bfloat16")
    with pytest.raises(ValueError, match="needs linearized=True"):
        train.TrainConfig(product_dtype="bfloat16")
    with pytest.raises(ValueError, match="product_dtype is 'int8'; expected bfloat"):
        train.TrainConfig(linearized=True, product_dtype="int8")


def test_training_with_rounded_products_is_near_the_exact_one():
    apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]  # noqa: E731
    params_0 = {"a": normal(0, 6, 8), "b": normal(1, 8, 3)}
    batches = [
        {"image": np.asarray(normal((5, i), 1, 16, 6), np.float32)} for i in range(20)
    ]
    loss = lambda outputs, batch, constants: jnp.mean((outputs - 1) ** 2)  # noqa: E731

    def trained(dtype):
        config = train.TrainConfig(
            steps=20, warmup_steps=2, learning_rate=1e-2, linearized=True,
            penalty="mixed", product_dtype=dtype,
        )  # fmt: skip
        pairs = [b | {"penalty": {"image": -b["image"]}} for b in batches]
        [tau] = train.fine_tune(apply_fn, params_0, loss, pairs, config, names=["a"])
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tau)])

    exact, rounded = trained(None), trained("bfloat16")
    apart = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < apart < 5e-2
