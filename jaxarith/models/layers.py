"""Layers whose derivatives need few passes over memory.

They compute the same as Flax's layers, under the same parameter names. XLA makes faster
programs of their tangents and gradients: on a CPU an ordinary training step of ViT-B/32
takes half the time, see experiments/bench/README.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxarith.models.blocked_attention import (
    Bias,
    Causal,
    Mask,
    RelativeBias,
    attend_in_blocks,
    is_long,
    masked,
)


def _rows_dot(x, kernel, dimension_numbers, precision=None):
    """`x[..., in] @ kernel[in, out]` as one product of matrices.

    From a product with several row axes the gradient of the kernel is a contraction
    over all of them, for which XLA first transposes both operands on a CPU.
    """
    del dimension_numbers  # of a Dense layer: always the last and the first axis
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot(rows, kernel, precision=precision)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def times_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x[..., in] @ kernel[out, in].T` as one product of matrices, as in `Dense`.

    Example:
      >>> print(times_transposed(jnp.array([[[1.0, 2.0]]]), jnp.array([[3.0, 4.0]])))
      [[[11.]]]
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    return product.reshape(*x.shape[:-1], kernel.shape[0])


# flax.linen.Dense by another route to the same product.
Dense = functools.partial(nn.Dense, dot_general=_rows_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: jax.Array, eps: float) -> jax.Array:
    r"""Mean 0 and variance 1 along the last axis: :math:`(x - \mu)/\sqrt{\sigma^2+ε}`.

    The variance is the mean square of the centred numbers. Flax's faster form,
    E[x²] - E[x]², loses digits where the mean is large.

    The derivative is stated, with :math:`y` the result and means over the last axis:

    .. math:: \dot y = \frac{\dot x - \overline{\dot x} - y\,\overline{y\dot x}}
                            {\sqrt{\sigma^2 + ε}}

    so that transposing it keeps `y` and the root, and not every step on the way.

    Args:
      x: `[..., D]`.
      eps: added to the variance.

    Returns:
      `[..., D]` in float32 or better.

    Example:
      >>> print(standardize(jnp.array([1.0, 2.0, 3.0]), 0.0).round(4))
      [-1.2247  0.      1.2247]
    """
    return _standardize(x, eps)[0]


def _standardize(x, eps):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + eps)
    return centered * scale, scale


@standardize.defjvp
def _standardize_jvp(eps, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, scale = _standardize(x, eps)
    dx = dx.astype(y.dtype)
    along = jnp.mean(y * dx, axis=-1, keepdims=True)
    return y, scale * (dx - dx.mean(-1, keepdims=True) - y * along)


class LayerNorm(nn.Module):
    """`standardize`, then `scale` and `bias` (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def parameter(name, init):
            leaf = self.param(name, init, x.shape[-1:])
            return leaf.reshape((1,) * (x.ndim - 1) + x.shape[-1:])

        scale = parameter("scale", nn.initializers.ones)
        bias = parameter("bias", nn.initializers.zeros)
        return (standardize(x, self.eps) * scale + bias).astype(x.dtype)


@jax.custom_jvp
def softmax(scores: jax.Array) -> jax.Array:
    r"""Softmax along the last axis.

    The derivative is stated, with :math:`y` the result, so that the product of `y` and
    the tangent is computed once:

    .. math:: \dot y = y\dot s - y \sum y\dot s

    Args:
      scores: `[..., K]`, finite.

    Example:
      >>> [round(float(y), 4) for y in softmax(jnp.log(jnp.array([1.0, 3.0])))]
      [0.25, 0.75]
    """
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (scores,), (ds,) = primals, tangents
    y = softmax(scores)
    moved = y * ds
    return y, moved - y * moved.sum(axis=-1, keepdims=True)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
) -> jax.Array:
    r"""Softmax attention: :math:`\operatorname{softmax}(q k^\top + \text{bias})\,v`.

    Vaswani et al. 2017, arXiv:1706.03762, Eq. 1; the caller divides by the root of D.
    The softmax is computed in float32 or better. Texts of 512 tokens and more, or as
    many scores of other shapes, are computed by blocks of queries: `blocked_attention`.

    Args:
      q, k, v: `[..., Q, H, D]`, `[..., K, H, D]` and `[..., K, H, D]`, H being heads.
      mask: bool, to be broadcast to `[..., H, Q, K]`, False where q must not see k; or
        `Causal`.
      bias: likewise, added to the scores; or `RelativeBias`.

    Returns:
      `[..., Q, H · D]`.

    Example:
      >>> v = jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
      >>> print(attend(jnp.zeros((1, 1, 1, 1)), v, v))
      [[[3.]]]
    """
    long = is_long(q.shape[-3], k.shape[-3])
    if long or isinstance(mask, Causal) or isinstance(bias, RelativeBias):
        return attend_in_blocks(q, k, v, mask=mask, bias=bias)
    # Heads first, once for all products: einsum would copy k and v for each of them.
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (q, k, v))
    scores = masked(jnp.einsum("...qd,...kd->...qk", q, k), mask, bias)
    weights = softmax(scores).astype(v.dtype)
    mixed = jnp.moveaxis(jnp.einsum("...qk,...kd->...qd", weights, v), -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1)


def rematerialized(
    block: Any, x: jax.Array, mask: jax.Array | None, queries: int | None
) -> jax.Array:
    """`block(x, mask, queries)`, keeping only the input for backward passes.

    They repeat the block's forward pass: at most a fifth more matrix products in a
    linearised training step and a third more in an ordinary one, for a fraction of the
    memory.

    `nn.remat` alone does this on accelerators. On a CPU XLA finds that a block is
    computed twice from one input and keeps the first result after all, unless the
    second lies inside a conditional whose outcome it cannot know.

    Args:
      block: a bound module; its result is `x[:, :queries]` in shape and dtype.
      x: `[B, S, D]`. Where its first number is NaN, the whole result is.
      mask, queries: passed on.

    Returns:
      What `block` returns.
    """
    run = nn.remat(lambda block, x: block(x, mask, queries))

    def unreached(block, x):
        return jnp.full_like(x[:, :queries], jnp.nan)

    is_number = jax.lax.platform_dependent(
        x[(0,) * x.ndim],
        cpu=lambda first: first == first,
        default=lambda first: jnp.array(True),
    )
    return nn.cond(is_number, run, unreached, block, x)
