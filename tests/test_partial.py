"""Scores that a run keeps."""

import types

import numpy as np
import pytest

from experiments.common import partial
from experiments.common.vision import scores
from experiments.editing import figure2_subsets

ROWS = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0], [0.1, 0.3], [1 / 3, 0.3]])


def expected(rows):
    return np.sin(rows).sum(axis=1)


def test_a_second_start_scores_what_the_first_has_not(tmp_path):
    file, asked = tmp_path / "run" / "scores.json", []

    def score(rows):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(rows)
        return expected(rows)

    with pytest.raises(KeyboardInterrupt):
        partial.scored(file, {"of": 1}, ROWS, score, together=2)
    rest = []

    def other(rows):
        rest.append(rows)
        return expected(rows)

    for _ in range(2):
        found = partial.scored(file, {"of": 1}, ROWS, other, together=2)
        np.testing.assert_array_equal(found, expected(ROWS))
    # Two of the four different rows each.
    np.testing.assert_array_equal(asked[0], ROWS[:2])
    assert [x.tolist() for x in rest] == [ROWS[3:].tolist()]


def test_scores_of_something_else_are_not_taken(tmp_path):
    file = tmp_path / "scores.json"
    partial.scored(file, {"of": 1}, ROWS, lambda rows: rows[:, 0], together=9)
    for of, resume in (({"of": 2}, True), ({"of": 2}, False)):
        found = partial.scored(file, of, ROWS, expected, together=9, resume=resume)
        np.testing.assert_array_equal(found, expected(ROWS))
        partial.scored(file, of, ROWS, lambda rows: rows[:, 0], together=9)


def test_subsets_that_were_scored_are_not_scored_again(tmp_path, monkeypatch):
    passes = []

    def accuracies(setup, taus, dataset, linearized, rows):
        passes.append(len(rows))
        return np.asarray(rows) @ [1.0, 2.0]

    monkeypatch.setattr(scores, "accuracies", accuracies)
    head = np.eye(2, dtype=np.float32)
    dataset = types.SimpleNamespace(size=3, labels=np.arange(3), head=head)
    tasks = [types.SimpleNamespace(name=n, validation=dataset) for n in ("a", "b")]
    setup = types.SimpleNamespace(tasks=tasks, params_0={"w": np.zeros(2, np.float32)})
    taus = [{"w": np.full(2, x, np.float32)} for x in (1, 2)]
    config = figure2_subsets.Config(out=tmp_path)
    found = figure2_subsets.accuracies(setup, taus, ROWS, config, "validation")
    np.testing.assert_array_equal(found, np.tile(ROWS @ [1.0, 2.0], (2, 1)).T)
    assert passes == [4, 4]
    again = figure2_subsets.accuracies(setup, taus, ROWS, config, "validation")
    np.testing.assert_array_equal(again, found)
    assert passes == [4, 4]
    taus[0]["w"][1] = 7  # other vectors have other scores
    figure2_subsets.accuracies(setup, taus, ROWS, config, "validation")
    assert passes == [4] * 4
