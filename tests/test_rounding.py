"""The comparison of training with rounded tangent products: distances and report."""

import numpy as np

from experiments.bench import rounding


def test_distances_are_relative_to_the_exact_vector():
    exact = [{"a": np.array([3.0, 0.0]), "b": np.array([4.0])}]
    rounded = [{"a": np.array([3.0, 0.5]), "b": np.array([4.0])}]
    [row] = rounding.distances(exact, rounded)
    np.testing.assert_allclose(row["relative distance"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(row["cosine"], 5 / np.hypot(5, 0.5), rtol=1e-6)


def test_the_report_holds_every_task_and_both_accuracies(tmp_path, shallow_clip):
    config = rounding.Config(
        tmp_path,
        model=shallow_clip,
        tasks=("mnist", "uci_digits"),
        **dict(penalty=None, steps=2, batch_size=8, samples=40),
    )
    results = rounding.main(config)
    assert set(results["vectors"]) == set(config.tasks)
    for row in results["vectors"].values():
        # Adam's first steps have the size of the learning rate whatever the gradient.
        assert 0 < row["relative distance"] < 0.5
        assert (
            0
            < row["mean absolute error of a logit"]
            < row["mean absolute move of a logit"]
        )
    assert set(results["accuracies"]) == {"float32", "bfloat16"}
    assert (tmp_path / "report.md").read_text().count("| mnist") == 1
