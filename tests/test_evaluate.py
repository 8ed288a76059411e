"""Evaluation: padding, the tangent cache against forward passes, searches, ξ."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarith import evaluate, metrics, sharding, tangent, task_vectors, tau_jp
from jaxarith.data import pipeline

CLASSES = 3


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def random_tree(seed, scale):
    rng = np.random.default_rng(seed)
    draw = {"a": rng.normal(size=(4, 6)), "b": rng.normal(size=(6, CLASSES))}
    return jax.tree.map(lambda leaf: jnp.asarray(scale * leaf, jnp.float32), draw)


PARAMS_0 = random_tree(0, 1.0)
TAUS = [random_tree(1, 0.4), random_tree(2, 0.4)]


def source(seed, size=23):
    rng = np.random.default_rng(seed)
    return [
        {"image": rng.normal(size=4).astype(np.float32), "label": rng.integers(CLASSES)}
        for _ in range(size)
    ]


def images(samples):
    return np.stack([record["image"] for record in samples])


def predict(outputs):
    return outputs.argmax(-1)


def test_outputs_are_those_of_every_sample_and_of_no_padding():
    samples = source(3)
    batches = pipeline.evaluation_batches(samples, 8)
    assert [batch["mask"].sum() for batch in batches] == [8, 8, 7]
    assert {batch["image"].shape for batch in batches} == {(8, 4)}
    actual = evaluate.outputs(apply_fn, PARAMS_0, batches)
    np.testing.assert_allclose(actual, apply_fn(PARAMS_0, images(samples)), rtol=1e-5)
    labels = [record["label"] for record in samples]
    assert evaluate.labels(batches).tolist() == labels


@pytest.mark.parametrize("coefs", [(0.0, 0.0), (1.0, 0.0), (0.3, -0.7)])
def test_forward_outputs_are_those_of_the_edited_model(coefs):
    samples = source(3)
    batches = pipeline.evaluation_batches(samples, 8)
    params = task_vectors.apply(PARAMS_0, TAUS[0], coefs[0])
    params = task_vectors.apply(params, TAUS[1], coefs[1])
    actual = evaluate.forward(apply_fn, PARAMS_0, TAUS, batches)(coefs)
    expected = apply_fn(params, images(samples))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coefs", [(0.0, 0.0), (1.0, 0.0), (0.3, -0.7)])
def test_the_tangent_cache_gives_the_outputs_of_the_linearised_model(coefs):
    samples = source(3)
    batches = pipeline.evaluation_batches(samples, 8)
    params = jax.tree.map(
        lambda p, a, b: p + coefs[0] * a + coefs[1] * b, PARAMS_0, *TAUS
    )
    expected = tangent.linearize(apply_fn, PARAMS_0)(params, images(samples))
    actual = evaluate.tangent(apply_fn, PARAMS_0, TAUS, batches)(coefs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_tangent_cache_drops_padding_and_keeps_the_dtype():
    batches = pipeline.evaluation_batches(source(3), 8)
    whole = pipeline.evaluation_batches(source(3), 23)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS_0)

    def narrow(params, x):
        return apply_fn(params, jnp.asarray(x, jnp.bfloat16))

    for params, function in ((PARAMS_0, apply_fn), (half, narrow)):
        at = evaluate.tangent(function, params, TAUS, batches)
        once = evaluate.tangent(function, params, TAUS, whole)
        assert at.f0.shape == (23, CLASSES) and at.moves.shape == (2, 23, CLASSES)
        assert at.moves.flags.c_contiguous  # or every sum would copy it
        assert at.f0.dtype == at.moves.dtype == params["a"].dtype
        for found, expected in zip(at, once, strict=True):
            found, expected = (np.asarray(x, np.float32) for x in (found, expected))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_tangent_cache_runs_the_network_once_whatever_is_asked_of_it():
    passes = []

    def counted(params, x):
        jax.debug.callback(lambda: passes.append(1))
        return apply_fn(params, x)

    at = evaluate.tangent(
        counted, PARAMS_0, TAUS, pipeline.evaluation_batches(source(3), 8)
    )
    jax.effects_barrier()
    before = len(passes)
    for coef in np.linspace(0, 1, 21):
        at((coef, coef))
    jax.effects_barrier()
    assert len(passes) == before == 3


def test_wrong_numbers_of_coefficients_are_refused():
    batches = pipeline.evaluation_batches(source(3), 8)
    for at in (evaluate.forward, evaluate.tangent):
        with pytest.raises(ValueError, match=r"\(3,\)|\[3\]"):
            at(apply_fn, PARAMS_0, TAUS, batches)((1, 1, 1))


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


def test_the_search_per_task_reads_the_tangent_cache():
    batches = [pipeline.evaluation_batches(source(s), 8) for s in (3, 4)]
    model = tangent.linearize(apply_fn, PARAMS_0)
    found = []
    for way, function in ((evaluate.tangent, apply_fn), (evaluate.forward, model)):
        outputs_at = [way(function, PARAMS_0, TAUS, bs) for bs in batches]
        labels = [predict(at((0.75, -0.5))) for at in outputs_at]
        pairs = list(zip(outputs_at, labels, strict=True))

        def accuracies_at(coefs, pairs=pairs):
            return [metrics.accuracy(at(coefs), truth) for at, truth in pairs]

        found.append(
            evaluate.search_per_task(accuracies_at, [1, 1], np.linspace(-1, 1, 9))
        )
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert found[0].normalized[-1] > found[0].normalized[0] + 0.1


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


def test_masks_may_be_integers():
    batches = pipeline.evaluation_batches(source(3), 8)
    numbered = [{**batch, "mask": batch["mask"].astype(int)} for batch in batches]
    for of in (evaluate.labels, lambda bs: evaluate.outputs(apply_fn, PARAMS_0, bs)):
        np.testing.assert_array_equal(of(numbered), of(batches))


def test_tangents_in_bfloat16_are_summed_in_float32():
    draw = np.random.default_rng(0).normal(size=(4, 5, CLASSES))
    at = evaluate.TangentOutputs(
        jnp.asarray(draw[0], jnp.bfloat16), np.asarray(draw[1:], jnp.bfloat16)
    )
    coefs = np.array([0.3, 0.301, -0.6])
    f0, moves = (np.asarray(x, np.float64) for x in at)
    found = at(coefs)
    assert found.dtype == np.float32
    expected = f0 + np.tensordot(coefs, moves, axes=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def xi_by_definition(outputs_at, coefs):
    """S0 Eq. 2, transcribed with a loop over everything."""
    grid = np.zeros((len(coefs), len(coefs)))
    for i, a in enumerate(coefs):
        for j, b in enumerate(coefs):
            for at, own in zip(outputs_at, ((a, 0.0), (0.0, b)), strict=True):
                alone, both = at(own).argmax(-1), at((a, b)).argmax(-1)
                grid[i, j] += np.mean(
                    [x != y for x, y in zip(alone, both, strict=True)]
                )
    return grid


@pytest.mark.parametrize("mode", [evaluate.forward, evaluate.tangent])
def test_xi_is_its_definition_and_zero_at_the_origin(mode):
    coefs = np.linspace(-2, 2, 5)
    outputs_at = [
        mode(apply_fn, PARAMS_0, TAUS, pipeline.evaluation_batches(source(s), 8))
        for s in (3, 4)
    ]
    grid = evaluate.disentanglement_error(outputs_at, [predict, predict], coefs)
    np.testing.assert_allclose(grid, xi_by_definition(outputs_at, coefs), atol=1e-12)
    assert grid[2, 2] == 0 and grid.max() > 0.1
    assert grid.shape == (5, 5) and (grid >= 0).all() and (grid <= 2).all()


def test_xi_from_the_cache_is_that_of_passes_of_the_linearised_model():
    batches = [pipeline.evaluation_batches(source(s), 8) for s in (3, 4)]
    coefs, model = np.linspace(-2, 2, 5), tangent.linearize(apply_fn, PARAMS_0)
    cached = [evaluate.tangent(apply_fn, PARAMS_0, TAUS, bs) for bs in batches]
    passes = [evaluate.forward(model, PARAMS_0, TAUS, bs) for bs in batches]
    grids = [
        evaluate.disentanglement_error(way, [predict, predict], coefs)
        for way in (cached, passes)
    ]
    np.testing.assert_allclose(grids[0], grids[1], atol=1e-12)
    for pair in itertools.product(coefs, repeat=2):
        for ours, expected in zip(cached, passes, strict=True):
            np.testing.assert_allclose(ours(pair), expected(pair), rtol=1e-5, atol=1e-5)
    ordinary = [evaluate.forward(apply_fn, PARAMS_0, TAUS, bs) for bs in batches]
    other = evaluate.disentanglement_error(ordinary, [predict, predict], coefs)
    assert np.abs(other - grids[0]).max() > 0.1


def test_xi_needs_two_tasks():
    with pytest.raises(ValueError, match="two tasks"):
        evaluate.disentanglement_error([None], [predict], [0.0])


def test_tau_jp_from_the_cache_equals_the_metric():
    batches = [pipeline.evaluation_batches(source(s), 8) for s in (3, 4)]
    data = [[((b["image"],), b["mask"]) for b in bs] for bs in batches]
    matrix = tau_jp.matrix(apply_fn, PARAMS_0, TAUS, data)
    for d, bs in enumerate(batches):
        at = evaluate.tangent(apply_fn, PARAMS_0, TAUS, bs)
        for t in range(2):
            moved = at(np.eye(2)[t]) - at(np.zeros(2))
            expected = np.linalg.norm(moved, axis=-1).mean()
            np.testing.assert_allclose(matrix[t, d], expected, rtol=1e-5)


def test_accuracy_counts_only_what_the_mask_says():
    logits, labels = np.eye(4), np.array([0, 1, 0, 0])
    assert metrics.accuracy(logits, labels) == 0.5
    assert metrics.accuracy(logits, labels, np.array([1, 1, 1, 0], bool)) == 2 / 3
    with pytest.raises(ValueError, match="no sample"):
        metrics.accuracy(logits, labels, np.zeros(4, bool))


def test_normalised_accuracy_is_the_mean_of_ratios_not_the_ratio_of_means():
    assert metrics.normalized_accuracy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="zero"):
        metrics.normalized_accuracy([0.4, 0.9], [0.0, 0.9])
    with pytest.raises(ValueError, match="merged accuracies"):
        metrics.normalized_accuracy([0.4], [0.5, 0.9])


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


@pytest.mark.parametrize("count", [1, 8, 9, 21])
def test_a_sweep_of_any_length_is_one_pass_after_the_other(count):
    batches = pipeline.evaluation_batches(source(3), 8)
    coefs = np.random.default_rng(4).normal(size=(count, len(TAUS)))
    at = evaluate.forward(apply_fn, PARAMS_0, TAUS, batches)
    actual = evaluate.sweep(
        apply_fn, PARAMS_0, TAUS, batches, coefs, mesh=sharding.make_mesh("data=1")
    )
    expected = np.stack([at(point) for point in coefs])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_sweeps_of_all_lengths_are_one_program():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return apply_fn(params, x)

    batches = pipeline.evaluation_batches(source(3), 8)
    for count in (1, 9, 21):
        evaluate.sweep(
            counted,
            PARAMS_0,
            TAUS,
            batches,
            np.ones((count, len(TAUS))),
            mesh=sharding.make_mesh("data=1"),
        )
    assert len(traced) == 1
