"""The encoder of `prompted`, its tokenizer, and the fixed head of a task.

The head has the rows of the label words; for an encoder without a masked-LM head, the
mean features of the classes in the training samples.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.language import tiny_text
from jaxarith import evaluate, sharding
from jaxarith.data import pipeline, prompt_sources, prompts, text
from jaxarith.models import bert, heads

INPUTS = ("input_ids", "attention_mask")
_BATCH = 32  # samples of which class means are made, at a time


class Model(NamedTuple):
    """An encoder of prompted texts.

    Attributes:
      config: config of the checkpoint.
      params: its parameters.
      tokenizer: its tokenizer.
      apply_fn: `apply_fn(params, *INPUTS) -> features[B, D]`.
      head: `head(source, words)`, the head `[C, D + 1]` for `heads.affine_logits` from
        the training samples of a task and the words of its classes.
    """

    config: bert.BertConfig
    params: dict
    tokenizer: Any
    apply_fn: Callable
    head: Callable


def load(model: str, head: str) -> Model:
    """Loads a BERT or RoBERTa for a kind of head, "label-word" or "class-mean".

    Raises:
      ValueError: it has no masked-LM head or mask token, or its tokenizer is another's.
      FileNotFoundError: there is no such model.
    """
    kind = "masked_lm" if head == "label-word" else None
    checkpoint = bert.load(model, head=kind)
    tokenizer = text.load_tokenizer(checkpoint.folder)
    text.check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    if tokenizer.mask_token is None:
        raise ValueError(f"{model} has no mask token; prompts need one.")
    make = label_words if kind else class_means
    apply_fn, head_of = make(checkpoint, tokenizer)
    return Model(checkpoint.config, checkpoint.params, tokenizer, apply_fn, head_of)


def tiny(head: str) -> Model:
    """A tiny RoBERTa that knows the label words, of smoke runs."""
    known = prompt_sources.sources().values()
    words = {word for source in known for word in source.prompt.words.values()}
    words = sorted(word for word in words if word.isalpha() and len(word) < 9)
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_text.write_roberta(Path(folder) / "tiny_roberta", words)
        return load(str(path), head)


def label_words(checkpoint: bert.Bert, tokenizer) -> tuple[Callable, Callable]:
    """What the masked LM makes of the mask, and the rows of the label words."""
    output = bert.output_words(checkpoint.config, checkpoint.params)
    words_0, bias = sharding.to_host(output)

    def head(source, words):
        del source
        return label_head(words_0, bias, prompts.word_pieces(tokenizer, words))

    return bert.mask_encoder(checkpoint.config, tokenizer.mask_token_id), head


def label_head(words, bias, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """The head of label words; the row of one of several tokens is the mean of theirs.

    Args:
      words, bias: output layer of the model, `[V, D]` and `[V]`.
      pieces: tokens of the word of every class.

    Returns:
      `[C, D + 1]`, for `heads.affine_logits`.

    Example:
      >>> label_head(np.eye(3, 2), np.arange(3.0), [[2], [0, 1]]).tolist()
      [[0.0, 0.0, 2.0], [0.5, 0.5, 0.5]]
    """
    rows = [np.append(words[ids].mean(0), bias[ids].mean()) for ids in pieces]
    return np.stack(rows)


def class_means(checkpoint: bert.Bert, tokenizer) -> tuple[Callable, Callable]:
    """The normalised mean over the tokens, mask included, and the means of classes."""
    del tokenizer
    encode = bert.mean_encoder(checkpoint.config)

    def apply_fn(params, *inputs):
        return heads.normalize(encode(params, *inputs))

    def head(source, words):
        batches = pipeline.evaluation_batches(source, _BATCH)
        features = evaluate.outputs(apply_fn, checkpoint.params, batches, INPUTS)
        labels = evaluate.labels(batches)
        means = heads.class_means(features, labels, len(words))
        return np.pad(np.asarray(means), ((0, 0), (0, 1)))  # without a bias

    return apply_fn, head
