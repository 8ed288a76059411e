"""T5's encoder in Flax Linen, with the parameter names of Hugging Face checkpoints.

Raffel et al. Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer. JMLR 21(140), 2020. arXiv:1910.10683.

T5 v1.0 has the feed-forward layer "relu"; T5 v1.1 and FLAN-T5 have "gated-gelu"
(Shazeer. GLU Variants Improve Transformer. 2020. arXiv:2002.05202).

Shapes: B texts, S tokens, D = d_model, H heads.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxarith import hub
from jaxarith.models.layers import Dense, attend


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Names and defaults of Hugging Face's `T5Config`, which are those of T5-small."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "T5Config":
        """Reads the content of a Hugging Face `config.json` of a T5.

        Raises:
          ValueError: the file describes another kind of model, or a feed-forward layer
            that this port lacks.
        """
        if raw.get("model_type") != "t5":
            raise ValueError(
                f"config.json describes a {raw.get('model_type', 'model')!r}; expected "
                "a T5 with model_type 't5'. Use the model that belongs to it."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in raw.items() if key in known})
        if config.feed_forward_proj not in _ACTIVATIONS:
            raise ValueError(
                f"config.json asks for feed_forward_proj {config.feed_forward_proj!r}; "
                f"this port has {', '.join(_ACTIVATIONS)}."
            )
        return config


_ACTIVATIONS = {
    "relu": nn.relu,
    "gated-gelu": functools.partial(nn.gelu, approximate=True),
}

_by_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
Linear = functools.partial(Dense, use_bias=False, kernel_init=_by_fan_in)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    r"""Mean square 1 along the last axis: :math:`x/\sqrt{\overline{x^2} + ε}`.

    Zhang, Sennrich. Root Mean Square Layer Normalization. NeurIPS 2019.
    arXiv:1910.07467.

    The derivative is stated, with :math:`y` the result and means over the last axis:

    .. math:: \dot y = \frac{\dot x - y\,\overline{y\dot x}}{\sqrt{\overline{x^2} + ε}}

    so that transposing it keeps `y` and the root, and not every step on the way.

    Args:
      x: `[..., D]`.
      eps: added to the mean square.

    Returns:
      `[..., D]` in float32 or better.

    Example:
      >>> print(rms_normalize(jnp.array([4.0, 0.0, 0.0, 0.0]), 0.0).round(4))
      [2. 0. 0. 0.]
    """
    return _rms_normalize(x, eps)[0]


def _rms_normalize(x, eps):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
    return x * scale, scale


@rms_normalize.defjvp
def _rms_normalize_jvp(eps, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, scale = _rms_normalize(x, eps)
    dx = dx.astype(y.dtype)
    return y, scale * (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True))


class RMSNorm(nn.Module):
    """`rms_normalize`, then `weight`: Hugging Face's T5LayerNorm."""

    eps: float

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        weight = weight.reshape((1,) * (x.ndim - 1) + x.shape[-1:])
        return (rms_normalize(x, self.eps) * weight).astype(x.dtype)


def relative_position_bucket(position, num_buckets=32, max_distance=128) -> np.ndarray:
    """The row of the table of biases for a token at `position` from the one attending.

    Half of the buckets is for tokens behind, half for tokens ahead. Of either half, one
    half is for single distances and the other grows with their logarithm; its last
    bucket takes every distance from `max_distance` on.

    Args:
      position: integers of any shape, key minus query.
      num_buckets, max_distance: `relative_attention_…` of the config.

    Returns:
      int32 from 0 to `num_buckets` - 1, in the shape of `position`.

    Example:
      >>> print(relative_position_bucket([-200, -8, -1, 0, 1, 8, 200]))
      [15  8  1  0 17 24 31]
    """
    position = np.asarray(position)
    sided = num_buckets // 2
    single = sided // 2
    distance = np.abs(position)
    steps = np.log(np.maximum(distance, single) / single)
    steps *= (sided - single) / np.log(max_distance / single)
    # At a power such as 16 = 8 · 16^(2/8) a rounding must not give the bucket before.
    far = single + np.floor(steps + 1e-6)
    bucket = np.where(distance < single, distance, np.minimum(far, sided - 1))
    return (bucket + sided * (position > 0)).astype(np.int32)


class Attention(nn.Module):
    """Of `x[B, S, D]` to itself, and the bias `[1, H, S, S]` of the relative positions.

    The first block has the table of biases; the others are given what it returns.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x, mask, bias):
        c = self.config

        def project(role, init=_by_fan_in):
            width = c.num_heads * c.d_kv
            projected = Linear(width, kernel_init=init, name=role)(x)
            return projected.reshape(*x.shape[:-1], c.num_heads, c.d_kv)

        # T5 does not divide the scores by the root of d_kv. Its q starts smaller.
        small = nn.initializers.normal((c.d_model * c.d_kv) ** -0.5)
        q, k, v = project("q", small), project("k"), project("v")
        if bias is None:
            bias = self.relative_bias(x.shape[1])
        mixed = attend(q, k, v, mask=mask, bias=bias)
        return Linear(c.d_model, name="o")(mixed), bias

    def relative_bias(self, length):
        c = self.config
        at = np.arange(length)
        buckets = relative_position_bucket(
            at[None] - at[:, None],
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )
        table = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
            name="relative_attention_bias",
        )
        return table(buckets).transpose(2, 0, 1)[None]


class FeedForward(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        activation = _ACTIVATIONS[c.feed_forward_proj]
        if c.feed_forward_proj.startswith("gated"):
            hidden = activation(Linear(c.d_ff, name="wi_0")(x))
            hidden = hidden * Linear(c.d_ff, name="wi_1")(x)
        else:
            hidden = activation(Linear(c.d_ff, name="wi")(x))
        return Linear(c.d_model, name="wo")(hidden)


class SelfAttentionLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, mask, bias):
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        attention = Attention(self.config, name="SelfAttention")
        mixed, bias = attention(normed, mask, bias)
        return x + mixed, bias


class FeedForwardLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        return x + FeedForward(self.config, name="DenseReluDense")(normed)


class Layers(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, mask, bias):
        x, bias = SelfAttentionLayer(self.config, name="0")(x, mask, bias)
        return FeedForwardLayer(self.config, name="1")(x), bias


class Block(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, mask, bias):
        return Layers(self.config, name="layer")(x, mask, bias)


class Blocks(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, mask):
        bias = None
        for i in range(self.config.num_layers):
            x, bias = Block(self.config, name=str(i))(x, mask, bias)
        return x


class Stack(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, mask):
        x = Blocks(self.config, name="block")(x, mask)
        return RMSNorm(self.config.layer_norm_epsilon, name="final_layer_norm")(x)


class Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        c = self.config
        # A mask [B, 1] or [1, S] would be broadcast.
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)} for input_ids "
                f"of shape {list(input_ids.shape)}; expected the same shape [B, S]."
            )
        words = nn.Embed(
            c.vocab_size,
            c.d_model,
            embedding_init=nn.initializers.normal(1.0),
            name="shared",
        )
        mask = attention_mask[:, None, None] != 0
        return Stack(c, name="encoder")(words(input_ids), mask)


def encoder(config: T5Config):
    """`apply_fn(params, input_ids[B, S], attention_mask[B, S]) -> hidden[B, S, D]`.

    Tokens whose attention_mask is zero are padding, to which no token attends. Their
    own rows of the result mean nothing.
    """
    module = Encoder(config)

    def apply_fn(params, input_ids, attention_mask):
        return module.apply({"params": params}, input_ids, attention_mask)

    return apply_fn


def init(key: jax.Array, config: T5Config) -> dict:
    """Random parameters, to train an encoder from nothing."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Encoder(config).init(key, tokens, tokens)["params"]


def layout(config: T5Config) -> dict:
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint of this config must fill."""
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


class T5(NamedTuple):
    """A checkpoint in memory: its configuration, parameters and folder."""

    config: T5Config
    params: dict
    folder: Path


def load(model, *, revision: str | None = None) -> T5:
    """Loads an encoder in Hugging Face format, as a `T5EncoderModel` is saved.

    Args:
      model: a local folder or a hub id.
      revision: a branch, tag or commit on the hub.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: its files are broken, or are not those of a T5 encoder. The encoder
        of a whole T5 is read by `hub.load(folder, layout(config), select=".*")`.

    Example:
      >>> model = load("t5-encoder")  # doctest: +SKIP
      >>> hidden = encoder(model.config)(model.params, ids, mask)  # doctest: +SKIP
    """
    folder = hub.find(model, revision=revision)
    config = T5Config.from_json(hub.read_json(folder))
    return T5(config, hub.load(folder, layout(config)), folder)
