"""T5 in Flax Linen, with the parameter names of Hugging Face checkpoints.

Raffel et al. Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer. JMLR 21(140), 2020. arXiv:1910.10683.

The head of T5 v1.0 is the scaled word embeddings; T5 v1.1 and FLAN-T5 have a separate
head. A parameter tree holds

    shared/embedding  {encoder,decoder}/block/<i>/…  {encoder,decoder}/final_layer_norm
    lm_head/kernel  (unless the head is tied to `shared`)

Shapes: B texts of S tokens, T decoder tokens, D = d_model, H heads, V tokens in the
vocabulary.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxarith import hub, tree
from jaxarith.losses import IGNORED
from jaxarith.models.blocked_attention import causal
from jaxarith.models.generate import Decoder
from jaxarith.models.layers import times_transposed
from jaxarith.models.t5_stacks import Linear, Past, Stack, T5Config, Texts
from jaxarith.typing import ApplyFn, Array

# Path patterns for `tree.select`: all leaves that the encoder reads; the blocks of both
# stacks, without embeddings, final norms and head; the weights of their attention,
# including attention to the texts; all their linear weights.
ENCODER = r"shared/.*|encoder/.*"
BLOCKS = r"(encoder|decoder)/block/.*"
ATTENTION_WEIGHTS = r"(encoder|decoder)/block/\d+/layer/\d/\w+Attention/[qkvo]/kernel"
BLOCK_LINEAR_WEIGHTS = r"(encoder|decoder)/block/\d+/layer/\d/\w+/\w+/kernel"


class Transformer(nn.Module):
    """The word embeddings, the encoder, the decoder, and the head."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        spread = nn.initializers.normal(1.0)
        self.shared = nn.Embed(c.vocab_size, c.d_model, embedding_init=spread)
        self.encoder = Stack(c, decoder=False)
        self.decoder = Stack(c, decoder=True)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, kernel_init=spread)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_mask: jax.Array | None,
    ) -> jax.Array:
        hidden = self.hidden(input_ids, attention_mask, decoder_input_ids, decoder_mask)
        return self.head(hidden)

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_mask: jax.Array | None,
    ) -> jax.Array:
        texts = self.encode(input_ids, attention_mask)
        _check_targets(decoder_input_ids, decoder_mask, len(input_ids))
        length = decoder_input_ids.shape[-1]
        real = jnp.ones((1, 1, 1, length), bool)
        if decoder_mask is not None:
            real = decoder_mask.reshape(-1, 1, 1, length) != 0
        x = self.shared(decoder_input_ids.reshape(-1, length))
        x, _ = self.decoder(x, causal(real), texts)
        return x.reshape(*decoder_input_ids.shape, -1)

    def encode(self, input_ids: jax.Array, attention_mask: jax.Array) -> Texts:
        # A mask [B, 1] or [1, S] would be broadcast.
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)} for input_ids "
                f"of shape {list(input_ids.shape)}; expected the same shape [B, S]."
            )
        mask = attention_mask[:, None, None] != 0
        hidden, _ = self.encoder(self.shared(input_ids), mask)
        return Texts(hidden, mask)

    def start(
        self, input_ids: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, tuple[Past, ...], jax.Array]:
        """Returns the logits after the start token, the blocks' caches, and a mask."""
        texts = self.encode(input_ids, attention_mask)
        tokens = jnp.full((len(input_ids), 1), self.config.decoder_start_token_id)
        x, pasts = self.decoder(self.shared(tokens), None, texts)
        return self.head(x[:, 0]), pasts, texts.mask

    def step(
        self, tokens: jax.Array, mask: jax.Array, pasts: Any, at: jax.Array
    ) -> tuple[jax.Array, tuple[Past, ...]]:
        """Returns the logits after the tokens in column `at`, and the new caches."""
        length = pasts[0].own[0].shape[1]
        seen = (jnp.arange(length) <= at)[None, None, None]
        x = self.shared(tokens[:, None])
        x, pasts = self.decoder(x, seen, Texts(None, mask), pasts, at)
        return self.head(x[:, 0]), pasts

    def head(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        if c.scale_decoder_outputs:
            hidden = hidden * c.d_model**-0.5
        if not c.tie_word_embeddings:
            return self.lm_head(hidden)
        return times_transposed(hidden, self.shared.embedding)


def _check_targets(decoder_input_ids, decoder_mask, batch):
    shape = list(decoder_input_ids.shape)
    if len(shape) not in (2, 3) or shape[0] != batch:
        raise ValueError(
            f"decoder_input_ids of shape {shape} for {batch} texts; expected "
            f"[{batch}, T], or [{batch}, C, T] for C sequences per text."
        )
    if decoder_mask is not None and list(decoder_mask.shape) != shape:
        raise ValueError(
            f"decoder_attention_mask of shape {list(decoder_mask.shape)} for "
            f"decoder_input_ids of shape {shape}; expected the same shape."
        )


def encoder(config: T5Config) -> ApplyFn:
    """Makes a function that encodes texts.

    It is `apply_fn(params, input_ids[B, S], attention_mask[B, S]) -> hidden[B, S, D]`.
    Tokens whose attention_mask is zero are padding: no token attends to them, and their
    own rows of the result are meaningless.
    """
    encode = _method(config, "encode")

    def apply_fn(params, input_ids, attention_mask):
        return encode(params, input_ids, attention_mask).hidden

    return apply_fn


def language_model(config: T5Config) -> ApplyFn:
    """Makes `apply_fn(params, input_ids, attention_mask, decoder_input_ids) -> logits`.

    The logits `[B, T, V]` at a token of `decoder_input_ids[B, T]` are for the next
    token, so `decoder_input_ids` are a start token followed by the labels; see
    `shift_right`. A mask of their shape may follow as another argument. Padding after a
    sequence needs no mask, since no token looks ahead.

    With `decoder_input_ids[B, C, T]`, C sequences per text, every text is encoded once,
    and the logits are `[B, C, T, V]`.
    """
    return _with_targets(config, "__call__")


def hidden_states(config: T5Config) -> ApplyFn:
    """Like `language_model`, but returns the decoder's hidden states `[B, T, D]`."""
    return _with_targets(config, "hidden")


def _with_targets(config, name):
    method = _method(config, name)

    def apply_fn(
        params,
        input_ids,
        attention_mask,
        decoder_input_ids,
        decoder_attention_mask=None,
    ):
        targets = decoder_input_ids, decoder_attention_mask
        return method(params, input_ids, attention_mask, *targets)

    return apply_fn


def _method(config, name) -> ApplyFn:
    module = Transformer(config)

    def apply(params, *inputs):
        return module.apply({"params": params}, *inputs, method=name)

    return apply


def shift_right(labels: Array, config: T5Config) -> jax.Array:
    """Returns the decoder's inputs for labels `i32[..., T]`: the labels, one later.

    The start token comes first, and the last token is left out. Labels of -100, which
    no loss counts, become padding.

    Example:
      >>> print(shift_right(jnp.array([[7, 8, 1, -100, -100]]), T5Config()))
      [[0 7 8 1 0]]
    """
    labels = jnp.asarray(labels)
    start = jnp.full_like(labels[..., :1], config.decoder_start_token_id)
    shifted = jnp.concatenate([start, labels[..., :-1]], axis=-1)
    return jnp.where(shifted == IGNORED, config.pad_token_id, shifted)


@functools.cache
def decoder(config: T5Config) -> Decoder:
    """Makes a `Decoder` for `generate.generate`.

    Its inputs are `input_ids` and `attention_mask`, both `[B, S]`.

    The texts are encoded once, and every block computes their keys and values once.
    Equal configurations share a decoder, so it is compiled once.
    """
    first, following = _method(config, "start"), _method(config, "step")

    def start(params, input_ids, attention_mask, *, room):
        logits, pasts, mask = first(params, input_ids, attention_mask)
        longer = [(0, 0), (0, room), (0, 0), (0, 0)]
        pasts = tuple(
            past._replace(own=tuple(jnp.pad(own, longer) for own in past.own))
            for past in pasts
        )
        return (jnp.array(1, jnp.int32), mask, pasts), logits

    def step(params, cache, tokens):
        at, mask, pasts = cache
        logits, pasts = following(params, tokens, mask, pasts, at)
        return (at + 1, mask, pasts), logits

    return Decoder(start, step)


def init(key: jax.Array, config: T5Config) -> dict:
    """Makes random parameters of the whole model, to train a T5 from scratch."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(Transformer(config).init(key, tokens, tokens, tokens, None)["params"])


def layout(config: T5Config) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` that a checkpoint must fill.

    For a checkpoint of the encoder alone, use `tree.select(layout(config), ENCODER)`.
    """
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


class T5(NamedTuple):
    """A checkpoint in memory: its configuration, parameters and folder."""

    config: T5Config
    params: dict
    folder: Path


# Files of the first T5s hold a table that nothing reads, and copies of the embeddings.
_UNREAD = r"decoder/block/0/layer/1/EncDecAttention/relative_attention_bias/\w+"
_COPIES = {
    "encoder/embed_tokens/weight": "shared/embedding",
    "decoder/embed_tokens/weight": "shared/embedding",
}


def load(model: str | os.PathLike, *, revision: str | None = None) -> T5:
    """Loads a T5 in Hugging Face format, or the encoder of one.

    Only the encoder is loaded if config.json names the class `T5EncoderModel`, or if it
    names no class and the file has no decoder. The head is untied if the file has a
    head, unless config.json ties it and its values equal `shared`. The returned
    `config` says whether it is tied.

    Args:
      model: a local folder or a hub id.
      revision: a branch, tag or commit on the hub.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: its files are broken, or are not a T5.

    Example:
      >>> model = load("google/flan-t5-small")  # doctest: +SKIP
      >>> apply_fn = language_model(model.config)  # doctest: +SKIP
      >>> logits = apply_fn(model.params, ids, mask, decoder_ids)  # doctest: +SKIP
    """
    folder = hub.find(model, revision=revision)
    raw = hub.read_json(folder)
    config = T5Config.from_json(raw)
    names = hub.names(folder)
    if not _has_decoder(raw, names):
        expected = tree.select(layout(config), ENCODER)
        return T5(config, _load(folder, expected), folder)
    if not {"lm_head/weight", "lm_head/kernel"} & names:
        return T5(config, _load(folder, layout(config)), folder)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    params = _load(folder, layout(untied))
    head = params["lm_head"]["kernel"].T
    if config.tie_word_embeddings and np.array_equal(
        head, params["shared"]["embedding"]
    ):
        return T5(config, {k: v for k, v in params.items() if k != "lm_head"}, folder)
    return T5(untied, params, folder)


def _has_decoder(raw, names):
    if raw.get("architectures"):
        return "T5EncoderModel" not in raw["architectures"]
    return any(name.startswith("decoder/") for name in names)


def _load(folder, expected):
    return hub.load(folder, expected, ignore=_UNREAD, copies=_COPIES)
