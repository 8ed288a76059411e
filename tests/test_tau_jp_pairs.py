"""What the figures of τJp measure of pairs of tasks, and how they are drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.vision import pairwise, scores, setups
from experiments.tau_jp import figure1_disentanglement, pairs
from jaxarith import evaluate, metrics, plots, sharding, task_vectors, tau_jp

COEFS = np.linspace(0, 1, 5)


def features(params, image):
    return jnp.tanh(image @ params["w"])


@pytest.fixture(scope="module")
def model():
    """Three tasks of 21 samples, 3 of a batch of 8 being padding, and their vectors."""
    rng = np.random.default_rng(0)

    def dataset(head):
        images = rng.normal(size=(3, 8, 4)).astype("float32")
        mask = np.ones((3, 8), bool)
        mask[2, 5:] = False
        batches = [
            {"image": image, "mask": own}
            for image, own in zip(images, mask, strict=True)
        ]
        labels = rng.integers(3, size=21).astype("int32")
        return setups.Dataset(None, 21, batches, labels, head)

    tasks = []
    for name in "abc":
        head = jnp.asarray(rng.normal(size=(3, 5)), "float32")
        tasks.append(
            setups.Task(name, name.upper(), None, {}, dataset(head), dataset(head))
        )
    fields = dict.fromkeys(setups.Setup._fields)
    fields["params_0"] = {"w": jnp.asarray(rng.normal(size=(4, 5)), "float32")}
    fields |= {"apply_fn": features, "tasks": tasks, "mesh": sharding.one_device()}
    taus = [{"w": jnp.asarray(rng.normal(size=(4, 5)), "float32")} for _ in tasks]
    return setups.Setup(**fields), taus


@pytest.fixture(scope="module")
def rows(model):
    return pairs.additions(*model, COEFS)


def test_both_measures_of_tau_jp_are_those_of_the_library(model):
    found = pairs.tau_jp(*model)
    setup, taus = model
    for power, measured in ((1, found.norm), (2, found.square)):
        datasets = [task.test.batches for task in setup.tasks]
        weights = (setup.apply_fn, setup.params_0, taus)
        expected = tau_jp.matrix(*weights, datasets, power=power)
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
    assert not np.allclose(found.norm, found.norm.T)  # vectors are the rows


def test_a_pair_has_the_mean_of_its_two_directions(model, rows):
    matrices = pairs.tau_jp(*model)
    for row, (i, j) in zip(rows, [(0, 1), (0, 2), (1, 2)], strict=True):
        assert row["pair"] == ["abc"[i], "abc"[j]]
        for name, matrix in zip(("tau_jp", "tau_jp_squared"), matrices, strict=True):
            expected = 0.5 * (matrix[i, j] + matrix[j, i])
            np.testing.assert_allclose(row[name], expected, rtol=1e-6)


def test_the_addition_of_a_pair_is_that_of_its_two_vectors_alone(model, rows):
    setup, taus = model
    for row, pair in zip(rows, pairwise.pairs(3), strict=True):
        own = pairwise.pair_setup(setup, pair)
        both = [taus[i] for i in pair]
        coefs = np.array([*((c, c) for c in COEFS), (1, 0), (0, 1)])

        def at(split, own=own, both=both, coefs=coefs):
            found = [
                scores.accuracies(own, both, getattr(task, split), True, coefs)
                for task in own.tasks
            ]
            return np.array(found).T[:-2], np.diag(np.array(found).T[-2:])

        curve, alone = at("validation")
        assert alone.all()
        best = int(np.argmax((curve / alone).mean(axis=1)))
        assert row["coefficient"] == COEFS[best]
        curve, alone = at("test")
        np.testing.assert_allclose(row["accuracies"], curve[best])
        np.testing.assert_allclose(row["abs"], 100 * curve[best].mean())
        np.testing.assert_allclose(row["norm"], 100 * (curve[best] / alone).mean())
    assert len({row["coefficient"] for row in rows}) > 1  # of each pair its own


def test_the_outputs_are_those_of_the_linearised_sum(model):
    setup, taus = model
    found = pairs.outputs(setup, taus, "test")
    for task, (dataset, at) in zip(setup.tasks, found, strict=True):
        assert dataset is task.test
        total = task_vectors.add(taus[1:])
        expected = evaluate.tangent(
            setup.apply_fn, setup.params_0, [total], dataset.batches
        )([0.5])
        np.testing.assert_allclose(at([0.0, 0.5, 0.5]), expected, atol=1e-5)


def test_correlations_are_of_each_method_and_of_both_and_skip_what_has_no_value():
    def point(method, tau_jp, norm):
        squared = tau_jp**2
        return dict(model="m", method=method, tau_jp=tau_jp, tau_jp_squared=squared,
                    norm=norm)  # fmt: skip

    linear = [(1.0, 9.0), (2.0, 7.0), (4.0, 1.0), (8.0, None)]
    ours = [(0.5, 10.0), (0.5, 9.5)]
    points = [point("Linear FT", *p) for p in linear]
    points += [point("Ours", *p) for p in ours]
    first, second, both = pairs.correlations(points, "norm")
    assert [row["pairs"] for row in (first, second, both)] == [3, 2, 5]
    assert first["spearman, tau_jp"] == -1
    expected = np.corrcoef([1, 2, 4], [9, 7, 1])[0, 1]
    np.testing.assert_allclose(first["pearson, tau_jp"], expected)
    expected = np.corrcoef([1, 4, 16], [9, 7, 1])[0, 1]
    np.testing.assert_allclose(first["pearson, tau_jp_squared"], expected)
    assert second["pearson, tau_jp"] is None  # one place only
    expected = metrics.spearman([1, 2, 4, 0.5, 0.5], [9, 7, 1, 10, 9.5])
    np.testing.assert_allclose(both["spearman, tau_jp"], expected)


def test_pairs_are_at_even_ranks():
    at_even_ranks = figure1_disentanglement.at_even_ranks
    assert at_even_ranks(list(range(28)), 4) == [0, 9, 18, 27]
    assert at_even_ranks([5, 3, 4], 4) == [5, 3, 4]


def test_pairs_are_named_in_any_order_and_must_be_of_the_tasks():
    named = figure1_disentanglement.named
    assert named((("d", "a"), ("a", "c")), list("abcd")) == {(0, 3), (0, 2)}
    for wrong in (("a", "e"), ("a", "a")):
        with pytest.raises(ValueError, match="give two of a, b, c, d"):
            named((wrong,), list("abcd"))


def test_the_figures_are_png_files(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    groups = {"one": ([1.0, 2.0], [3.0, None]), "two": ([1.5], [2.5])}
    plots.scatter(files[0], {"p": groups, "q": groups}, x="a", y="b")
    plots.two_scales(files[1], [0, 1], ("a", [1.0, None]), ("b", [8.0, 9.0]), x="c")
    grid = np.random.default_rng(0).random((5, 5))
    cells = [[("first", grid), ("second", grid)]] * 2
    coefs = np.linspace(-2, 2, 5)
    plots.disentanglement_of_pairs(files[2], cells, coefs, [("a", "b"), ("a", "c")])
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
