"""BERT and RoBERTa in Flax Linen, with the parameter names of Hugging Face checkpoints.

Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding. NAACL 2019. arXiv:1810.04805.
Liu et al. RoBERTa: A Robustly Optimized BERT Pretraining Approach. 2019.
arXiv:1907.11692.

A parameter tree holds the base under `bert` or `roberta`, and may hold heads:

    masked LM     cls/predictions/…                 lm_head/…
    classifier    bert/pooler/…  classifier/…       classifier/{dense,out_proj}/…

The masked LM's output matrix is the table of word embeddings, which is stored once.
Each function here reads only the leaves that it needs; the tree may hold more.

Shapes: B texts, S tokens, D = hidden_size, V = vocab_size.
"""

import functools
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxarith import hub
from jaxarith.models.bert_network import BertConfig, Head, Model
from jaxarith.models.layers import times_transposed
from jaxarith.typing import ApplyFn, Params

# Path patterns for `tree.select`: all leaves of the blocks, which prompt-based
# fine-tuning trains between frozen embeddings and a frozen LM head (Zeng et al. 2025;
# He et al. 2025); the matrices of the blocks; and the matrices of their attention.
BLOCKS = r"(bert|roberta)/encoder/layer/.*"
BLOCK_LINEAR_WEIGHTS = r"(bert|roberta)/encoder/layer/.*/kernel"
ATTENTION_WEIGHTS = r"(bert|roberta)/encoder/layer/\d+/attention/.*/kernel"


def encoder(config: BertConfig) -> ApplyFn:
    """Makes a function that encodes texts.

    `apply_fn(params, input_ids, attention_mask, token_type_ids=None) -> hidden` takes
    inputs `[B, S]` and returns the hidden states of the last block, `[B, S, D]`. Tokens
    whose attention_mask is zero are padding: no token attends to them, and their own
    rows of the result are meaningless. Token types are zero by default.

    Raises:
      ValueError: on a call, the inputs differ in shape, or are longer than the model's
        positions.
    """
    module = Model(config)

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        inputs = input_ids, attention_mask, token_type_ids
        return module.apply({"params": params}, *inputs)

    return apply_fn


def mean_encoder(config: BertConfig) -> ApplyFn:
    """Like `encoder`, but returns the mean `[B, D]` over tokens that are not padding.

    After normalisation, these means are the sentence embeddings of
    sentence-transformers (Reimers, Gurevych. Sentence-BERT. EMNLP 2019.
    arXiv:1908.10084). A text that is all padding gives zeros.
    """
    encode = encoder(config)

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        hidden = encode(params, input_ids, attention_mask, token_type_ids)
        real = attention_mask[..., None] != 0
        count = jnp.maximum(real.sum(axis=1), 1)
        return jnp.where(real, hidden, 0).sum(axis=1) / count.astype(hidden.dtype)

    return apply_fn


def mask_encoder(config: BertConfig, mask_token_id: int) -> ApplyFn:
    """Like `encoder`, but returns the LM head's features of the first mask token.

    The features `[B, D]` are the hidden state at that token after the dense layer,
    activation and norm of the head. With the embedding and the bias of a label word,
    they give the logit of that word. A text without a mask token, such as a row of
    padding, gives the features of its first token.

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
    """Like `encoder`, but returns the logits `[B, S, V]` of words at every token."""
    apply: ApplyFn = Model(config, "masked_lm").apply

    def apply_fn(params, input_ids, attention_mask, token_type_ids=None):
        inputs = input_ids, attention_mask, token_type_ids
        hidden, bias = apply({"params": params}, *inputs)
        words, _ = output_words(config, params)
        return times_transposed(hidden, words) + bias[None, None]

    return apply_fn


def output_words(config: BertConfig, params: Params) -> tuple[jax.Array, jax.Array]:
    """Returns the matrix `[V, D]` and the bias `[V]` of the masked LM's logits."""
    words = params[config.model_type]["embeddings"]["word_embeddings"]["embedding"]
    head = params["cls"]["predictions"] if "cls" in params else params["lm_head"]
    return words, head["bias"]


def classifier(config: BertConfig) -> ApplyFn:
    """Like `encoder`, but returns the class logits `[B, num_labels]` of each text."""
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
    """Makes random parameters, to train a whole model or a head on another base.

    Args:
      key: key of the random numbers.
      config: configuration of the model.
      head: "masked_lm", "classifier" or None.
      pooler: whether the base has a pooler; a BERT with a classifier always has it.

    Raises:
      ValueError: `head` is unknown.
    """
    if head not in (None, *get_args(Head)):
        known = " or ".join(get_args(Head))
        raise ValueError(f"unknown head {head!r}; expected None, {known}.")
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(Model(config, head, pooler).init(key, tokens, tokens)["params"])


def layout(
    config: BertConfig, head: Head | None = None, *, pooler: bool = False
) -> dict:
    """Returns the result of `init` as a tree of `jax.ShapeDtypeStruct`."""
    make = functools.partial(init, config=config, head=head, pooler=pooler)
    return jax.eval_shape(make, jax.random.key(0))


# For each head, the endings of the transformers classes that have it.
_HEADS: dict[Head, tuple[str, ...]] = {
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
    "classifier": ("ForSequenceClassification",),
}

# Tensors of the output layer that many files store beside the tensors they are tied to.
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

    Other heads are left out. A pooler is kept if the checkpoint has it.

    Args:
      model: a local folder, or a hub id such as `FacebookAI/roberta-base`.
      head: "masked_lm", "classifier", or None for the base alone. By default, the head
        of the class that config.json names; None for classes with other heads.
      revision: a branch, tag or commit on the hub.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: its files are broken, are not a BERT or RoBERTa, or lack the head.

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
