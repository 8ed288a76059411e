"""The networks of BERT and RoBERTa, with the parameter names of Hugging Face.

Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding. NAACL 2019. arXiv:1810.04805.
Liu et al. RoBERTa: A Robustly Optimized BERT Pretraining Approach. 2019.
arXiv:1907.11692.

Shapes: B texts, S tokens, D = hidden_size.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxarith.models.activations import gelu, gelu_tanh
from jaxarith.models.layers import Dense, LayerNorm, attend

Head = Literal["masked_lm", "classifier"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Configuration; names and defaults (BERT-base) follow Hugging Face's `BertConfig`.

    `model_type` is "bert" or "roberta".
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int = 2

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "BertConfig":
        """Reads the content of a Hugging Face `config.json` of a BERT or RoBERTa.

        Raises:
          ValueError: the file describes another kind of model, a decoder, or
            activations or positions that this port lacks.
        """
        kind = raw.get("model_type")
        if kind not in _DEFAULTS:
            raise ValueError(
                f"config.json describes a {kind or 'model'!r}; expected a BERT or "
                "RoBERTa with model_type 'bert' or 'roberta'. Load it with the module "
                "for its type."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        stated = {key: raw[key] for key in known & raw.keys() if raw[key] is not None}
        if raw.get("id2label"):
            stated["num_labels"] = len(raw["id2label"])
        config = cls(**{**_DEFAULTS[kind], **stated})
        if config.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"config.json asks for the activation {config.hidden_act!r}; this port "
                f"has {', '.join(_ACTIVATIONS)}."
            )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"config.json has hidden_size {config.hidden_size} and "
                f"{config.num_attention_heads} heads; expected a width that is a "
                "multiple of the number of heads."
            )
        positions = raw.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(
                f"config.json asks for position_embedding_type {positions!r}; this "
                "port has absolute positions only."
            )
        if raw.get("is_decoder"):
            raise ValueError(
                "config.json asks for is_decoder: causal attention. This port has only "
                "encoders."
            )
        return config

    @property
    def max_length(self) -> int:
        """The largest number of tokens in a text.

        RoBERTa's positions start after its padding id.
        """
        first = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - first


# The defaults in which Hugging Face's RobertaConfig differs.
_DEFAULTS = {"bert": {}, "roberta": {"vocab_size": 50265, "pad_token_id": 1}}

_ACTIVATIONS = {"gelu": gelu, "gelu_new": gelu_tanh, "relu": nn.relu}


def _dense(config, features, name):
    normal = nn.initializers.normal(config.initializer_range)
    return Dense(features, kernel_init=normal, name=name)


class Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        c = self.config

        def embed(count, name):
            normal = nn.initializers.normal(c.initializer_range)
            return nn.Embed(count, c.hidden_size, embedding_init=normal, name=name)

        x = embed(c.vocab_size, "word_embeddings")(input_ids)
        positions = embed(c.max_position_embeddings, "position_embeddings")
        x = x + positions(_positions(c, input_ids))
        x = x + embed(c.type_vocab_size, "token_type_embeddings")(token_type_ids)
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)


def _positions(config, input_ids):
    length = input_ids.shape[1]
    if length > config.max_length:
        raise ValueError(
            f"the texts have {length} tokens; this model takes at most "
            f"{config.max_length}. Truncate them."
        )
    if config.model_type == "bert":
        return jnp.arange(length)[None]
    # RoBERTa counts the tokens that are not padding. Padding has its id as position.
    real = input_ids != config.pad_token_id
    return jnp.where(real, jnp.cumsum(real, axis=1), 0) + config.pad_token_id


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config

        def project(name):
            projected = _dense(c, c.hidden_size, name)(x)
            return projected.reshape(*x.shape[:-1], c.num_attention_heads, -1)

        q, k, v = project("query"), project("key"), project("value")
        return attend(q * q.shape[-1] ** -0.5, k, v, mask=mask)


class Output(nn.Module):
    """The end of both halves of a block: a matrix, the sum with `x`, and a norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, x: jax.Array) -> jax.Array:
        x = x + _dense(self.config, x.shape[-1], "dense")(hidden)
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        mixed = SelfAttention(self.config, name="self")(x, mask)
        return Output(self.config, name="output")(mixed, x)


class Intermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        return _ACTIVATIONS[c.hidden_act](_dense(c, c.intermediate_size, "dense")(x))


class Block(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Attention(self.config, name="attention")(x, mask)
        hidden = Intermediate(self.config, name="intermediate")(x)
        return Output(self.config, name="output")(hidden, x)


class Blocks(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = Block(self.config, name=str(i))(x, mask)
        return x


class Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return Blocks(self.config, name="layer")(x, mask)


class Pooler(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        first = hidden[:, 0]
        return jnp.tanh(_dense(self.config, first.shape[-1], "dense")(first))


class Base(nn.Module):
    """Returns hidden states `[B, S, D]` and, with a pooler, pooled states `[B, D]`."""

    config: BertConfig
    pooler: bool

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        # A mask [B, 1] or [1, S] would be broadcast.
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, array in inputs.items():
            if array.shape != input_ids.shape:
                raise ValueError(
                    f"{name} of shape {list(array.shape)} for input_ids of shape "
                    f"{list(input_ids.shape)}; expected the same shape [B, S]."
                )
        x = Embeddings(self.config, name="embeddings")(input_ids, token_type_ids)
        mask = attention_mask[:, None, None] != 0
        hidden = Encoder(self.config, name="encoder")(x, mask)
        pooled = Pooler(self.config, name="pooler")(hidden) if self.pooler else None
        return hidden, pooled


class Transform(nn.Module):
    """The layers of BERT's masked-LM head before the word embeddings."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        hidden = _ACTIVATIONS[c.hidden_act](_dense(c, c.hidden_size, "dense")(hidden))
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(hidden)


class Predictions(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))
        return Transform(self.config, name="transform")(hidden), bias


class BertLMHead(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return Predictions(self.config, name="predictions")(hidden)


class RobertaLMHead(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        hidden = gelu(_dense(c, c.hidden_size, "dense")(hidden))  # ignores hidden_act
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(hidden), bias


class RobertaClassifier(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        first = jnp.tanh(_dense(c, c.hidden_size, "dense")(hidden[:, 0]))
        return _dense(c, c.num_labels, "out_proj")(first)


class Model(nn.Module):
    """The base and at most one head; without a head, it returns the hidden states.

    The masked-LM head does not apply the word embeddings. It returns the vectors to
    multiply with them, and the bias.
    """

    config: BertConfig
    head: Head | None = None
    pooler: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        at: jax.Array | None = None,
    ) -> Any:
        c = self.config
        is_bert = c.model_type == "bert"
        pooler = self.pooler or (self.head == "classifier" and is_bert)
        base = Base(c, pooler, name=c.model_type)
        hidden, pooled = base(input_ids, attention_mask, token_type_ids)
        if at is not None:
            hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        if self.head is None:
            return hidden
        if self.head == "masked_lm":
            if is_bert:
                return BertLMHead(c, name="cls")(hidden)
            return RobertaLMHead(c, name="lm_head")(hidden)
        if is_bert:
            return _dense(c, c.num_labels, "classifier")(pooled)
        return RobertaClassifier(c, name="classifier")(hidden)
