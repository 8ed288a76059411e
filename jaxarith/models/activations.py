"""Activations whose derivatives are stated, so that a backward pass keeps little.

The array before the activation is the largest of a transformer block. From each
derivative here the next pass needs that array alone: the gate is computed a second
time, by another expression, because XLA would otherwise store the first result.

Hendrycks, Gimpel. Gaussian Error Linear Units. 2016. arXiv:1606.08415.
"""

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def quick_gelu(x: jax.Array) -> jax.Array:
    r"""The sigmoid approximation of GELU that OpenAI trained CLIP with.

    .. math:: x\,\sigma(1.702\,x)

    Example:
      >>> print(quick_gelu(jnp.array([-1.0, 0.0, 1.0])).round(4))
      [-0.1542  0.      0.8458]
    """
    return x * jax.nn.sigmoid(1.702 * x)


@quick_gelu.defjvp
def _quick_gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    gate = 0.5 + 0.5 * jnp.tanh(0.851 * x)  # σ(2z) = (1 + tanh z)/2
    return quick_gelu(x), gate * (1 + 1.702 * x * (1 - gate)) * dx


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    r"""The tanh approximation of GELU, Hugging Face's "gelu_new".

    .. math:: \tfrac12 x\,(1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3)))

    Example:
      >>> [round(float(y), 4) for y in gelu_tanh(jnp.array([-1.0, 0.0, 1.0]))]
      [-0.1588, 0.0, 0.8412]
    """
    return x * (0.5 + 0.5 * jnp.tanh(_SLOPE * (x + _CUBIC * x**3)))


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    gate = jax.nn.sigmoid(2 * _SLOPE * (x + _CUBIC * x**3))  # as above, (1 + tanh z)/2
    slope = 2 * _SLOPE * (1 + 3 * _CUBIC * x**2)
    return gelu_tanh(x), gate * (1 + x * (1 - gate) * slope) * dx


_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    r"""The exact GELU: :math:`x\,Φ(x) = \tfrac12 x\,(1 + \operatorname{erf}(x/√2))`.

    As in PyTorch the error is relative to `x`. `jax.nn.gelu` uses erfc, whose error is
    relative to the result and which takes longer.

    Example:
      >>> [round(float(y), 4) for y in gelu(jnp.array([-1.0, 0.0, 1.0]))]
      [-0.1587, 0.0, 0.8413]
    """
    return x * (0.5 + 0.5 * jax.lax.erf(math.sqrt(0.5) * x))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    gate = 0.5 - 0.5 * jax.lax.erf(-math.sqrt(0.5) * x)
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x**2)
    return gelu(x), (gate + x * density) * dx
