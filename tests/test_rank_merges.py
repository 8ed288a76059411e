"""The ranking of merges: what is compared, what chooses, how seeds are put together."""

import numpy as np
import pytest
from oracles import normal

from experiments import rank_merges
from jaxarith import merge, task_vectors

PARAMS = {
    "layers": {str(i): {"fc": {"kernel": normal((0, i), 6, 5)}} for i in range(2)},
    "bias": normal(3, 5),
}
TAUS = [
    {
        "layers": {str(i): {"fc": {"kernel": normal((t, i), 6, 5)}} for i in range(2)},
        "bias": normal((t, 3), 5),
    }
    for t in range(1, 4)
]


@pytest.fixture(scope="module")
def found():
    config = rank_merges.Config(seed=1)
    every = rank_merges.candidates(PARAMS, TAUS, r"layers/.*/kernel", config)
    return {name: merged() for name, merged in every}


def test_every_merge_without_data_and_every_wrapper_has_a_row(found):
    free = {
        name
        for name, method in merge.METHODS.items()
        if not method.data and method.returns == "params"
    }
    assert {*free, *merge.WRAPPERS} - found.keys() == {"wise_ft", "slerp"}
    assert len(found) == len({*found})


@pytest.mark.parametrize("name", ["ties", "tsv", "iso_c", "wudi", "breadcrumbs"])
def test_a_multiple_of_the_vector_is_the_merge_at_that_coefficient(name, found):
    [vector] = found[name].vectors
    model = task_vectors.apply(PARAMS, vector, 0.4)
    expected = merge.METHODS[name].function(PARAMS, TAUS, coef=0.4)
    for one, two in zip(
        (model["bias"], model["layers"]["0"]["fc"]["kernel"]),
        (expected["bias"], expected["layers"]["0"]["fc"]["kernel"]),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert found[name].default == merge.METHODS[name].coef


def test_validation_data_choose_and_test_data_are_reported():
    candidate = rank_merges.Candidate([{}], (0.5, 1.0, 2.0), 1.0)
    accuracies = {
        "validation": np.array([[0.1, 0.3], [0.4, 0.4], [0.9, 0.1]]),
        "test": np.array([[0.9, 0.9], [0.2, 0.4], [0.6, 0.2]]),
    }
    row = rank_merges.chosen(candidate, accuracies)
    assert row == pytest.approx({"searched": 40.0, "value": 2.0, "default": 30.0})


def test_rows_are_means_over_seeds_with_the_best_first():
    def seed(a, b):
        return {
            ("linear", "one"): {"searched": a, "default": a - 1, "value": 0.5},
            ("linear", "two"): {"searched": b, "value": 1.0},
        }

    one, two = rank_merges.ranked([seed(50.0, 60.0), seed(54.0, 61.0)], "linear")
    assert one["method"] == "two" and one["searched"] == 60.5
    assert one["default"] is None and one["chosen"] == [1.0, 1.0]
    assert two["searched"] == 52 and two["default"] == 51
    assert two["searched ±"] == pytest.approx(np.std([50, 54], ddof=1))


def test_kinds_that_are_not_known_are_named(tmp_path):
    config = rank_merges.Config(kinds=("ordinary",), out=tmp_path / "out")
    with pytest.raises(ValueError, match="out of nonlinear, linear, cyclic"):
        rank_merges.main(config)
    assert not (tmp_path / "out").exists()
