"""Metrics on arrays and on texts."""

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxarith.typing import Numbers


def accuracy(
    logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None
) -> float:
    """Returns the share of samples whose largest logit is that of the label.

    Args:
      logits: `f32[B, classes]`.
      labels: `i32[B]`.
      mask: `bool[B]`, False for padding; by default every sample counts.

    Raises:
      ValueError: no sample counts.

    Example:
      >>> accuracy(np.eye(3), np.array([0, 1, 0]), np.array([True, True, False]))
      1.0
    """
    hits = np.asarray(logits).argmax(-1) == np.asarray(labels)
    counts = np.ones(len(hits), bool) if mask is None else np.asarray(mask, bool)
    if not counts.any():
        raise ValueError(
            "accuracy found no sample that counts; expected at least one. Check that "
            "the data is not empty and that the mask is True somewhere."
        )
    return float(hits[counts].mean())


def normalized_accuracy(merged: Numbers, single: Numbers) -> float:
    r"""Returns the mean over tasks of merged accuracy divided by single-task accuracy.

    Source: Jin et al. 2025 (linear-layers paper), Eq. 5.

    Args:
      merged: `[T]`, accuracy of the merged model on each task.
      single: `[T]`, accuracy of each task's own fine-tuned model on the same split.

    Raises:
      ValueError: a single-task accuracy is zero, or the lengths differ.

    Example:
      >>> normalized_accuracy([0.8, 0.45], [0.8, 0.9])
      0.75
    """
    found, alone = np.asarray(merged, float), np.asarray(single, float)
    if found.shape != alone.shape:
        raise ValueError(
            f"merged accuracies have shape {found.shape}, single-task accuracies "
            f"{alone.shape}; give one of each for every task."
        )
    if not (alone > 0).all():
        raise ValueError(
            f"single-task accuracies are {alone.tolist()}; all must be above zero, "
            "because they are divided by. Leave out the tasks with zero."
        )
    return float(np.mean(found / alone))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Returns the F1 score of class 1, GLUE's metric for MRPC and QQP.

    Args:
      predictions, labels: `i32[B]`; every value but 1 is the other class.

    Raises:
      ValueError: no prediction and no label is 1, or the lengths differ.

    Example:
      >>> round(f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 1])), 3)
      0.4
    """
    sklearn_metrics = _import("sklearn.metrics")
    found, true = (x == 1 for x in _pair(predictions, labels, "F1"))
    if not (found | true).any():
        raise ValueError(
            "F1 is undefined: no label and no prediction is 1. Check that the positive "
            "class has the number 1."
        )
    return float(sklearn_metrics.f1_score(true, found))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Returns the Matthews correlation, GLUE's metric for CoLA.

    It is defined for any number of classes. As in scikit-learn, it is 0 if all
    predictions are one class.

    Args:
      predictions, labels: `i32[B]`.

    Raises:
      ValueError: all labels are one class, or the lengths differ.

    Example:
      >>> matthews(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]))
      -1.0
    """
    sklearn_metrics = _import("sklearn.metrics")
    predictions, labels = _pair(predictions, labels, "Matthews correlation")
    _check_varies(labels, "Matthews correlation", "labels")
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Returns the linear correlation; with `spearman` it is GLUE's metric for STS-B.

    Like `matthews`, it is 0 if all predictions are the same.

    Args:
      predictions, targets: `f32[B]`.

    Raises:
      ValueError: the targets are constant, a number is not finite, or the lengths
        differ.

    Example:
      >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
      1.0
    """
    stats = _import("scipy.stats")
    predictions, targets = _numbers(predictions, targets, "Pearson correlation")
    if (predictions == predictions[0]).all():
        return 0.0
    return float(stats.pearsonr(predictions, targets).statistic)


def spearman(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Returns the linear correlation of the ranks; equal values share their mean rank.

    Args:
      predictions, targets: `f32[B]`.

    Raises:
      ValueError: the targets are constant, a number is not finite, or the lengths
        differ.

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
    """Returns the share of texts that equal their target; blanks at the ends are cut.

    Args:
      predictions, targets: one text for each sample.

    Raises:
      ValueError: both lists are empty, or their lengths differ.

    Example:
      >>> exact_match(["yes ", "No"], ["yes", "no"])
      0.5
    """
    _check_texts(predictions, targets, "exact match")
    pairs = zip(predictions, targets, strict=True)
    return float(np.mean([text.strip() == target.strip() for text, target in pairs]))


def rouge_2(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns ROUGE-2 (Lin 2004): the mean F-measure of shared pairs of words.

    The package rouge-score computes it. Words are runs of lower-case letters and
    digits; they are not stemmed.

    Args:
      predictions, targets: one text for each sample.

    Raises:
      ImportError: rouge-score is not installed.
      ValueError: both lists are empty, or their lengths differ.

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
            f"{metric}: predictions have shape {predictions.shape}, labels "
            f"{labels.shape}; expected [B] for both."
        )
    return predictions, labels


def _numbers(predictions, targets, metric):
    predictions, targets = _pair(predictions, targets, metric)
    for values, name in ((predictions, "predictions"), (targets, "targets")):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{metric}: the {name} have NaN or infinite values; expected finite "
                "numbers."
            )
    _check_varies(targets, metric, "targets")
    return predictions.astype(float), targets.astype(float)


def _check_varies(values, metric, name):
    if len(values) < 2 or (values == values[0]).all():
        raise ValueError(
            f"{metric} is undefined: the {len(values)} {name} are all the same; give "
            "samples with at least two different values."
        )


def _check_texts(predictions, targets, metric):
    if len(predictions) != len(targets) or not len(targets):
        raise ValueError(
            f"{metric}: found {len(predictions)} texts and {len(targets)} targets; "
            "expected one target for each text, and at least one text."
        )
