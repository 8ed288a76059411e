"""Metrics on arrays and on texts."""

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxarith.typing import Numbers


def accuracy(
    logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None
) -> float:
    """Share of samples whose largest logit is the label's.

    Args:
      logits: `[B, classes]`.
      labels: `i32[B]`.
      mask: `bool[B]`, False for padding; every sample counts by default.

    Raises:
      ValueError: no sample counts.

    Example:
      >>> accuracy(np.eye(3), np.array([0, 1, 0]), np.array([True, True, False]))
      1.0
    """
    hits = np.asarray(logits).argmax(-1) == np.asarray(labels)
    counts = np.ones(len(hits), bool) if mask is None else np.asarray(mask, bool)
    if not counts.any():
        raise ValueError("accuracy of no sample: the data, or its mask, is empty.")
    return float(hits[counts].mean())


def normalized_accuracy(merged: Numbers, single: Numbers) -> float:
    r"""Mean over tasks of merged over single-task accuracy (Jin et al. 2025, Eq. 5).

    Args:
      merged: accuracy of the merged model on every task, `[T]`.
      single: accuracy of every task's own fine-tuned model, on the same split.

    Raises:
      ValueError: a single-task accuracy is zero, or the lengths differ.

    Example:
      >>> normalized_accuracy([0.8, 0.45], [0.8, 0.9])
      0.75
    """
    found, alone = np.asarray(merged, float), np.asarray(single, float)
    if found.shape != alone.shape:
        raise ValueError(
            f"{found.shape} merged accuracies for {alone.shape} single-task ones."
        )
    if not (alone > 0).all():
        raise ValueError(
            f"single-task accuracies {alone.tolist()}: one is zero, so there is "
            "nothing to normalise by."
        )
    return float(np.mean(found / alone))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of the class 1 (GLUE's metric of MRPC and QQP).

    Args:
      predictions, labels: `i32[B]`; what is not 1 is the other class.

    Raises:
      ValueError: no prediction and no label is 1.

    Example:
      >>> round(f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 1])), 3)
      0.4
    """
    sklearn_metrics = _import("sklearn.metrics")
    found, true = (x == 1 for x in _pair(predictions, labels, "F1"))
    if not (found | true).any():
        raise ValueError("F1 of no sample: no label and no prediction is 1.")
    return float(sklearn_metrics.f1_score(true, found))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation (GLUE's metric of CoLA), for any number of classes.

    It is 0 where all predictions are one class, as scikit-learn has it.

    Args:
      predictions, labels: `i32[B]`.

    Raises:
      ValueError: all labels are one class.

    Example:
      >>> matthews(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]))
      -1.0
    """
    sklearn_metrics = _import("sklearn.metrics")
    predictions, labels = _pair(predictions, labels, "Matthews correlation")
    _check_varies(labels, "Matthews correlation", "labels")
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Linear correlation (GLUE's metric of STS-B, with `spearman`).

    It is 0 where all predictions are the same, as `matthews` is.

    Args:
      predictions, targets: `f32[B]`.

    Raises:
      ValueError: the targets are constant, or a number is not finite.
    """
    stats = _import("scipy.stats")
    predictions, targets = _numbers(predictions, targets, "Pearson correlation")
    if (predictions == predictions[0]).all():
        return 0.0
    return float(stats.pearsonr(predictions, targets).statistic)


def spearman(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Linear correlation of ranks, ties sharing theirs.

    Args:
      predictions, targets: `f32[B]`.

    Raises:
      ValueError: the targets are constant, or a number is not finite.

    Example:
      >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
      1.0
    """
    stats = _import("scipy.stats")
    predictions, targets = _numbers(predictions, targets, "Spearman correlation")
    if (predictions == predictions[0]).all():
        return 0.0
    return float(stats.spearmanr(predictions, targets).statistic)


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Share of texts that equal their target, but for blanks at their ends.

    Raises:
      ValueError: there is no text, or their numbers differ.

    Example:
      >>> exact_match(["yes ", "No"], ["yes", "no"])
      0.5
    """
    _check_texts(predictions, targets, "exact match")
    pairs = zip(predictions, targets, strict=True)
    return float(np.mean([text.strip() == target.strip() for text, target in pairs]))


def rouge_2(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Mean F-measure of shared word pairs (Lin 2004), through the package rouge-score.

    Words are runs of lower-cased letters and digits; they are not stemmed.

    Raises:
      ValueError: there is no text, or their numbers differ.

    Example:
      >>> rouge_2(["the cat sat"], ["The cat ran ."])
      0.5
    """
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(["rouge2"])
    _check_texts(predictions, targets, "ROUGE-2")
    pairs = zip(predictions, targets, strict=True)
    return float(
        np.mean(
            [scorer.score(target, text)["rouge2"].fmeasure for text, target in pairs]
        )
    )


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this metric needs {name}: pip install 'jaxarith[text]'."
        ) from error


def _pair(predictions, labels, metric):
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            f"{metric} of predictions {predictions.shape} and labels {labels.shape}; "
            "both must be [B]."
        )
    return predictions, labels


def _numbers(predictions, targets, metric):
    predictions, targets = _pair(predictions, targets, metric)
    for values, name in ((predictions, "predictions"), (targets, "targets")):
        if not np.isfinite(values).all():
            raise ValueError(f"{metric}: {name} are not finite.")
    _check_varies(targets, metric, "targets")
    return predictions.astype(float), targets.astype(float)


def _check_varies(values, metric, name):
    if len(values) < 2 or (values == values[0]).all():
        raise ValueError(
            f"{metric} is undefined: the {name} ({len(values)}) are all the same."
        )


def _check_texts(predictions, targets, metric):
    if len(predictions) != len(targets) or not len(targets):
        raise ValueError(
            f"{metric} of {len(predictions)} texts and {len(targets)} targets."
        )
