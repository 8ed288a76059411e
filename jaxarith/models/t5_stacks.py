"""T5's two stacks of blocks, with the parameter names of Hugging Face checkpoints.

Raffel et al. Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer. JMLR 21(140), 2020. arXiv:1910.10683.

T5 v1.0 has the feed-forward layer "relu"; T5 v1.1 and FLAN-T5 have "gated-gelu"
(Shazeer. GLU Variants Improve Transformer. 2020. arXiv:2002.05202).

Shapes: B texts, S tokens, D = d_model, H heads; Q tokens attend to K tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numpy.typing import ArrayLike

from jaxarith.models.activations import gelu_tanh
from jaxarith.models.blocked_attention import Bias, Mask, RelativeBias, is_long
from jaxarith.models.layers import Dense, attend

KeysValues = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Configuration; names and defaults (T5-small) follow Hugging Face's `T5Config`.

    Attributes:
      num_decoder_layers: number of decoder blocks; None for as many as the encoder has.
      tie_word_embeddings: whether the head is `shared` instead of `lm_head`.
      scale_decoder_outputs: whether the head's input is multiplied by d_model^-1/2.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "T5Config":
        """Reads the content of a Hugging Face `config.json` of a T5.

        The file does not decide whether the head is tied: transformers 5 writes
        `tie_word_embeddings: true` for every T5, so `load` looks at the weights.

        Raises:
          ValueError: the file describes another kind of model, or a feed-forward layer
            that this port lacks.
        """
        if raw.get("model_type") != "t5":
            raise ValueError(
                f"config.json describes a {raw.get('model_type', 'model')!r}; expected "
                "a T5 with model_type 't5'. Load it with the module for its type."
            )
        # Before transformers 5, the flag for tying also said whether to scale.
        raw = {"scale_decoder_outputs": raw.get("tie_word_embeddings"), **raw}
        known = {field.name for field in dataclasses.fields(cls)}
        stated = {key: raw[key] for key in known & raw.keys() if raw[key] is not None}
        config = cls(**stated)
        if config.feed_forward_proj not in _ACTIVATIONS:
            raise ValueError(
                f"config.json asks for feed_forward_proj {config.feed_forward_proj!r}; "
                f"this port has {', '.join(_ACTIVATIONS)}."
            )
        return config


_ACTIVATIONS = {
    "relu": nn.relu,
    "gated-gelu": gelu_tanh,
}


_by_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
Linear = functools.partial(Dense, use_bias=False, kernel_init=_by_fan_in)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    r"""Scales the last axis to mean square 1: :math:`x/\sqrt{\overline{x^2} + ε}`.

    Zhang, Sennrich. Root Mean Square Layer Normalization. NeurIPS 2019.
    arXiv:1910.07467.

    The derivative is defined explicitly. With :math:`y` the result, and means over the
    last axis, it is

    .. math:: \dot y = \frac{\dot x - y\,\overline{y\dot x}}{\sqrt{\overline{x^2} + ε}}

    so its transpose keeps only `y` and the root, not every intermediate value.

    Args:
      x: array `[..., D]`.
      eps: number added to the mean square.

    Returns:
      An array `[..., D]` in float32 or better.

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
    """`rms_normalize`, then a product with `weight`: Hugging Face's T5LayerNorm."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        weight = weight.reshape((1,) * (x.ndim - 1) + x.shape[-1:])
        return (rms_normalize(x, self.eps) * weight).astype(x.dtype)


def relative_position_bucket(
    position: ArrayLike,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> np.ndarray:
    """Returns the row of the bias table for a key at `position` relative to its query.

    Half of the buckets are for tokens behind, half for tokens ahead. If tokens ahead
    are not seen, all buckets are for tokens behind. On each side, one half of the
    buckets hold a single distance each, and the other half grow with the logarithm of
    the distance. The last bucket takes every distance from `max_distance` on.

    Args:
      position: integers of any shape, key minus query.
      num_buckets, max_distance: options `relative_attention_…` of the config.
      bidirectional: whether tokens ahead are seen; False in the decoder, where they
        share the bucket of distance 0.

    Returns:
      int32 from 0 to `num_buckets` - 1, in the shape of `position`.

    Example:
      >>> print(relative_position_bucket([-200, -8, -1, 0, 1, 8, 200]))
      [15  8  1  0 17 24 31]
      >>> print(relative_position_bucket([-200, -16, -1, 0, 1], bidirectional=False))
      [31 16  1  0  0]
    """
    offset = np.asarray(position)
    sided = num_buckets // 2 if bidirectional else num_buckets
    single = sided // 2
    distance = np.abs(offset) if bidirectional else np.maximum(-offset, 0)
    steps = np.log(np.maximum(distance, single) / single)
    steps *= (sided - single) / np.log(max_distance / single)
    # At a power such as 16 = 8 · 16^(2/8), rounding must not give the previous bucket.
    far = single + np.floor(steps + 1e-6)
    bucket = np.where(distance < single, distance, np.minimum(far, sided - 1))
    ahead = sided * (offset > 0) if bidirectional else 0
    return (bucket + ahead).astype(np.int32)


class Attention(nn.Module):
    """Attention of tokens `x[B, Q, D]` to keys and values `[B, K, H, d_kv]`.

    The method `keys_values` makes them from the tokens that are attended to.
    """

    config: T5Config
    bidirectional: bool = True

    def setup(self) -> None:
        c = self.config
        width = c.num_heads * c.d_kv
        # T5 does not divide the scores by the root of d_kv. Instead, q starts smaller.
        small = nn.initializers.normal((c.d_model * c.d_kv) ** -0.5)
        self.q = Linear(width, kernel_init=small)
        self.k = Linear(width)
        self.v = Linear(width)
        self.o = Linear(c.d_model)
        # Only the first block of a stack calls this, so only it has the parameter.
        self.relative_attention_bias = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
        )

    def __call__(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        mask: Mask | None,
        bias: Bias | None = None,
    ) -> jax.Array:
        q = self._heads(self.q(x))
        k, v = keys_values
        return self.o(attend(q, k, v, mask=mask, bias=bias))

    def keys_values(self, x: jax.Array) -> KeysValues:
        return self._heads(self.k(x)), self._heads(self.v(x))

    def _heads(self, projected):
        c = self.config
        return projected.reshape(*projected.shape[:-1], c.num_heads, c.d_kv)

    def relative_bias(self, length: int, at: jax.Array | None = None) -> Bias:
        """Returns `[1, H, length, length]`, or `[1, H, 1, length]` for the token `at`.

        For a long text, it returns only the diagonals: each block of queries makes its
        own rows.
        """
        if at is None and is_long(length, length):
            diagonals = self._buckets(np.arange(1 - length, length))
            return RelativeBias(self.relative_attention_bias(diagonals).T[None])
        tokens = np.arange(length)
        buckets = self._buckets(tokens[None] - tokens[:, None])
        if at is not None:
            buckets = jnp.asarray(buckets)[at][None]
        return self.relative_attention_bias(buckets).transpose(2, 0, 1)[None]

    def _buckets(self, position):
        return relative_position_bucket(
            position,
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            self.bidirectional,
        )


class Texts(NamedTuple):
    """The encoded texts: hidden states `[B, S, D]`, and their mask, bool[B, 1, 1, S].

    The hidden states are None once `Past` keeps their keys and values.
    """

    hidden: Any
    mask: jax.Array


class Past(NamedTuple):
    """A block's keys and values: of its own earlier tokens, and of the texts."""

    own: KeysValues | None = None
    texts: KeysValues | None = None


class FeedForward(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        activation = _ACTIVATIONS[c.feed_forward_proj]
        if c.feed_forward_proj.startswith("gated"):
            hidden = activation(Linear(c.d_ff, name="wi_0")(x))
            hidden = hidden * Linear(c.d_ff, name="wi_1")(x)
        else:
            hidden = activation(Linear(c.d_ff, name="wi")(x))
        return Linear(c.d_model, name="wo")(hidden)


class SelfAttentionLayer(nn.Module):
    """Returns `x`, the bias `[1, H, Q, K]` of relative positions, and keys and values.

    Only the first block has the table of biases; the others get the bias that it
    returns. With `past`, `x[B, 1, D]` is the token `at`, and its key and value are
    written there.
    """

    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask | None,
        bias: Bias | None,
        past: KeysValues | None,
        at: Any,
    ) -> tuple[jax.Array, Bias, KeysValues]:
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        attention = Attention(self.config, not self.decoder, name="SelfAttention")
        keys, values = attention.keys_values(normed)
        if past is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
                for old, new in zip(past, (keys, values), strict=True)
            )
        if bias is None:
            bias = attention.relative_bias(keys.shape[1], at)
        mixed = attention(normed, (keys, values), mask, bias)
        return x + mixed, bias, (keys, values)


class CrossAttentionLayer(nn.Module):
    """Returns `x[n·B, T, D]`, n sequences per text, and the texts' keys and values."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: jax.Array, texts: Texts, past: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        attention = Attention(self.config, name="EncDecAttention")
        keys_values = attention.keys_values(texts.hidden) if past is None else past
        # All sequences of a text attend to it as one, so nothing is repeated.
        normed = normed.reshape(len(texts.mask), -1, x.shape[-1])
        mixed = attention(normed, keys_values, texts.mask)
        return x + mixed.reshape(x.shape), keys_values


class FeedForwardLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        return x + FeedForward(self.config, name="DenseReluDense")(normed)


class Layers(nn.Module):
    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask | None,
        bias: Bias | None,
        texts: Any,
        past: Past,
        at: Any,
    ) -> tuple[jax.Array, Bias, Past]:
        c = self.config
        attention = SelfAttentionLayer(c, self.decoder, name="0")
        x, bias, own = attention(x, mask, bias, past.own, at)
        if not self.decoder:
            return FeedForwardLayer(c, name="1")(x), bias, Past()
        x, of_texts = CrossAttentionLayer(c, name="1")(x, texts, past.texts)
        return FeedForwardLayer(c, name="2")(x), bias, Past(own, of_texts)


class Block(nn.Module):
    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask | None,
        bias: Bias | None,
        texts: Any,
        past: Past,
        at: Any,
    ) -> tuple[jax.Array, Bias, Past]:
        layers = Layers(self.config, self.decoder, name="layer")
        return layers(x, mask, bias, texts, past, at)


class Blocks(nn.Module):
    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask | None,
        texts: Texts | None,
        pasts: Sequence[Past] | None,
        at: Any,
    ) -> tuple[jax.Array, tuple[Past, ...]]:
        c = self.config
        count = c.num_layers
        if self.decoder and c.num_decoder_layers is not None:
            count = c.num_decoder_layers
        kept = [Past()] * count if pasts is None else list(pasts)
        bias = None
        for i in range(count):
            block = Block(c, self.decoder, name=str(i))
            x, bias, kept[i] = block(x, mask, bias, texts, kept[i], at)
        return x, tuple(kept)


class Stack(nn.Module):
    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask | None,
        texts: Texts | None = None,
        pasts: Sequence[Past] | None = None,
        at: Any = None,
    ) -> tuple[jax.Array, tuple[Past, ...]]:
        blocks = Blocks(self.config, self.decoder, name="block")
        x, pasts = blocks(x, mask, texts, pasts, at)
        norm = RMSNorm(self.config.layer_norm_epsilon, name="final_layer_norm")
        return norm(x), pasts
