"""The activations against their definitions: values and stated derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import normal

from jaxarith.models import activations
from jaxarith.models.layers import softmax


def plain_quick_gelu(x):
    return x / (1 + jnp.exp(-1.702 * x))


def plain_gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def plain_gelu(x):
    return x * jax.scipy.stats.norm.cdf(x)


def plain_softmax(x):
    return jnp.exp(x) / jnp.exp(x).sum(axis=-1, keepdims=True)


PAIRS = {
    "quick_gelu": (activations.quick_gelu, plain_quick_gelu),
    "gelu_tanh": (activations.gelu_tanh, plain_gelu_tanh),
    "gelu": (activations.gelu, plain_gelu),
    "softmax": (softmax, plain_softmax),
}


@pytest.mark.parametrize("dtype", [float, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PAIRS)
def test_stated_derivatives_are_those_of_autodiff(x64, name, dtype):
    def everything(function, x, dx, g):
        pushed = jax.jvp(function, (x,), (dx,))
        pulled = jax.vjp(function, x)[1](g)
        # The gradient of a linearised loss, and many tangents at once.
        square = lambda d: jnp.sum(jax.jvp(function, (x,), (d,))[1] ** 2)  # noqa: E731
        many = jax.vmap(lambda d: jax.jvp(function, (x,), (d,)))(jnp.stack([dx, g]))
        return pushed, pulled, jax.grad(square)(dx), many

    ours, plain = PAIRS[name]
    exact = [normal((7, i), 3, 33, scale=2.0) for i in range(3)]
    expected = everything(plain, *exact)
    found = everything(ours, *(jnp.asarray(x, dtype) for x in exact))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    assert_close(found, expected, 1e-10 if dtype is float else 1e-5)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_tanh", "gelu"])
def test_gelus_and_their_slopes_are_finite_far_from_zero(name):
    x = jnp.array([-1e4, -200.0, 0.0, 200.0, 1e4])
    activation = PAIRS[name][0]
    np.testing.assert_allclose(activation(x), [0, 0, 0, 200, 1e4])
    slope = jax.vmap(jax.grad(activation))(x)
    np.testing.assert_allclose(slope, [0, 0, 0.5, 1, 1], atol=1e-6)


def test_softmax_of_a_masked_row_is_uniform_and_has_no_slope():
    least = jnp.full((1, 4), jnp.finfo(jnp.float32).min)
    y, moved = jax.jvp(softmax, (least,), (jnp.zeros((1, 4)),))
    np.testing.assert_array_equal(y, np.full((1, 4), 0.25))
    np.testing.assert_array_equal(moved, np.zeros((1, 4)))
