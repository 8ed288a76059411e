"""Metrics against closed forms and their formulas in NumPy."""

import sys

import numpy as np
import pytest

from jaxarith import metrics

sklearn = pytest.importorskip("sklearn", reason="the metrics need it")


def random_labels(classes, n=200):
    """Labels, and predictions that agree with them about half of the time."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    noise = rng.integers(0, classes, n)
    return np.where(rng.random(n) < 0.4, labels, noise), labels


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    predictions, labels = random_labels(2)
    hits = np.sum((predictions == 1) & (labels == 1))
    precision, recall = hits / np.sum(predictions == 1), hits / np.sum(labels == 1)
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.f1(predictions, labels) == pytest.approx(expected, abs=1e-10)
    assert 0.4 < expected < 0.95
    # What is not 1 is the other class: no answer counts as the other one.
    unanswered = np.where(predictions == 0, -1, predictions)
    assert metrics.f1(unanswered, labels) == metrics.f1(predictions, labels)
    assert metrics.f1(1 - predictions, 1 - labels) != metrics.f1(predictions, labels)


def test_f1_is_zero_where_no_one_is_found_and_undefined_where_there_is_none():
    assert metrics.f1(np.array([0, 0]), np.array([1, 0])) == 0.0
    with pytest.raises(ValueError, match="F1 is undefined"):
        metrics.f1(np.zeros(3, int), np.zeros(3, int))


def test_matthews_correlation_of_two_classes_is_their_correlation():
    predictions, labels = random_labels(2)
    expected = np.corrcoef(predictions, labels)[0, 1]
    assert metrics.matthews(predictions, labels) == pytest.approx(expected, abs=1e-10)
    assert 0.1 < expected < 0.9


def test_matthews_correlation_of_several_classes_is_gorodkins():
    predictions, labels = random_labels(4)
    x, y = np.eye(4)[predictions], np.eye(4)[labels]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    assert metrics.matthews(predictions, labels) == pytest.approx(expected, abs=1e-10)


def test_matthews_correlation_of_one_class():
    assert metrics.matthews(np.ones(4, int), np.array([0, 1, 0, 1])) == 0.0
    with pytest.raises(ValueError, match="the 4 labels are all the same"):
        metrics.matthews(np.array([0, 1, 0, 1]), np.ones(4, int))


def test_pearson_and_spearman_are_correlations_of_values_and_of_ranks():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50)
    scores = np.float32(np.exp(truth) + rng.normal(size=50))
    expected = np.corrcoef(scores.astype(float), truth)[0, 1]
    assert metrics.pearson(scores, truth) == pytest.approx(expected, abs=1e-10)
    ranks = [values.argsort().argsort() for values in (scores, truth)]
    of_ranks = np.corrcoef(*ranks)[0, 1]
    assert metrics.spearman(scores, truth) == pytest.approx(of_ranks, abs=1e-10)
    assert abs(expected - of_ranks) > 0.01
    assert metrics.spearman(np.exp(3 * truth), truth) == pytest.approx(1, abs=1e-10)
    assert metrics.pearson(2 - 3 * truth, truth) == pytest.approx(-1, abs=1e-10)


def test_ties_share_their_rank():
    ranks = np.array([1.5, 1.5, 3.0, 4.0])
    expected = np.corrcoef(ranks, np.arange(4))[0, 1]
    scores = np.array([7.0, 7.0, 8.0, 9.0])
    assert metrics.spearman(scores, np.arange(4)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearman])
@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], "the 3 targets are all the same"),
        ([1.0], [1.0], "all the same"),
        ([], [], "all the same"),
        ([1.0, np.nan], [1.0, 2.0], "predictions have NaN or infinite"),
        ([1.0, 2.0], [1.0, np.inf], "targets have NaN or infinite"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"have shape \(2,\), labels \(3,\)"),
    ],
)
def test_a_correlation_that_is_undefined_is_an_error(
    metric, predictions, targets, message
):
    with pytest.raises(ValueError, match=message):
        metric(np.array(predictions), np.array(targets))


@pytest.mark.parametrize("metric", [metrics.f1, metrics.matthews])
def test_predictions_and_labels_of_unlike_shapes_are_an_error(metric):
    with pytest.raises(ValueError, match=r"expected \[B\] for both"):
        metric(np.array([0, 1]), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match=r"expected \[B\] for both"):
        metric(np.eye(2), np.eye(2))


def test_texts_match_exactly_but_for_blanks_at_their_ends():
    assert (
        metrics.exact_match(["a b", " a", "A", "a  b"], ["a b", "a", "a", "a b"]) == 0.5
    )


def test_rouge_2_is_the_f_measure_of_shared_word_pairs():
    pytest.importorskip("rouge_score", reason="the metric needs it")
    text, target = "The cat sat on the mat.", "the cat lay on the mat today"
    # Pairs: 5 and 6, of which "the cat", "on the" and "the mat" are shared.
    expected = 2 * (3 / 5) * (3 / 6) / (3 / 5 + 3 / 6)
    assert metrics.rouge_2([text], [target]) == pytest.approx(expected, abs=1e-10)
    assert metrics.rouge_2([text, "x y"], [target, "y x"]) == pytest.approx(
        expected / 2
    )
    # Words are not stemmed.
    assert metrics.rouge_2(["running dogs"], ["run dog"]) == 0.0


@pytest.mark.parametrize("metric", [metrics.exact_match, metrics.rouge_2])
def test_texts_without_their_targets_are_an_error(metric):
    if metric is metrics.rouge_2:
        pytest.importorskip("rouge_score", reason="the metric needs it")
    with pytest.raises(ValueError, match="1 texts and 2 targets"):
        metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 texts and 0 targets"):
        metric([], [])


@pytest.mark.parametrize(
    ("metric", "module"),
    [
        (metrics.f1, "sklearn.metrics"),
        (metrics.matthews, "sklearn.metrics"),
        (metrics.pearson, "scipy.stats"),
        (metrics.spearman, "scipy.stats"),
        (metrics.rouge_2, "rouge_score.rouge_scorer"),
    ],
)
def test_a_missing_package_names_the_extra_to_install(monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: .*jaxarith\[text\]"):
        metric(["0", "1"], ["0", "1"])


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearman])
def test_constant_predictions_correlate_with_nothing(metric):
    assert metric([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
