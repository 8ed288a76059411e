"""BERT and RoBERTa in Flax Linen, with the parameter names of Hugging Face checkpoints.

Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding. NAACL 2019. arXiv:1810.04805.
Liu et al. RoBERTa: A Robustly Optimized BERT Pretraining Approach. 2019.
arXiv:1907.11692.

A parameter tree holds the base under `bert` or `roberta`, and it may hold heads:

    masked LM     cls/predictions/…                 lm_head/…
    classifier    bert/pooler/…  classifier/…       classifier/{dense,out_proj}/…

The output matrix of the masked LM is the table of word embeddings, held once. Each
function here reads only its own leaves of a tree that may hold more.

Shapes: B texts, S tokens, D = hidden_size, V = vocab_size.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxarith import hub
from jaxarith.models.layers import Dense, LayerNorm, attend
from jaxarith.typing import ApplyFn, Params

Head = Literal["masked_lm", "classifier"]

# Path patterns for `tree.select`: the blocks, which are what prompt-based fine-tuning
# trains between frozen embeddings and a frozen LM head (Zeng et al. 2025; He et al.
# 2025); their matrices; and those of their attention.
BLOCKS = r"(bert|roberta)/encoder/layer/.*"
BLOCK_LINEAR_WEIGHTS = r"(bert|roberta)/encoder/layer/.*/kernel"
ATTENTION_WEIGHTS = r"(bert|roberta)/encoder/layer/\d+/attention/.*/kernel"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Names and defaults of Hugging Face's `BertConfig`, which are those of BERT-base.

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
                "RoBERTa with model_type 'bert' or 'roberta'. Use the model that "
                "belongs to it."
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
                f"{config.num_attention_heads} heads; expected a width that the heads "
                "can share."
            )
        positions = raw.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(
                f"config.json asks for position_embedding_type {positions!r}; this "
                "port has absolute."
            )
        if raw.get("is_decoder"):
            raise ValueError(
                "config.json asks for is_decoder: causal attention, which this port "
                "of the encoders lacks."
            )
        return config

    @property
    def max_length(self) -> int:
        """The most tokens of a text. RoBERTa's positions start after its padding id."""
        first = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - first


# Where Hugging Face's RobertaConfig differs.
_DEFAULTS = {"bert": {}, "roberta": {"vocab_size": 50265, "pad_token_id": 1}}

_gelu = functools.partial(nn.gelu, approximate=False)
_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


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
            f"texts of {length} tokens; this model takes at most {config.max_length}. "
            "Truncate them."
        )
    if config.model_type == "bert":
        return jnp.arange(length)[None]
    # RoBERTa counts the tokens that are not padding, whose position is its own id.
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
    """What ends both halves of a block: a matrix, the sum with `x`, and a norm."""

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
    """The hidden states `[B, S, D]` and, of a base with a pooler, `[B, D]`."""

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
    """What the masked-LM head of a BERT does before the word embeddings."""

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
        hidden = _gelu(_dense(c, c.hidden_size, "dense")(hidden))  # whatever hidden_act
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(hidden), bias


class RobertaClassifier(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        first = jnp.tanh(_dense(c, c.hidden_size, "dense")(hidden[:, 0]))
        return _dense(c, c.num_labels, "out_proj")(first)


class Model(nn.Module):
    """The base and at most one head; without one the hidden states are the result.

    The masked-LM head gives the factors of its logits but for the word embeddings:
    what multiplies them, and the bias.
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


def encoder(config: BertConfig) -> ApplyFn:
    """`apply_fn(params, input_ids, attention_mask, token_type_ids=None) -> hidden`.

    The inputs are `[B, S]`, the hidden states of the last block `[B, S, D]`. Tokens
    whose attention_mask is zero are padding, to which no token attends. Their own rows
    of the result mean nothing. The token types are zero where they are not given.

    Raises:
      ValueError: the inputs are of unlike shapes, or longer than the model's positions.
    """
    module = Model(config)

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        inputs = input_ids, attention_mask, token_type_ids
        return module.apply({"params": params}, *inputs)

    return apply_fn


def mean_encoder(config: BertConfig) -> ApplyFn:
    """Like `encoder`, the mean `[B, D]` over the tokens that are not padding.

    After normalisation these are the sentence embeddings of the sentence-transformers
    (Reimers, Gurevych. Sentence-BERT. EMNLP 2019. arXiv:1908.10084). A text that is all
    padding gives zeros.
    """
    encode = encoder(config)

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        hidden = encode(params, input_ids, attention_mask, token_type_ids)
        real = attention_mask[..., None] != 0
        count = jnp.maximum(real.sum(axis=1), 1)
        return jnp.where(real, hidden, 0).sum(axis=1) / count.astype(hidden.dtype)

    return apply_fn


def mask_encoder(config: BertConfig, mask_token_id: int) -> ApplyFn:
    """Like `encoder`, what the masked LM makes of the first mask token, `[B, D]`.

    It is the hidden state there after the dense layer, activation and norm of the head:
    with the word embeddings and the bias of a label word it gives that word's logit. A
    text without the token, such as a row of padding, gives what its first token gives.

    Schick, Schütze. Exploiting Cloze-Questions for Few-Shot Text Classification. EACL
    2021. arXiv:2001.07676.
    """
    module = Model(config, "masked_lm")

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        at = jnp.argmax(input_ids == mask_token_id, axis=1)
        inputs = input_ids, attention_mask, token_type_ids, at
        return module.apply({"params": params}, *inputs)[0]

    return apply_fn


def masked_lm(config: BertConfig) -> ApplyFn:
    """Like `encoder`, the logits `[B, S, V]` of the words at every token."""
    apply: ApplyFn = Model(config, "masked_lm").apply

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        inputs = input_ids, attention_mask, token_type_ids
        hidden, bias = apply({"params": params}, *inputs)
        return hidden @ output_words(config, params)[0].T + bias[None, None]

    return apply_fn


def output_words(config: BertConfig, params: Params) -> tuple[jax.Array, jax.Array]:
    """The matrix `[V, D]` and the bias `[V]` of the masked LM's logits."""
    words = params[config.model_type]["embeddings"]["word_embeddings"]["embedding"]
    head = params["cls"]["predictions"] if "cls" in params else params["lm_head"]
    return words, head["bias"]


def classifier(config: BertConfig) -> ApplyFn:
    """Like `encoder`, the logits `[B, num_labels]` of the classes of a text."""
    module = Model(config, "classifier")

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        inputs = input_ids, attention_mask, token_type_ids
        return module.apply({"params": params}, *inputs)

    return apply_fn


def init(
    key: jax.Array,
    config: BertConfig,
    head: Head | None = None,
    *,
    pooler: bool = False,
) -> dict:
    """Random parameters, to train a model from nothing or a head on another's base.

    Args:
      key: key of the random numbers.
      config: configuration of the model.
      head: "masked_lm", "classifier" or None.
      pooler: whether the base has one; a BERT with a classifier always has.

    Raises:
      ValueError: there is no such head.
    """
    if head not in (None, *get_args(Head)):
        known = " or ".join(get_args(Head))
        raise ValueError(f"head {head!r}; expected None, {known}.")
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(Model(config, head, pooler).init(key, tokens, tokens)["params"])


def layout(
    config: BertConfig, head: Head | None = None, *, pooler: bool = False
) -> dict:
    """The tree of `jax.ShapeDtypeStruct` of what `init` gives."""
    make = functools.partial(init, config=config, head=head, pooler=pooler)
    return jax.eval_shape(make, jax.random.key(0))


# The head of a checkpoint, by what ends the name of its class in transformers.
_HEADS: dict[Head, tuple[str, ...]] = {
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
    "classifier": ("ForSequenceClassification",),
}

# Tensors of the output layer that many files hold besides those that they are tied to.
_COPIES = {
    "cls/predictions/decoder/weight": "bert/embeddings/word_embeddings/embedding",
    "cls/predictions/decoder/bias": "cls/predictions/bias",
    "lm_head/decoder/weight": "roberta/embeddings/word_embeddings/embedding",
    "lm_head/decoder/bias": "lm_head/bias",
}


class Bert(NamedTuple):
    """A checkpoint in memory: its configuration, parameters and folder."""

    config: BertConfig
    params: dict
    folder: Path


def load(
    model: str | os.PathLike,
    *,
    head: Head | Literal["stated"] | None = "stated",
    revision: str | None = None,
) -> Bert:
    """Loads a BERT or RoBERTa in Hugging Face format.

    Heads that are not asked for are left out. A pooler is kept where there is one.

    Args:
      model: a local folder, or a hub id such as `FacebookAI/roberta-base`.
      head: "masked_lm", "classifier" or None, for the base alone; by default the one
        of the class that config.json states, and None for classes with other heads.
      revision: a branch, tag or commit on the hub.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: its files are broken, are not those of a BERT or RoBERTa, or lack the
        head.

    Example:
      >>> model = load("bert-base-uncased", head=None)  # doctest: +SKIP
      >>> encode = mean_encoder(model.config)  # doctest: +SKIP
      >>> features = encode(model.params, ids, mask)  # doctest: +SKIP
    """
    folder = hub.find(model, revision=revision)
    raw = hub.read_json(folder)
    config = BertConfig.from_json(raw)
    chosen = _stated_head(raw) if head == "stated" else head
    names = hub.names(folder)
    pooler = any(re.fullmatch(r"(.*/)?pooler/dense/\w+", name) for name in names)
    expected = layout(config, chosen, pooler=pooler)
    lacking = expected.keys() - {config.model_type, *(n.split("/")[0] for n in names)}
    if lacking:
        raise ValueError(
            f"{folder} has no {chosen} head: no tensor under {', '.join(lacking)}. "
            "Load it with head=None, and take the head from another checkpoint or "
            "`init`."
        )
    heads = "|".join({"cls", "lm_head", "classifier", "qa_outputs"} - expected.keys())
    params = hub.load(
        folder,
        expected,
        ignore=rf"({heads})/.*|cls/seq_relationship/.*|embeddings/token_type_ids",
        copies=_COPIES if chosen == "masked_lm" else None,
    )
    return Bert(config, params, folder)


def _stated_head(raw) -> Head | None:
    [name, *_] = raw.get("architectures") or [""]
    return next((head for head, ends in _HEADS.items() if name.endswith(ends)), None)
