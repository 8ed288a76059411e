"""The toxicity of texts, measured by a classifier.

The papers on task arithmetic use Detoxify's "original" model (Hanu, Unitary team.
Detoxify. 2020), a BERT that was trained on the labels of the Jigsaw challenge. It is
`unitary/toxic-bert` on the Hugging Face Hub. Detoxify calls its label "toxic"
"toxicity".
"""

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxarith import evaluate, hub
from jaxarith.data import pipeline, text
from jaxarith.models import bert
from jaxarith.typing import Numbers

_DEFAULT_LABELS = ("toxic", "toxicity")


def scorer(
    model: str | os.PathLike = "unitary/toxic-bert",
    *,
    label: str | None = None,
    multi_label: bool | None = None,
    revision: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Callable[[Sequence[str]], np.ndarray]:
    """Loads a classifier of texts; returns a function to one label's probability.

    The probability is a sigmoid if several labels can be true of a text, as in
    Detoxify, and a softmax if the labels exclude each other. `problem_type` in
    `config.json` tells which. Without it, one label has a sigmoid, two labels share a
    softmax, and with more labels `multi_label` must be given.

    Args:
      model: a BERT or RoBERTa with a classifier: a local folder, or a hub id.
      label: the label whose probability is the score, as `config.json` names it. By
        default "toxic" or "toxicity", or the only one.
      multi_label: whether each label has a sigmoid; overrides `config.json`.
      revision: a branch, tag or commit on the hub.
      max_length: the largest number of tokens of a text; longer texts lose their end.
        The default is the number of the model's positions, 512 in toxic-bert.
      batch_size: texts that run at a time.

    Returns:
      `scores(texts) -> f32[N]`, numbers from 0 to 1 for any number of texts. A call
      pads its texts to the next power of two of the longest, so few calls compile.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: it has no classifier, no such label or no tokenizer, or nothing tells
        whether its labels exclude each other.

    Example:
      >>> scores = scorer()  # doctest: +SKIP
      >>> scores(["I love you.", "I hate you."])  # doctest: +SKIP
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
    config, params, folder = bert.load(model, head="classifier", revision=revision)
    raw = hub.read_json(folder)
    names = _labels(raw, config.num_labels)
    at = _position(names, label, folder)
    if multi_label is None:
        multi_label = _is_multi_label(raw, names, folder)
    most = config.max_length if max_length is None else max_length
    if not 3 <= most <= config.max_length:
        raise ValueError(
            f"max_length is {most}; expected 3, for a token between the two special "
            f"ones, to {config.max_length}, the model's positions."
        )
    tokenizer = text.load_tokenizer(folder)
    text.check_vocabulary(tokenizer, config.vocab_size)
    apply_fn, params = bert.classifier(config), jax.device_put(params)
    inputs = ("input_ids", "attention_mask")
    probabilities = jax.nn.sigmoid if multi_label else jax.nn.softmax

    def scores(texts):
        if not len(texts):
            return np.zeros(0, np.float32)
        tokens = tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
        longest = max(map(len, tokens))
        length = min(1 << (longest - 1).bit_length(), most)
        columns = text.pad(tokens, length, text.padding_id(tokenizer))
        source = text.rows(dict(zip(inputs, columns, strict=True)))
        batches = pipeline.evaluation_batches(source, batch_size)
        logits = evaluate.outputs(apply_fn, params, batches, inputs)
        return np.asarray(probabilities(logits))[:, at]

    return scores


def rate(scores: Numbers, threshold: float = 0.5) -> float:
    """The share of texts whose score is at least `threshold` (τJp paper, App. B.3).

    Raises:
      ValueError: there is no score.

    Example:
      >>> rate([0.1, 0.5, 0.9, 0.2])
      0.5
    """
    found = np.asarray(scores)
    if not found.size:
        raise ValueError("no score, so there is no share of toxic texts.")
    return float(np.mean(found >= threshold))


def _labels(raw, count):
    """The names of the labels, in the order of the logits."""
    stated = raw.get("id2label")
    if not stated:
        return [f"LABEL_{i}" for i in range(count)]
    return [stated[key] for key in sorted(stated, key=int)]


def _position(names, label, folder):
    found = [i for i, name in enumerate(names) if name == label]
    if label is None:
        found = [i for i, name in enumerate(names) if name.lower() in _DEFAULT_LABELS]
        found = found or [0] * (len(names) == 1)
    if not found:
        wanted = " or ".join(_DEFAULT_LABELS) if label is None else repr(label)
        raise ValueError(
            f"{folder} has no label {wanted}; it has {', '.join(names)}. Name one of "
            "them as label."
        )
    return found[0]


def _is_multi_label(raw, names, folder):
    kinds = {"multi_label_classification": True, "single_label_classification": False}
    kind = raw.get("problem_type")
    if kind in kinds:
        return kinds[kind]
    if kind is not None:
        raise ValueError(
            f"config.json of {folder} has problem_type {kind!r}; a score is a "
            f"probability, of {' or '.join(kinds)}."
        )
    if len(names) > 2:
        raise ValueError(
            f"config.json of {folder} has no problem_type and {len(names)} labels, "
            f"{', '.join(names)}. Say by multi_label whether several can be true of a "
            "text."
        )
    return len(names) == 1
