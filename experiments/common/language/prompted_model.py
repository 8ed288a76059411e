"""The encoder of `prompted`, its tokenizer, and the fixed head of a task.

The rows of the head are those of the label words. For an encoder without a masked-LM
head they are the mean features of each class over the training samples.
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
_BATCH = 32  # samples in a batch when class means are computed


class Model(NamedTuple):
    """An encoder of prompted texts.

    Attributes:
      config: config of the checkpoint.
      params: its parameters.
      tokenizer: its tokenizer.
      apply_fn: `apply_fn(params, *INPUTS) -> features[B, D]`.
      head: `head(source, words) -> [C, D + 1]` for `heads.affine_logits`; its arguments
        are the training samples of a task and the words of its classes.
    """

    config: bert.BertConfig
    params: dict
    tokenizer: Any
    apply_fn: Callable
    head: Callable


def load(model: str, head: str) -> Model:
    """Loads a BERT or RoBERTa for a kind of head, "label-word" or "class-mean".

    Raises:
      ValueError: it has no masked-LM head or no mask token, or the tokenizer belongs to
        another model.
      FileNotFoundError: the model does not exist.
    """
    kind = "masked_lm" if head == "label-word" else None
    checkpoint = bert.load(model, head=kind)
    tokenizer = text.load_tokenizer(checkpoint.folder)
    text.check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    if tokenizer.mask_token is None:
        raise ValueError(
            f"the tokenizer of {model} has no mask token, and prompts need one. Name a "
            "BERT or RoBERTa."
        )
    make = label_words if kind else class_means
    apply_fn, head_of = make(checkpoint, tokenizer)
    return Model(checkpoint.config, checkpoint.params, tokenizer, apply_fn, head_of)


def tiny(head: str) -> Model:
    """Makes a tiny RoBERTa that knows the label words, for smoke runs."""
    known = prompt_sources.sources().values()
    words = {word for source in known for word in source.prompt.words.values()}
    words = sorted(word for word in words if word.isalpha() and len(word) < 9)
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_text.write_roberta(Path(folder) / "tiny_roberta", words)
        return load(str(path), head)


def label_words(checkpoint: bert.Bert, tokenizer) -> tuple[Callable, Callable]:
    """Returns the features at the mask token, and a head of label words."""
    output = bert.output_words(checkpoint.config, checkpoint.params)
    words_0, bias = sharding.to_host(output)

    def head(source, words):
        del source
        return label_head(words_0, bias, prompts.word_pieces(tokenizer, words))

    return bert.mask_encoder(checkpoint.config, tokenizer.mask_token_id), head


def label_head(words, bias, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the head of label words; a word of several tokens gets their mean row.

    Args:
      words, bias: output layer of the model, `[V, D]` and `[V]`.
      pieces: for every class, the tokens of its word.

    Returns:
      The head `[C, D + 1]`, for `heads.affine_logits`.

    Example:
      >>> label_head(np.eye(3, 2), np.arange(3.0), [[2], [0, 1]]).tolist()
      [[0.0, 0.0, 2.0], [0.5, 0.5, 0.5]]
    """
    rows = [np.append(words[ids].mean(0), bias[ids].mean()) for ids in pieces]
    return np.stack(rows)


def class_means(checkpoint: bert.Bert, tokenizer) -> tuple[Callable, Callable]:
    """Returns normalised mean features over all tokens, and a head of class means."""
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
