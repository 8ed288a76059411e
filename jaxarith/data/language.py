"""Language modelling: token streams in blocks, padded texts, inputs with targets.

Labels follow Hugging Face: they are the tokens to predict, and -100 for positions that
do not count. The labels of a causal model are its inputs; the loss shifts them by one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxarith import tree
from jaxarith.data import text
from jaxarith.data.text import Record, Side, Tokenizer
from jaxarith.losses import IGNORED


def stream(
    tokenizer: Tokenizer, texts: Sequence[str], *, end: bool = True
) -> np.ndarray:
    """Returns the tokens of all texts, one text after the other.

    Args:
      tokenizer: a tokenizer of transformers.
      texts: the texts.
      end: whether to put the tokenizer's end-of-text token after every text. The
        streams of published perplexities have none.

    Returns:
      `i32[N]`.

    Raises:
      ValueError: `end` is True and the tokenizer has no end-of-text token.
    """
    if end and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token. Set end=False.")
    after = [tokenizer.eos_token_id] if end else []
    parts = [np.zeros(0, np.int32)]
    for some in _chunks(texts):
        encoding = tokenizer(some, add_special_tokens=False, verbose=False)
        tokens = [t for text in encoding["input_ids"] for t in (*text, *after)]
        parts.append(np.asarray(tokens, np.int32))
    return np.concatenate(parts)


def blocks(tokens: ArrayLike, size: int) -> list[dict]:
    """Cuts a token stream into blocks, for a causal language model.

    The remainder, fewer than `size` tokens, is dropped.

    Args:
      tokens: `i32[N]`, as `stream` returns them.
      size: tokens in a block.

    Returns:
      A source: `{"input_ids", "attention_mask", "labels"}` per block, all `i32[size]`.

    Raises:
      ValueError: `tokens` has fewer than `size` tokens.

    Example:
      >>> [block["labels"].tolist() for block in blocks(np.arange(7), 3)]
      [[0, 1, 2], [3, 4, 5]]
    """
    ids = _cut(tokens, size)
    return text.rows({**_all_seen(ids), "labels": ids})


def consecutive_blocks(tokens: ArrayLike, size: int = 128) -> list[dict]:
    """Cuts a token stream into pairs of blocks, for an encoder-decoder.

    One block is the input and the next is the output, as in the language modelling for
    the analogies of Ilharco et al. 2023 (App. E.1), after Lester et al. 2021. No block
    is in two pairs. The remainder, fewer than `2 * size` tokens, is dropped.

    Args:
      tokens: `i32[N]`, as `stream` returns them.
      size: tokens in a block.

    Returns:
      A source: `{"input_ids", "attention_mask", "labels"}` per pair, all `i32[size]`.

    Raises:
      ValueError: `tokens` has fewer than `2 * size` tokens.

    Example:
      >>> pair, = consecutive_blocks(np.arange(7), 3)
      >>> pair["input_ids"].tolist(), pair["labels"].tolist()
      ([0, 1, 2], [3, 4, 5])
    """
    ids = _cut(tokens, 2 * size)
    return text.rows({**_all_seen(ids[:, :size]), "labels": ids[:, size:]})


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int,
    *,
    side: Side = "right",
) -> list[dict]:
    """Encodes texts as tokens of one length, for a causal language model.

    Longer texts lose their end. The tokenizer adds its usual special tokens (GPT-2:
    none). If it has no padding token, it pads with its end-of-text token.

    Args:
      tokenizer: a tokenizer of transformers.
      texts: the texts.
      max_length: tokens in each row.
      side: the side of the padding; "left" for prompts that a model continues.

    Returns:
      A source: `{"input_ids", "attention_mask", "labels"}` per text, all
      `i32[max_length]`; the labels are -100 at padding.
    """
    sequences = _tokens(tokenizer, texts, max_length)
    ids, mask = text.pad(sequences, max_length, text.padding_id(tokenizer), side)
    labels = np.where(mask == 1, ids, np.int32(IGNORED))
    return text.rows({"input_ids": ids, "attention_mask": mask, "labels": labels})


def text_to_text(
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_length: int,
    target_length: int,
) -> list[dict]:
    """Encodes inputs and targets as tokens, for an encoder-decoder.

    Args:
      tokenizer: a tokenizer of transformers.
      records: `{"text": str, "target": str}`, with or without a `"label"`, as
        `glue.text_to_text` returns them.
      max_length, target_length: the number of tokens S of inputs and T of targets.
        Longer ones lose their end.

    Returns:
      A source: `{"input_ids": i32[S], "attention_mask": i32[S], "labels": i32[T]}` per
      record, and its `"label"`; the labels are -100 at padding.
    """
    inputs = [record["text"] for record in records]
    ids, mask = _padded(tokenizer, inputs, max_length, text.padding_id(tokenizer))
    targets = [record["target"] for record in records]
    columns = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": _padded(tokenizer, targets, target_length, IGNORED)[0],
    }
    if "label" in records[0]:
        columns["label"] = text.labels(records)
    return text.rows(columns)


def candidates(tokenizer: Tokenizer, words: Sequence[str]) -> np.ndarray:
    """Returns the target of every class, for rank classification.

    Args:
      tokenizer: a tokenizer of transformers.
      words: the target word of every class.

    Returns:
      `i32[classes, T]`, where T is the length of the longest target; -100 at padding.

    Raises:
      ValueError: two words have the same tokens.
    """
    sequences = tokenizer(list(words))["input_ids"]
    if len({tuple(sequence) for sequence in sequences}) < len(words):
        raise ValueError(
            f"two of the words {', '.join(words)} have the same tokens, so no model "
            "can tell them apart. Choose words that the tokenizer knows."
        )
    return _labels(sequences, max(map(len, sequences)))


def _chunks(texts):
    """Yields lists of a thousand texts.

    A tokenizer returns lists of Python integers, about 200 bytes for each token in
    total. For millions of texts at once this would not fit into memory.
    """
    for first in range(0, len(texts), 1000):
        yield list(texts[first : first + 1000])


def _padded(tokenizer, texts, length, value):
    """Returns the tokens of texts as `text.pad` does."""
    pairs = [
        text.pad(_tokens(tokenizer, some, length), length, value)
        for some in list(_chunks(texts)) or [[]]
    ]
    ids, mask = map(np.concatenate, zip(*pairs, strict=True))
    return ids, mask


def _tokens(tokenizer, texts, max_length):
    if not len(texts):
        raise ValueError("there are no texts to encode. Give at least one.")
    encoding = tokenizer(list(texts), truncation=True, max_length=max_length)
    return encoding["input_ids"]


def _labels(sequences, length):
    return text.pad(sequences, length, IGNORED)[0]


def _all_seen(ids):
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _cut(tokens, length):
    tokens = np.asarray(tokens, np.int32)
    if not 0 < length <= len(tokens):
        raise ValueError(
            f"cannot cut {tree.counted(len(tokens), 'token')} into blocks of {length}. "
            "Take more text or smaller blocks."
        )
    number = len(tokens) // length
    return tokens[: number * length].reshape(number, length)
