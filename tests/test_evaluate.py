"""Evaluation: padding, the tangent cache against forward passes, sweeps, ξ."""

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
    """τJp paper, Eq. 2, transcribed with a loop over everything."""
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
    matrix = tau_jp.matrix(apply_fn, PARAMS_0, TAUS, batches)
    for d, bs in enumerate(batches):
        at = evaluate.tangent(apply_fn, PARAMS_0, TAUS, bs)
        for t in range(2):
            moved = at(np.eye(2)[t]) - at(np.zeros(2))
            expected = np.linalg.norm(moved, axis=-1).mean()
            np.testing.assert_allclose(matrix[t, d], expected, rtol=1e-5)


def test_samples_of_batches_without_a_mask_all_count():
    batches = pipeline.evaluation_batches(source(3), 5)
    bare = [
        {name: field[batch["mask"]] for name, field in batch.items() if name != "mask"}
        for batch in batches
    ]
    for of in (evaluate.forward, evaluate.tangent):
        expected = of(apply_fn, PARAMS_0, TAUS, batches)([0.5, 1.0])
        found = of(apply_fn, PARAMS_0, TAUS, bare)([0.5, 1.0])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(evaluate.labels(bare), evaluate.labels(batches))
    datasets = [bare], [batches]
    found, expected = (tau_jp.matrix(apply_fn, PARAMS_0, TAUS, d) for d in datasets)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: (batch["image"], batch["label"]), "a batch is a tuple; .* dict"),
        (lambda batch: {"x": batch["image"]}, r"no field 'image'; it has 'x'.*inputs="),
        (lambda batch: batch | {"mask": np.ones((8, 2))}, r"mask .* expected \[8\]"),
    ],
)
def test_batches_of_another_kind_are_refused_with_what_to_write(change, message):
    batches = [change(batch) for batch in pipeline.evaluation_batches(source(3), 8)]
    for call in (
        lambda: evaluate.outputs(apply_fn, PARAMS_0, batches),
        lambda: evaluate.tangent(apply_fn, PARAMS_0, TAUS, batches),
        lambda: evaluate.sweep(apply_fn, PARAMS_0, TAUS, batches, [[0.0, 1.0]]),
        lambda: tau_jp.matrix(apply_fn, PARAMS_0, TAUS, [batches]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_generator_that_was_read_before_is_refused():
    batches = iter(pipeline.evaluation_batches(source(3), 8))
    at = evaluate.forward(apply_fn, PARAMS_0, TAUS, batches)
    at([0.0, 0.0])
    with pytest.raises(ValueError, match="a list, or a stream"):
        at([1.0, 1.0])


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


def test_a_sweep_of_several_vectors_is_a_sweep_of_each_and_reads_batches_once():
    read = []

    def batches():
        for batch in pipeline.evaluation_batches(source(3), 8):
            read.append(1)
            yield batch

    total = task_vectors.add(TAUS)
    several = [
        ([TAUS[0]], [[0.0], [0.3], [1.0]]),
        ([total], [[0.5], [0.0], [0.5]]),
        (TAUS, [[0.2, -0.7], [0.0, 0.0]]),
    ]
    mesh = sharding.make_mesh("data=1")
    model = (apply_fn, PARAMS_0)
    actual = evaluate.sweep_all(*model, several, batches(), mesh=mesh)
    assert len(read) == 3
    for (taus, coefs), found in zip(several, actual, strict=True):
        own = [
            evaluate.sweep(*model, taus, batches(), [point], mesh=mesh)[0]
            for point in coefs
        ]
        np.testing.assert_array_equal(found, own)


def test_a_sweep_computes_no_model_twice():
    runs = []

    def counted(params, x):
        jax.debug.callback(lambda: runs.append(1))
        return apply_fn(params, x)

    several = [
        ([TAUS[0]], [[0.0], [0.3], [0.3]]),
        ([TAUS[1]], [[0.0], [0.3], [-0.0]]),
    ]
    batches = pipeline.evaluation_batches(source(3), 23)
    first, second = evaluate.sweep_all(
        counted, PARAMS_0, several, batches, mesh=sharding.make_mesh("data=1")
    )
    jax.effects_barrier()
    assert len(runs) == 3  # of θ0, and of each vector at 0.3
    np.testing.assert_array_equal(first[1], first[2])
    np.testing.assert_array_equal(second[[0, 2]], first[[0, 0]])
    assert (first[1] != second[1]).any()


def test_a_sweep_of_nothing_is_refused():
    batches = pipeline.evaluation_batches(source(3), 8)
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate.sweep_all(apply_fn, PARAMS_0, [], batches)
