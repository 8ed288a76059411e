"""Linearised models: closed forms, finite differences, and what they cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import central_difference, flops, normal

from jaxarith import tangent, task_vectors, tree

CLOSE = dict(rtol=1e-10, atol=1e-10)  # for float64


def attention_model(params, x):
    """A small transformer block on `x[batch, length, width]`; outputs are a dict."""
    h = x - x.mean(-1, keepdims=True)
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    h = jnp.einsum("bld,d->bld", h, params["norm"]["scale"])
    q, k, v = (h @ params["attention"][name] for name in "qkv")
    x = x + jax.nn.softmax(q @ k.mT / 2) @ v
    hidden = jax.nn.gelu(
        x @ params["mlp"]["kernel"] + params["mlp"]["bias"][None, None]
    )
    return {"hidden": hidden, "logits": hidden.mean(1) @ params["head"]}


def attention_params(seed):
    return {
        "norm": {"scale": 1 + normal((seed, 0), 4, scale=0.3)},
        "attention": {name: normal((seed, i), 4, 4) for i, name in enumerate("qkv", 1)},
        "mlp": {"kernel": normal((seed, 4), 4, 6), "bias": normal((seed, 5), 6)},
        "head": normal((seed, 6), 6, 3),
    }


@pytest.fixture
def block(x64):
    """The model, its parameters, a task vector, inputs: in float64, not degenerate."""
    f = jax.jit(attention_model)
    params_0, tau = attention_params(0), attention_params(1)
    x = normal(2, 3, 5, 4)
    tangents = jax.tree.leaves(tangent.jvp(f, params_0, tau, x)[1])
    assert all(np.abs(leaf).min(axis=0).max() > 0.1 for leaf in tangents)
    return f, params_0, tau, x


def test_linearize_error_is_exactly_the_quadratic_term(x64):
    a, b, w_0, w = normal(0, 5, 5), normal(1, 5), normal(2, 5), normal(3, 5)

    def f(params, x):
        return x * (b @ params["w"] + params["w"] @ a @ params["w"])

    error = f({"w": w}, 2.0) - tangent.linearize(f, {"w": w_0})({"w": w}, 2.0)
    np.testing.assert_allclose(error, 2 * (w - w_0) @ a @ (w - w_0), **CLOSE)


def test_jvp_is_the_central_difference(block):
    f, params_0, tau, x = block
    outputs, tangents = tangent.jvp(f, params_0, tau, x)
    assert_close(outputs, f(params_0, x), rtol=1e-14)
    expected = central_difference(lambda params: f(params, x), params_0, tau)
    assert_close(tangents, expected, rtol=1e-8, atol=1e-8)


def test_linearized_model_touches_the_model_at_params_0(block):
    f, params_0, _, x = block
    assert_close(tangent.linearize(f, params_0)(params_0, x), f(params_0, x), rtol=1e-7)


def test_linearized_model_is_affine_in_the_parameters(block):
    f, params_0, tau, x = block
    f_lin = tangent.linearize(f, params_0)
    a, b = task_vectors.apply(params_0, tau), attention_params(3)
    mix = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, a, b)
    mixed = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, f_lin(a, x), f_lin(b, x))
    assert_close(f_lin(mix, x), mixed, **CLOSE)


def test_jvps_is_a_loop_of_jvp(block):
    f, params_0, tau, x = block
    taus = [tau, attention_params(3), tree.select(tau, "mlp/.*"), {"head": tau["head"]}]
    outputs, tangents = tangent.jvps(f, params_0, taus, x)
    assert_close(outputs, f(params_0, x), **CLOSE)
    loop = [tangent.jvp(f, params_0, tau, x)[1] for tau in taus]
    assert_close(tangents, tree.stack(loop), **CLOSE)


def test_jvps_is_a_vmap_of_jvp(block):
    f, params_0, tau, x = block
    taus = [tau, attention_params(3)]
    vmapped = jax.vmap(lambda tau: tangent.jvp(f, params_0, tau, x)[1])
    _, tangents = tangent.jvps(f, params_0, taus, x)
    assert_close(tangents, vmapped(tree.stack(taus)), **CLOSE)


@pytest.mark.parametrize("pattern", ["mlp/.*", "attention/q|head", "norm/scale"])
def test_partial_task_vector_is_the_full_one_with_zeros(block, pattern):
    f, params_0, tau, x = block
    part = tree.select(tau, pattern)
    full = tree.fill(part, params_0)
    actual = tangent.jvp(f, params_0, part, x)
    assert_close(actual, tangent.jvp(f, params_0, full, x), **CLOSE)
    f_lin = tangent.linearize(f, params_0)
    params = task_vectors.apply(params_0, part)
    actual = f_lin(tree.select(params, pattern), x)
    assert_close(actual, f_lin(params, x), **CLOSE)


def test_gradient_of_linearized_model_is_the_transposed_jacobian(block):
    f, params_0, tau, x = block
    params = task_vectors.apply(params_0, tau)
    f_lin = tangent.linearize(f, params_0)
    weights = normal(4, 3, 3)

    def gradient(model, params):
        loss = lambda params: jnp.sum(weights * model(params, x)["logits"])  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    # The loss is linear in the outputs: J(x; θ0)ᵀ weights, wherever f_lin is evaluated.
    assert_close(gradient(f_lin, params), gradient(f, params_0), **CLOSE)


def test_gradient_of_a_part_has_the_structure_of_the_part(block):
    f, params_0, tau, x = block
    f_lin = tangent.linearize(f, params_0)
    part = tree.select(task_vectors.apply(params_0, tau), "mlp/.*")
    gradient = jax.grad(lambda params: jnp.sum(f_lin(params, x)["logits"] ** 2))(part)
    assert tree.flatten(gradient).keys() == {"mlp/kernel", "mlp/bias"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


class Affine(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_params_and_outputs_are_any_pytrees(x64):
    def f(params, x, y):
        return [jnp.exp(params[0].w) * x, {"y": params[0].b * y}], ()

    params_0 = [Affine(jnp.array([0.5, 1.0]), jnp.array(2.0))]
    tau = [Affine(jnp.array([1.0, 3.0]), None)]
    outputs, tangents = tangent.jvp(f, params_0, tau, 2.0, 3.0)
    assert jax.tree.structure(outputs) == jax.tree.structure(f(params_0, 2.0, 3.0))
    np.testing.assert_allclose(tangents[0][0], [2 * np.exp(0.5), 6 * np.exp(1)])
    np.testing.assert_array_equal(tangents[0][1]["y"], 0)


def test_float32_params_keep_a_small_tau_beside_bfloat16_params_0():
    params_0 = {"w": jnp.ones(3, jnp.bfloat16)}
    params = {"w": jnp.full(3, 1 + 2.0**-10, jnp.float32)}  # 1 in bfloat16
    f_lin = tangent.linearize(lambda params, x: params["w"] - x, params_0)
    moved = f_lin(params, jnp.bfloat16(1))
    np.testing.assert_array_equal(moved, jnp.full(3, 2.0**-10, jnp.bfloat16))


@pytest.mark.parametrize(
    "call",
    [
        lambda f, p, bad: tangent.jvp(f, p, bad, 1.0),
        lambda f, p, bad: tangent.jvps(f, p, [p, bad], 1.0),
        lambda f, p, bad: tangent.linearize(f, p)(bad, 1.0),
    ],
    ids=["jvp", "jvps", "linearize"],
)
def test_tau_that_does_not_fit_is_named_with_both_shapes(call):
    params_0 = {"a": {"w": jnp.ones((2, 3))}}
    f = lambda params, x: params["a"]["w"] * x  # noqa: E731
    with pytest.raises(
        ValueError, match=r"a/w: \[3\] in the .*, \[2, 3\] in the param"
    ):
        call(f, params_0, {"a": {"w": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"a/v \[2\]: not in the parameters"):
        call(f, params_0, {"a": {"v": jnp.ones(2)}})


def test_jvps_names_which_task_vector_does_not_fit():
    with pytest.raises(ValueError, match="task vector 1 does not fit"):
        tangent.jvps(lambda p, x: p["w"], {"w": 1.0}, [{"w": 1.0}, {"v": 1.0}], 0.0)


def test_jvps_of_no_task_vector_is_an_error():
    with pytest.raises(ValueError, match="at least one task vector"):
        tangent.jvps(lambda p, x: p["w"], {"w": 1.0}, [], 0.0)


# What it costs, counted by XLA. One matrix product of a layer is 2 · BATCH · WIDTH².
LAYERS, BATCH, WIDTH = 10, 32, 128
PRODUCT = 2 * BATCH * WIDTH**2


def dense_stack(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"{i}"])
    return x


@pytest.fixture(scope="module")
def stack():
    params_0 = {f"{i}": normal(i, WIDTH, WIDTH) / WIDTH**0.5 for i in range(LAYERS)}
    return params_0, normal(LAYERS, BATCH, WIDTH)


@pytest.mark.parametrize(
    ("trained", "tangent_products"),
    [
        (range(LAYERS), 2 * LAYERS - 1),  # dW·x and W·dx, but no dx in the first layer
        ([LAYERS - 1], 1),
        ([0], LAYERS),  # dW·x once, then W·dx through all other layers
        ([LAYERS - 3, LAYERS - 1], 1 + 1 + 2),
        ([], 0),
    ],
    ids=["all", "last", "first", "two", "none"],
)
def test_frozen_leaves_cost_nothing(stack, trained, tangent_products):
    params_0, x = stack
    tau = {f"{i}": params_0[f"{i}"] for i in trained}
    count = flops(
        lambda p, tau, x: tangent.jvp(dense_stack, p, tau, x), *stack[:1], tau, x
    )
    assert count / PRODUCT == pytest.approx(LAYERS + tangent_products, rel=0.02)


def test_many_tangents_share_one_forward_pass(stack):
    params_0, x = stack
    taus = [params_0] * 4
    count = flops(
        lambda p, taus, x: tangent.jvps(dense_stack, p, taus, x), params_0, taus, x
    )
    expected = LAYERS + 4 * (2 * LAYERS - 1)
    assert count / PRODUCT == pytest.approx(expected, rel=0.02)


def test_linearized_training_costs_five_thirds_of_ordinary_training(stack):
    params_0, x = stack

    def training(model):
        gradient = jax.grad(lambda params, p, x: jnp.sum(model(p)(params, x) ** 2))
        return flops(gradient, params_0, params_0, x) / PRODUCT

    ordinary = training(lambda params_0: dense_stack)
    linearized = training(lambda params_0: tangent.linearize(dense_stack, params_0))
    # forward 1, backward 2, tangent 2, its transpose 2 (one product less in the first
    # layer, whose input is data).
    assert ordinary == pytest.approx(3 * LAYERS - 1, rel=0.03)
    assert linearized == pytest.approx(5 * LAYERS - 2, rel=0.03)
    assert linearized / ordinary == pytest.approx(5 / 3, rel=0.03)


def test_integer_leaves_stay_where_they_are():
    def f(params, x):
        return params["w"] ** 2 * x + params["steps"]

    start = {"w": jnp.array(3.0), "steps": jnp.array(1)}
    moved = {"w": jnp.array(4.0), "steps": jnp.array(1)}
    np.testing.assert_allclose(tangent.linearize(f, start)(moved, 2.0), 31.0)


def with_classes(params, x, *, scale=1.0):
    logits = jnp.sin(x @ params["w"]) * scale
    return {"logits": logits, "class": logits.argmax(-1), "seen": x > 0}


@pytest.mark.parametrize("product_dtype", [None, "float32"])
def test_integer_outputs_are_those_of_the_start_and_options_are_passed_on(
    product_dtype,
):
    params_0, x = {"w": jnp.eye(3)}, jnp.arange(6.0).reshape(2, 3)
    params = {"w": 1.5 * jnp.eye(3)}
    linear = tangent.linearize(with_classes, params_0, product_dtype=product_dtype)
    for call in (linear, jax.jit(linear, static_argnames="scale")):
        found = call(params, x, scale=2.0)
        expected = 2 * (jnp.sin(x) + jnp.cos(x) * 0.5 * x)
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)
        start = with_classes(params_0, x)
        np.testing.assert_array_equal(found["class"], start["class"])
        np.testing.assert_array_equal(found["seen"], start["seen"])


def test_many_tangents_of_integer_outputs_are_of_float0():
    params_0, x = {"w": jnp.eye(3)}, jnp.arange(6.0).reshape(2, 3)
    for wrap in (lambda f: f, jax.jit):
        outputs = wrap(lambda p: tangent.jvps(with_classes, p, [p, p], x)[0])(params_0)
        assert outputs["class"].dtype == jnp.int32
    _, tangents = tangent.jvps(with_classes, params_0, [params_0, params_0], x)
    assert tangents["class"].shape == (2, 2)
    assert tangents["class"].dtype == jax.dtypes.float0
