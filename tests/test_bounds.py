"""The theorems of task vector bases as claims about losses that are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import normal

from jaxarith import task_vectors
from jaxarith.evaluate import bounds, landscape
from jaxarith.evaluate import smoothness as curvature

SIZE, TASKS = 6, 3
SEEDS = range(200)


@pytest.fixture(autouse=True)
def float64(x64):
    yield


def trees(taus):
    return [{"w": tau} for tau in taus]


def symmetric(rng, *, convex):
    """A matrix of spectral norm 1."""
    axes, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    values = rng.uniform(0 if convex else -1, 1, size=SIZE)
    return axes * (values / np.abs(values).max()) @ axes.T


def quadratic(matrix, minimum):
    """A loss of which `minimum` is a stationary point, as a function of θ - θ0."""
    return lambda w: 0.5 * (w - minimum) @ matrix @ (w - minimum)


def instance(seed):
    """Task vectors, convex coefficients, and for each task a loss and its L."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=SIZE) * rng.uniform(-2, 2)
    taus = rng.normal(size=(TASKS, SIZE)) + rng.choice([-1, 0, 1]) * common
    smoothness = rng.uniform(0.1, 3, size=TASKS)
    matrices = [s * symmetric(rng, convex=seed % 2) for s in smoothness]
    losses = [quadratic(*pair) for pair in zip(matrices, taus, strict=True)]
    return taus, rng.dirichlet(np.full(TASKS, 0.3)), losses, smoothness


def test_the_constants_are_their_definitions():
    taus = normal(0, 4, SIZE)
    c, epsilon = bounds.constants(trees(taus))
    assert c == pytest.approx((taus**2).sum(1).max(), rel=1e-12)
    cosines = [
        a @ b / np.sqrt(a @ a * (b @ b)) for i, a in enumerate(taus) for b in taus[:i]
    ]
    assert epsilon == pytest.approx(np.abs(cosines).max(), rel=1e-12)
    assert bounds.constants(trees(taus[:1])).epsilon == 0
    index, c, beta = bounds.closest({"w": taus[3]}, trees(taus[:3]))
    products = taus[:3] @ taus[3]
    assert index == products.argmax()
    assert c * beta == pytest.approx(products.max(), rel=1e-12)
    assert c == pytest.approx((taus**2).sum(1).max(), rel=1e-12)


def test_no_merged_model_loses_more_than_the_bound():
    shares = []
    for seed in SEEDS:
        taus, coefs, losses, smoothness = instance(seed)
        limit = bounds.addition(smoothness, *bounds.constants(trees(taus)))
        gaps = [
            loss(coefs @ taus) - loss(t) for loss, t in zip(losses, taus, strict=True)
        ]
        shares.extend(gaps / limit)
    assert max(shares) <= 1
    assert max(shares) > 0.4  # at half the bound the claim would be near to wrong


def test_no_task_loses_more_by_negation_than_the_bound():
    shares, quadratics = [], []
    for seed in SEEDS:
        taus, coefs, losses, smoothness = instance(seed)
        c, epsilon = bounds.constants(trees(taus))
        limits = bounds.negation(smoothness, c, epsilon)
        for j, loss in enumerate(losses):
            for i in set(range(TASKS)) - {j}:
                gap = loss(-(coefs[i] ** 0.2) * taus[i]) - loss(0 * taus[i])
                shares.append(gap / limits[j])
                quadratics.append(gap / (smoothness[j] * c * np.sqrt(5 + 4 * epsilon)))
    assert max(shares) <= 1 and max(shares) > 0.4
    assert 2 * max(quadratics) <= 1


def test_the_closest_vector_generalizes_within_the_bound():
    shares = []
    for seed in SEEDS:
        taus, _, losses, smoothness = instance(seed)
        *sources, target = taus
        index, c, beta = bounds.closest({"w": target}, trees(sources))
        limit = bounds.generalization(smoothness[-1], c, beta)
        shares.append((losses[-1](sources[index]) - losses[-1](target)) / limit)
    assert 0.4 < max(shares) <= 1


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9])
def test_addition_and_generalization_attain_their_bounds(cosine):
    """And negation attains the most that quadratic losses can."""
    c, smoothness = 2.0, 3.0
    one = np.sqrt(c) * np.array([1.0, 0.0])
    other = np.sqrt(c) * np.array([cosine, np.sqrt(1 - cosine**2)])
    steepest = quadratic(smoothness * np.eye(2), one)
    opposite = np.array([-1.0, 1.0]) * other
    found = bounds.constants(trees([one, opposite]))
    np.testing.assert_allclose(found, (c, cosine), rtol=1e-12, atol=1e-12)
    gap = steepest(opposite) - steepest(one)  # coefficients 0 and 1
    assert gap == pytest.approx(bounds.addition(smoothness, *found), rel=1e-12)

    index, c, beta = bounds.closest({"w": one}, trees([-one, other]))
    assert index == 1
    gap = steepest(other) - steepest(one)
    assert gap == pytest.approx(bounds.generalization(smoothness, c, beta), rel=1e-12)

    # The steepest way up after forgetting, and down before it, of both at once.
    values, axes = np.linalg.eigh(
        np.outer(one + other, one + other) - np.outer(one, one)
    )
    loss = quadratic(smoothness * axes * np.sign(values) @ axes.T, one)
    gap = loss(-other) - loss(0 * other)
    most = smoothness * c * np.sqrt(5 + 4 * cosine) / 2
    assert gap == pytest.approx(most, rel=1e-12)
    assert gap < bounds.negation(smoothness, c, cosine)


def partitions(count):
    """All partitions of so many tasks."""
    found = [[]]
    for task in range(count):
        found = [
            own
            for groups in found
            for own in (
                *(
                    [*groups[:i], [*group, task], *groups[i + 1 :]]
                    for i, group in enumerate(groups)
                ),
                [*groups, [task]],
            )
        ]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_clusters_are_those_of_the_means(seed):
    taus = normal(seed, 4, SIZE) + 0.5
    gram = taus @ taus.T
    for clusters in partitions(4):
        means = [taus[members].mean(axis=0) for members in clusters]
        found = bounds.of_clusters(gram, clusters)
        expected = bounds.addition(1.0, *bounds.constants(trees(means)))
        assert found.addition == pytest.approx(expected, rel=1e-10)
        c = np.diag(gram).max()
        losses = [
            bounds.generalization(1.0, c, max(tau @ mean for mean in means) / c)
            for tau in taus
        ]
        assert found.generalization == pytest.approx(max(losses), rel=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_one_cluster_is_least_for_addition_and_all_for_generalization(seed):
    taus = normal(seed, 4, 3) + np.random.default_rng(seed).choice([-1, 0, 1])
    gram = taus @ taus.T
    found = [bounds.of_clusters(gram, clusters) for clusters in partitions(4)]
    one = bounds.of_clusters(gram, [[0, 1, 2, 3]])
    every = bounds.of_clusters(gram, [[0], [1], [2], [3]])
    assert one.addition <= min(x.addition for x in found) * (1 + 1e-12)
    assert every.generalization <= min(x.generalization for x in found) + 1e-12
    # Strictly, unless one task vector serves all.
    assert one.addition < every.addition
    assert one.generalization > every.generalization


def test_the_fewest_clusters_are_planted_ones_and_keep_the_tolerance():
    labels = np.repeat([0, 1, 2], [3, 2, 1])
    gram = np.where(labels[:, None] == labels, 0.8, 0.01) + 0.2 * np.eye(6)
    gram[np.diag_indices(6)] = 1.0
    planted = [[0, 1, 2], [3, 4], [5]]
    # Of three equal vectors with cosine c the loss is 1 - (1 + 2c) / 3.
    loss = bounds.of_clusters(gram, planted).generalization
    assert loss == pytest.approx(1 - 2.6 / 3, rel=1e-10)
    assert bounds.fewest_clusters(gram, loss + 1e-9) == planted
    assert bounds.fewest_clusters(gram, 0) == [[i] for i in range(6)]
    assert bounds.fewest_clusters(gram, 1) == [list(range(6))]
    counts = [len(bounds.fewest_clusters(gram, x)) for x in np.linspace(0, 1, 5)]
    assert counts == sorted(counts, reverse=True)
    with pytest.raises(ValueError, match="tolerance is -0.1; it must be 0 or more"):
        bounds.fewest_clusters(gram, -0.1)


def logistic(params, x):
    return x @ params["w"]


def problem(seed, size=40):
    """A task of logistic regression, and its task vector from zero, by Newton."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 3))
    y = rng.uniform(size=size) < 1 / (1 + np.exp(-3 * x @ rng.normal(size=3)))
    w = np.zeros(3)
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x / size
        w = w - np.linalg.solve(hessian, x.T @ (p - y) / size)
    batch = {"image": x, "label": y.astype(float), "mask": np.ones(size, bool)}
    return [batch], {"w": w}, hessian


def smoothness_at(params, batches):
    found = curvature.largest_eigenvalue(
        *(logistic, optax.sigmoid_binary_cross_entropy, params, batches),
        **dict(key=jax.random.key(0), tolerance=1e-8),
    )
    return found.smoothness


def test_logistic_regression_keeps_the_bound_with_the_library_alone():
    params_0 = {"w": jnp.zeros(3)}
    problems = [problem(seed) for seed in range(3)]
    taus = [tau for _, tau, _ in problems]
    found = bounds.constants(taus)
    coefs = [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    for i, (batches, tau, hessian) in enumerate(problems):
        own = smoothness_at(task_vectors.apply(params_0, tau), batches)
        assert own == pytest.approx(np.linalg.norm(hessian, 2), rel=1e-8)
        *merged, single = landscape.losses(
            *(logistic, optax.sigmoid_binary_cross_entropy, params_0, taus, batches),
            [*coefs, np.eye(3)[i]],
        )
        for row, loss in zip(coefs, merged, strict=True):
            edited = {"w": sum(c * t["w"] for c, t in zip(row, taus, strict=True))}
            move = task_vectors.difference(edited, tau)
            largest = max(
                smoothness_at(task_vectors.apply(tau, move, c), batches)
                for c in np.linspace(0, 1, 5)
            )
            assert 0 <= loss - single <= bounds.addition(largest, *found)


def test_the_hessian_at_the_fine_tuned_model_alone_does_not_bound_the_loss():
    """The paper's L: one sample in 200 has the other label, so the minimum is flat."""
    labels = (np.arange(200) < 199).astype(float)
    x = np.tile([1.0, 0.0], (200, 1))
    batches = [{"image": x, "label": labels, "mask": np.ones(200, bool)}]
    length = np.log(199)  # the logit of 199 / 200
    taus = [{"w": length * np.array([1.0, 0.0])}, {"w": length * np.array([0.0, 1.0])}]
    merged, single = landscape.losses(
        *(logistic, optax.sigmoid_binary_cross_entropy, {"w": jnp.zeros(2)}, taus),
        *(batches, [[0, 1], [1, 0]]),
    )
    at_minimum, largest = (smoothness_at(params, batches) for params in taus)
    assert at_minimum == pytest.approx(0.995 * 0.005, rel=1e-8)
    assert largest == pytest.approx(0.25, rel=1e-8)
    found = bounds.constants(taus)
    assert merged - single > 3 * bounds.addition(at_minimum, *found)
    assert merged - single <= bounds.addition(largest, *found)


def test_no_task_vector_is_an_error():
    with pytest.raises(ValueError, match="no task vectors"):
        bounds.constants([])
    with pytest.raises(ValueError, match="no task vector to"):
        bounds.closest({"w": np.ones(2)}, [])
