"""GPT-2 in Flax Linen, with the parameter names of Hugging Face checkpoints.

Radford et al. Language Models are Unsupervised Multitask Learners. OpenAI, 2019.

A parameter tree holds the leaves

    transformer/wte/embedding  transformer/wpe/embedding  transformer/h/<i>/…
    transformer/ln_f/{scale,bias}

and, for a classifier, `score/kernel`. The language model's head is `wte` transposed, so
it has no leaf of its own. There is no dropout.

Padding may be on either side, or on both. Positions count the real tokens, so a text
gives the same result wherever it is padded. transformers counts this way when it
generates; its plain forward pass counts columns, which differs for padding on the left.

Shapes: B texts, S tokens, D = n_embd, H heads, V tokens in the vocabulary.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxarith import hub
from jaxarith.models.activations import gelu_tanh
from jaxarith.models.blocked_attention import Mask, causal
from jaxarith.models.generate import Decoder
from jaxarith.models.layers import Dense, LayerNorm, attend, times_transposed
from jaxarith.typing import ApplyFn

# Path patterns for `tree.select`: the blocks, without embeddings, final norm and head;
# the weights of their linear layers.
BLOCKS = r"transformer/h/\d+/.*"
BLOCK_LINEAR_WEIGHTS = r"transformer/h/\d+/(attn|mlp)/c_\w+/kernel"


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Configuration; names and defaults (smallest GPT-2) follow Hugging Face's."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    num_labels: int = 2

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "GPT2Config":
        """Reads the content of a Hugging Face `config.json` of a GPT-2.

        Raises:
          ValueError: the file describes another kind of model, or a variant that this
            port lacks.
        """
        if raw.get("model_type") != "gpt2":
            raise ValueError(
                f"config.json describes a {raw.get('model_type', 'model')!r}; expected "
                "a GPT-2 with model_type 'gpt2'. Load it with the module for its type."
            )
        for name, value in _ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(
                    f"config.json has {name} {raw[name]!r}; this port of GPT-2 has "
                    f"only {value!r}."
                )
        known = {field.name for field in dataclasses.fields(cls)}
        stated = {key: value for key, value in raw.items() if key in known}
        if raw.get("id2label"):
            stated["num_labels"] = len(raw["id2label"])
        config = cls(**stated)
        if config.n_embd % config.n_head:
            raise ValueError(
                f"config.json has n_embd {config.n_embd} and n_head {config.n_head}; "
                "expected a width that is a multiple of n_head."
            )
        return config


_ONLY = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

KeysValues = tuple[jax.Array, jax.Array]  # of one block

_normal = nn.initializers.normal(0.02)
Embed = functools.partial(nn.Embed, embedding_init=_normal)


class Conv1D(nn.Module):
    """A linear layer whose kernel is `[out, in]`, as Hugging Face's Flax stores it."""

    out_first: ClassVar[bool] = True  # for `jaxarith.curvature`

    features: int
    kernel_init: Any = _normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return times_transposed(x, kernel) + bias


class Attention(nn.Module):
    """Attention of `x[B, S, D]` to itself, or to the cache after adding `x` to it.

    It also returns the cache: keys and values `[B, T, H, D/H]` of all tokens so far.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Mask, past: KeysValues | None, at: Any
    ) -> tuple[jax.Array, KeysValues]:
        c = self.config
        qkv = Conv1D(3 * c.n_embd, name="c_attn")(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, c.n_head, -1)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice(kept, new, (0, at, 0, 0))
                for kept, new in zip(past, (k, v), strict=True)
            )
        mixed = attend(q * q.shape[-1] ** -0.5, k, v, mask=mask)
        return Conv1D(c.n_embd, _residual(c), name="c_proj")(mixed), (k, v)


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        hidden = Conv1D(c.n_inner or 4 * c.n_embd, name="c_fc")(x)
        return Conv1D(c.n_embd, _residual(c), name="c_proj")(gelu_tanh(hidden))


def _residual(config):
    """Returns the initializer of a block's two layers that write to its stream."""
    return nn.initializers.normal(0.02 / (2 * config.n_layer) ** 0.5)


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Mask, past: KeysValues | None, at: Any
    ) -> tuple[jax.Array, KeysValues]:
        c = self.config
        normed = LayerNorm(c.layer_norm_epsilon, name="ln_1")(x)
        mixed, cache = Attention(c, name="attn")(normed, mask, past, at)
        x = x + mixed
        normed = LayerNorm(c.layer_norm_epsilon, name="ln_2")(x)
        return x + MLP(c, name="mlp")(normed), cache


class Blocks(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        past: list[KeysValues] | None,
        at: Any,
    ) -> tuple[jax.Array, list[KeysValues]]:
        caches = []
        for i in range(self.config.n_layer):
            kept = None if past is None else past[i]
            x, cache = Block(self.config, name=str(i))(x, mask, kept, at)
            caches.append(cache)
        return x, caches


class Transformer(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        mask: Mask,
        past: list[KeysValues] | None,
        at: Any,
    ) -> tuple[jax.Array, list[KeysValues]]:
        c = self.config
        x = Embed(c.vocab_size, c.n_embd, name="wte")(input_ids)
        x = x + Embed(c.n_positions, c.n_embd, name="wpe")(positions)
        x, caches = Blocks(c, name="h")(x, mask, past, at)
        return LayerNorm(c.layer_norm_epsilon, name="ln_f")(x), caches


class Model(nn.Module):
    """Returns hidden states `[B, S, D]` and the keys and values of each block.

    Args:
      input_ids: token ids, i32[B, S].
      positions: the rows of `wpe`, i32[B, S].
      mask: bool[B, 1, S, T], False where a token must not see another; T is S, or the
        length of the cache. For long texts, a `blocked_attention.Causal`.
      past: for each block, the keys and values into which new ones are written.
      at: the column where new ones are written.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        mask: Mask,
        past: list[KeysValues] | None = None,
        at: Any = 0,
    ) -> tuple[jax.Array, list[KeysValues]]:
        transformer = Transformer(self.config, name="transformer")
        return transformer(input_ids, positions, mask, past, at)


class Classifier(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        c = self.config
        inputs = input_ids, *_positions_and_mask(c, input_ids, attention_mask)
        hidden, _ = Transformer(c, name="transformer")(*inputs, None, 0)
        last = _last_real(hidden, attention_mask)
        score = Dense(c.num_labels, use_bias=False, kernel_init=_normal, name="score")
        return score(last)


def _positions_and_mask(config, input_ids, attention_mask):
    # A mask [B, 1] or [1, S] would be broadcast.
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} for input_ids of "
            f"shape {list(input_ids.shape)}; expected the same shape [B, S]."
        )
    _check_length(config, input_ids.shape[1], "the texts are")
    real = attention_mask != 0
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    return positions, causal(real[:, None, None])


def _check_length(config, length, what):
    if length > config.n_positions:
        raise ValueError(
            f"{what} {length} tokens long; this model has n_positions "
            f"{config.n_positions}. Shorten them."
        )


def _last_real(x, attention_mask):
    """Returns the rows `[B, D]` of `x[B, S, D]` at the last real tokens."""
    columns = jnp.arange(x.shape[1])[None]
    last = jnp.max(jnp.where(attention_mask != 0, columns, 0), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _logits(params, hidden):
    return times_transposed(hidden, params["transformer"]["wte"]["embedding"])


def encoder(config: GPT2Config) -> ApplyFn:
    """Makes a function that encodes texts.

    `apply_fn(params, input_ids[B, S], attention_mask[B, S]) -> hidden[B, S, D]` returns
    the hidden states after the final norm, `ln_f`. Tokens whose attention_mask is zero
    are padding; their own rows of the result are meaningless.
    """
    module = Model(config)

    def apply_fn(params, input_ids, attention_mask):
        inputs = input_ids, *_positions_and_mask(config, input_ids, attention_mask)
        return module.apply({"params": params}, *inputs)[0]

    return apply_fn


def language_model(config: GPT2Config) -> ApplyFn:
    """Makes a function that predicts next tokens.

    It is `apply_fn(params, input_ids[B, S], attention_mask[B, S]) -> logits[B, S, V]`.
    The logits at a token are for the next token.
    """
    hidden = encoder(config)

    def apply_fn(params, input_ids, attention_mask):
        return _logits(params, hidden(params, input_ids, attention_mask))

    return apply_fn


def classifier(config: GPT2Config) -> ApplyFn:
    """Makes `apply_fn(params, input_ids, attention_mask) -> logits[B, num_labels]`.

    The logits are read at the last token that attention_mask does not mark as padding.
    transformers reads them at the last token that is not `pad_token_id`, whatever the
    mask says. The two differ if a text ends with that token, for example if the same
    token ends texts and pads them.
    """
    module = Classifier(config)

    def apply_fn(params, input_ids, attention_mask):
        return module.apply({"params": params}, input_ids, attention_mask)

    return apply_fn


class Cache(NamedTuple):
    """The state that `decoder` keeps for T columns, which it has read or has room for.

    Attributes:
      blocks: for each block, keys and values `[B, T, H, D/H]`.
      real: bool[B, T], True for columns that hold a token.
      position: i32[B], the position of the next token.
      at: i32[], the column of the next token.
    """

    blocks: list[KeysValues]
    real: jax.Array
    position: jax.Array
    at: jax.Array


@functools.cache
def decoder(config: GPT2Config) -> Decoder:
    """Makes a `Decoder` for `generate`.

    Its prompt is `input_ids, attention_mask`, both `[B, S]`. Equal configurations share
    a decoder, so it is compiled once.

    Example:
      >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=5)
      >>> params = init(jax.random.key(0), config)
      >>> prompt = jnp.array([[0, 1], [3, 4]]), jnp.array([[0, 1], [1, 1]])
      >>> from jaxarith.models.generate import generate
      >>> generate(decoder(config), params, *prompt, max_new_tokens=3).shape
      (2, 3)
    """
    apply: ApplyFn = Model(config).apply

    def start(params, input_ids, attention_mask, room):
        inputs = input_ids, *_positions_and_mask(config, input_ids, attention_mask)
        _check_length(config, input_ids.shape[1] + room, "prompt and new tokens are")
        hidden, blocks = apply({"params": params}, *inputs)
        wide = [(0, 0), (0, room), (0, 0), (0, 0)]
        blocks = jax.tree.map(lambda kept: jnp.pad(kept, wide), blocks)
        real = jnp.pad(attention_mask != 0, wide[:2])
        count = jnp.sum(real, axis=1, dtype=jnp.int32)
        cache = Cache(blocks, real, count, jnp.int32(input_ids.shape[1]))
        return cache, _logits(params, _last_real(hidden, attention_mask))

    def step(params, cache, tokens):
        real = cache.real.at[:, cache.at].set(True)
        inputs = tokens[:, None], cache.position[:, None], real[:, None, None]
        hidden, blocks = apply({"params": params}, *inputs, cache.blocks, cache.at)
        cache = Cache(blocks, real, cache.position + 1, cache.at + 1)
        return cache, _logits(params, hidden[:, 0])

    return Decoder(start, step)


def init(key: jax.Array, config: GPT2Config, *, classifier: bool = False) -> dict:
    """Makes random parameters, to train a model from scratch.

    Args:
      key: key of the random numbers.
      config: configuration of the model.
      classifier: whether to include `score/kernel`.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    if classifier:
        return dict(Classifier(config).init(key, tokens, tokens)["params"])
    inputs = tokens, *_positions_and_mask(config, tokens, tokens)
    return dict(Model(config).init(key, *inputs)["params"])


def layout(config: GPT2Config, *, classifier: bool = False) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` that a checkpoint must fill."""
    of_config = functools.partial(init, config=config, classifier=classifier)
    return jax.eval_shape(of_config, jax.random.key(0))


class GPT2(NamedTuple):
    """A checkpoint in memory: its configuration, parameters and folder."""

    config: GPT2Config
    params: dict
    folder: Path


def load(model: str | os.PathLike, *, revision: str | None = None) -> GPT2:
    """Loads a GPT-2 in Hugging Face format.

    If `architectures` in `config.json` names `GPT2ForSequenceClassification`, the
    parameters include `score/kernel`. Any other checkpoint is a language model, even a
    `GPT2Model`, because the head is `wte`.

    Args:
      model: a local folder, or a hub id such as `openai-community/gpt2`.
      revision: a branch, tag or commit on the hub.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: its files are broken, or are not a GPT-2, or its head is not tied to
        `wte`.

    Example:
      >>> model = load("openai-community/gpt2")  # doctest: +SKIP
      >>> apply_fn = language_model(model.config)  # doctest: +SKIP
      >>> logits = apply_fn(model.params, ids, mask)  # doctest: +SKIP
    """
    folder = hub.find(model, revision=revision)
    raw = hub.read_json(folder)
    config = GPT2Config.from_json(raw)
    heads = raw.get("architectures") or []
    expected = layout(config, classifier="GPT2ForSequenceClassification" in heads)
    params = hub.load(
        folder,
        expected,
        # Buffers of the causal mask, which make up a tenth of the published files.
        ignore=r"h/\d+/attn/(bias|masked_bias)",
        copies={"lm_head/weight": "transformer/wte/embedding"},
    )
    return GPT2(config, params, folder)
