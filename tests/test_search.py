"""Searches for coefficients: one for all tasks, one per task, negation, external."""

import itertools

import numpy as np
import pytest

from jaxarith import evaluate, metrics


def test_search_takes_the_first_of_equal_maxima():
    table = {0.0: [0.2, 0.4], 0.5: [0.4, 0.4], 1.0: [0.2, 0.8]}
    found = evaluate.search(table.__getitem__, [0.4, 0.8], list(table))
    assert found.coef == 0.5
    np.testing.assert_allclose(found.normalized, [0.5, 0.75, 0.75])


def test_search_runs_over_the_papers_grid_by_default():
    found = evaluate.search(lambda c: [1 - (c - 0.35) ** 2], [1.0])
    np.testing.assert_allclose(found.coefs, np.arange(21) / 20, atol=1e-12)
    assert found.coef == pytest.approx(0.35)


def test_search_refuses_accuracies_of_nan_and_no_coefficients():
    with pytest.raises(ValueError, match="an accuracy at coefficient 0.5 is NaN"):
        evaluate.search(lambda c: [np.nan if c == 0.5 else c], [1.0], [1.0, 0.5])
    with pytest.raises(ValueError, match="no coefficient to try"):
        evaluate.search(lambda c: [c], [1.0], [])


def counted(accuracies_at):
    tried = []

    def counted_at(coefs):
        tried.append(np.array(coefs))
        return accuracies_at(coefs)

    return counted_at, tried


def brute_force(accuracies_at, single, coefs):
    return max(
        metrics.normalized_accuracy(accuracies_at(np.array(point)), single)
        for point in itertools.product(coefs, repeat=len(single))
    )


def test_the_search_per_task_is_brute_force_where_tasks_do_not_interact():
    peaks, coefs = np.array([0.3, 0.9, 0.0]), np.linspace(0, 1, 11)
    single = [0.5, 0.8, 1.0]

    def accuracies_at(point):
        return 0.5 - (point - peaks) ** 2 / 4

    at, tried = counted(accuracies_at)
    found = evaluate.search_per_task(at, single, coefs)
    np.testing.assert_allclose(found.coefs, peaks, atol=1e-12)
    best = brute_force(accuracies_at, single, coefs)
    assert found.normalized[-1] == pytest.approx(best, abs=1e-12)
    # The shared search, a sweep that finds the peaks, a sweep that changes nothing.
    assert len(tried) == 11 + 2 * 3 * 11
    assert found.normalized[0] < found.normalized[1] == found.normalized[2]
    assert len(found.normalized) == 3


def test_the_search_per_task_is_between_the_shared_search_and_brute_force():
    coefs, single = (0.0, 0.5, 1.0), [0.9, 0.8, 1.0]
    gains = []
    for seed in range(8):
        table = np.random.default_rng(seed).uniform(size=(3, 3, 3, 3))

        def accuracies_at(point, table=table):
            return table[tuple(np.searchsorted(coefs, point))]

        shared = evaluate.search(
            lambda c, at=accuracies_at: at(np.full(3, c)), single, coefs
        )
        found = evaluate.search_per_task(accuracies_at, single, coefs)
        assert found.normalized[0] == shared.normalized.max()
        assert (np.diff(found.normalized) >= 0).all()
        value = metrics.normalized_accuracy(accuracies_at(found.coefs), single)
        assert found.normalized[-1] == value
        assert value <= brute_force(accuracies_at, single, coefs)
        gains.append(value - shared.normalized.max())
        none = evaluate.search_per_task(accuracies_at, single, coefs, sweeps=0)
        assert none.coefs.tolist() == [shared.coef] * 3
    assert min(gains) >= 0 and max(gains) > 0.1


def test_the_search_per_task_stays_where_nothing_is_better():
    coefs = [0.0, 0.5, 1.0]
    flat = evaluate.search_per_task(lambda point: [0.5, 0.5], [1.0, 1.0], coefs)
    assert flat.coefs.tolist() == [0.0, 0.0] and flat.normalized.tolist() == [0.5, 0.5]
    # Of equal improvements the first, along the first task that has one.
    ridge = evaluate.search_per_task(
        lambda point: [float(point[0] != point[1])] * 2, [1.0, 1.0], coefs
    )
    assert ridge.coefs.tolist() == [0.5, 0.0]


def test_the_search_per_task_refuses_nan_and_no_coefficients():
    def accuracies_at(point):
        return point if point[0] == point[1] else [np.nan, 0.5]

    with pytest.raises(ValueError, match="an accuracy at coefficient 0.0 is NaN"):
        evaluate.search_per_task(accuracies_at, [1.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="no coefficient to try"):
        evaluate.search_per_task(accuracies_at, [1.0, 1.0], [])


COEFS = [0.0, 0.25, 0.5, 0.75, 1.0]


def searched(controls, allowed, coefs=COEFS):
    return evaluate.search_negation(
        dict(zip(coefs, controls, strict=True)).get, allowed, coefs
    )


@pytest.mark.parametrize(
    ("controls", "expected"),
    [
        ([25.0, 25.1, 25.5, 25.6, 99.0], 0.5),
        ([25.0, 24.0, 23.0, 22.0, 25.5], 1.0),
        ([25.0, 25.6, 30.0, np.inf, np.inf], 0.0),
        ([25.0, 25.1, 30.0, 25.4, np.nan], 0.75),  # the largest, across a violation
    ],
)
def test_negation_goes_as_far_as_the_perplexity_allows(controls, expected):
    found = searched(controls, lambda p: p <= 25.0 + 0.5)
    assert found.coef == expected and isinstance(found.coef, float)
    assert found.coefs.tolist() == COEFS
    np.testing.assert_array_equal(found.controls, controls)


def test_negation_goes_as_far_as_the_control_accuracy_allows():
    found = searched([0.6, 0.59, 0.571, 0.569, 0.2], lambda a: a >= 0.95 * 0.6)
    assert found.coef == 0.5
    # The order of the candidates does not matter.
    descending = evaluate.search_negation(
        lambda c: 1 - c, lambda a: a >= 0.4, [1.0, 0.5, 0.25]
    )
    assert descending.coef == 0.5


def test_negation_never_allows_nan_and_always_zero():
    assert searched([np.nan] * 5, lambda _: True).coef == 0
    assert searched([1.0] * 5, lambda _: False).coef == 0
    with pytest.raises(ValueError, match="no candidate keeps the control"):
        searched([9.0, np.nan], lambda p: p <= 1, [0.5, 1.0])
    with pytest.raises(ValueError, match="no coefficient to try"):
        searched([], lambda _: True, [])


def test_negation_runs_over_the_papers_grid_by_default():
    found = evaluate.search_negation(lambda c: c, lambda c: c < 0.75)
    np.testing.assert_allclose(found.coefs, np.arange(11) / 10, atol=1e-12)
    assert found.coef == pytest.approx(0.7)


def test_the_external_search_is_brute_force_over_vectors_and_coefficients():
    scores = np.random.default_rng(0).normal(size=(7, 4))
    coefs = [0.1, 0.4, 0.7, 1.0]

    def score_at(index, coef):
        return scores[index, coefs.index(coef)]

    found = evaluate.search_external(score_at, 7, coefs, baseline=0.0)
    np.testing.assert_array_equal(found.scores, scores)
    row, column = np.argwhere(scores == scores.max())[0]
    assert (found.index, found.coef) == (row, coefs[column])
    assert scores.max() > 0
    for baseline in (scores.max(), 99.0):
        nothing = evaluate.search_external(score_at, 7, coefs, baseline=baseline)
        assert (nothing.index, nothing.coef) == (None, 0.0)


def test_the_external_search_takes_the_first_of_equals_and_the_papers_grid():
    found = evaluate.search_external(lambda i, c: float(i > 0), 3, baseline=0.5)
    assert found.scores.shape == (3, 10)
    assert (found.index, found.coef) == (1, pytest.approx(0.1))


def test_the_external_search_refuses_nan_and_nothing_to_choose_from():
    with pytest.raises(ValueError, match="0 vectors and 10 coefficients"):
        evaluate.search_external(lambda i, c: 0.0, 0, baseline=0.0)
    with pytest.raises(ValueError, match="3 vectors and 0 coefficients"):
        evaluate.search_external(lambda i, c: 0.0, 3, [], baseline=0.0)
    for score, baseline in ((np.nan, 0.0), (0.0, np.nan)):
        with pytest.raises(ValueError, match="NaN"):
            evaluate.search_external(lambda i, c, s=score: s, 2, baseline=baseline)


def test_of_what_forgets_most_the_smallest_coefficient_that_is_allowed_is_chosen():
    control = {0.0: 0.6, 0.1: 0.59, 0.2: 0.58, 0.3: 0.3, 0.4: 0.6}
    target = {0.0: 0.9, 0.1: 0.4, 0.2: 0.4, 0.3: 0.1, 0.4: np.nan}

    def chosen(coefs):
        return evaluate.search_negation(
            control.__getitem__,
            lambda accuracy: accuracy >= 0.95 * 0.6,
            coefs,
            target_at=target.__getitem__,
        ).coef

    assert chosen([0.0, 0.1, 0.2, 0.3, 0.4]) == chosen([0.4, 0.3, 0.2, 0.1, 0.0]) == 0.1
    assert chosen([0.0, 0.3]) == 0
