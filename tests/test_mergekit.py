"""mergekit's definitions against NumPy transcriptions, one tensor at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge
from jaxarith.merge import mergekit

SHAPES = {
    "a.matrix": (6, 10),
    "c.conv": (3, 4, 2, 2),
    "d.one": (1,),
    "f.none": (0, 3),
}
DEFAULTS = {  # consensus, normalize, rescale
    "task_arithmetic": (False, False, False),
    "ties": (True, True, False),
    "breadcrumbs": (False, False, False),
    "breadcrumbs_ties": (True, False, False),
    "dare_linear": (False, False, True),
    "dare_ties": (True, False, True),
    "della": (True, True, True),
    "della_linear": (False, False, True),
}
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


def leaves(seed, scale=1.0):
    return {path: scale * normal((seed, *s), *s) for path, s in SHAPES.items()}


def task_vectors(count):
    return [leaves(10 + i, scale=1 + i) for i in range(count)]


def in_float32(tree):
    """Two leaves, for every method compiles them anew."""
    return {path: np.float32(tree[path]) for path in ("a.matrix", "d.one")}


def zeros():
    return {path: np.zeros(shape) for path, shape in SHAPES.items()}


def assert_merged(actual, expected, rtol=1e-10):
    assert actual.keys() == SHAPES.keys()
    for path, shape in SHAPES.items():
        assert actual[path].shape == shape
        np.testing.assert_allclose(
            actual[path], expected(path), rtol=rtol, atol=rtol, err_msg=path
        )


# Task arithmetic, TIES, breadcrumbs.


def sparse(tau, density, gamma, rescale):
    """Without the ⌊gamma·n⌋ largest entries, the int(density·n) largest that follow."""
    if density >= 1:
        return tau
    order = np.argsort(-np.abs(tau.ravel()))
    count = max(int(density * tau.size), 1) if density > 0 else 0
    first = min(int(gamma * tau.size), tau.size - count)
    kept = np.zeros_like(tau)
    kept.ravel()[order[first : first + count]] = 1
    kept = kept * tau
    if rescale and np.abs(kept).sum():
        kept *= np.abs(tau).sum() / np.abs(kept).sum()
    return kept


def combined(theta_0, taus, weights, coef, consensus, normalize):
    weights = np.reshape(weights, (-1,) + (1,) * theta_0.ndim)
    scaled = weights * np.stack(taus)
    agree = np.ones_like(scaled)
    if consensus:
        elected = np.where(scaled.sum(axis=0) >= 0, 1, -1)
        agree = np.sign(scaled) == elected
    total = (weights * agree).sum(axis=0)
    total = np.where(np.abs(total) < 1e-8, 1, total)
    return theta_0 + coef * (scaled * agree).sum(axis=0) / (total if normalize else 1)


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize(
    ("method", "density", "gamma"),
    [
        ("task_arithmetic", 1.0, 0.0),
        ("ties", 0.4, 0.0),
        ("ties", [1.0, 0.29, 0.0], 0.0),
        ("breadcrumbs", 0.5, 0.1),
        ("breadcrumbs", [0.9, 0.05, 1.0], [0.2, 0.0, 0.3]),
        ("breadcrumbs_ties", 0.3, 0.2),
    ],
)
def test_the_task_arithmetic_family(x64, method, density, gamma, normalize):
    theta_0, taus, weights = leaves(0), task_vectors(3), [0.5, 1.0, -0.3]
    merged = mergekit.generalized_task_arithmetic(
        *(theta_0, taus),
        **{"method": method, "weight": weights, "density": density, "gamma": gamma},
        **{"normalize": normalize, "coef": 0.7},
    )
    consensus, default, _ = DEFAULTS[method]
    densities, gammas = (np.broadcast_to(share, 3) for share in (density, gamma))

    def expected(path):
        kept = [
            sparse(tau[path], *shares, False)
            for tau, *shares in zip(taus, densities, gammas, strict=True)
        ]
        how = consensus, default if normalize is None else normalize
        return combined(theta_0[path], kept, weights, 0.7, *how)

    assert_merged(merged, expected)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_what_is_kept_can_be_scaled_to_the_sum_of_magnitudes(x64, method):
    tau = leaves(1)
    options = {"method": method, "weight": 1.0, "density": 0.4, "rescale": True}
    merged = mergekit.generalized_task_arithmetic(zeros(), [tau], **options)
    gamma = 0.01 if method == "breadcrumbs" else 0
    assert_merged(merged, lambda path: sparse(tau[path], 0.4, gamma, rescale=True))
    for path in SHAPES:
        total = np.abs(tau[path]).sum()
        np.testing.assert_allclose(np.abs(merged[path]).sum(), total, rtol=1e-10)


def test_weights_densities_and_coefficients_may_differ_by_path(x64):
    theta_0, taus = leaves(0), task_vectors(2)

    def by_path(path):
        return path.startswith("a")

    merged = mergekit.generalized_task_arithmetic(
        theta_0,
        taus,
        method="ties",
        weight=lambda path: [0.2, 0.9] if by_path(path) else 1.0,
        density=lambda path: 0.2 if by_path(path) else [0.5, 0.8],
        coef=lambda path: 2.0 if by_path(path) else 0.5,
    )

    def expected(path):
        weights = [0.2, 0.9] if by_path(path) else [1.0, 1.0]
        densities = [0.2, 0.2] if by_path(path) else [0.5, 0.8]
        coef = 2.0 if by_path(path) else 0.5
        kept = [
            sparse(t[path], d, 0, False) for t, d in zip(taus, densities, strict=True)
        ]
        return combined(theta_0[path], kept, weights, coef, True, True)

    assert_merged(merged, expected)


def test_equal_entries_at_the_threshold_are_all_kept():
    tau = {"w": jnp.array([1.0, -1.0, 1.0, 0.5, 2.0])}
    options = {"method": "ties", "weight": 1.0, "density": 0.4}
    merged = mergekit.generalized_task_arithmetic({"w": jnp.zeros(5)}, [tau], **options)
    np.testing.assert_array_equal(merged["w"], [1, -1, 1, 0, 2])


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_one_entry_of_a_small_leaf_stays(method, size):
    tau = {"w": jnp.arange(1.0, size + 1)}
    options = {"method": method, "weight": 1.0, "density": 0.1}
    merged = mergekit.generalized_task_arithmetic(
        {"w": jnp.zeros(size)}, [tau], **options
    )
    np.testing.assert_array_equal(merged["w"], np.arange(1, size + 1) // size * size)


def test_what_agrees_with_an_operator_has_its_bits():
    theta_0 = in_float32(leaves(0))
    taus = [in_float32(tau) for tau in task_vectors(3)]
    weights = [0.3, 0.4, 0.5]
    family = mergekit.generalized_task_arithmetic
    mine = family(theta_0, taus, method="task_arithmetic", weight=weights)
    theirs = merge.task_arithmetic(theta_0, taus, coef=weights)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    mine = family(theta_0, taus, method="ties", weight=weights, density=0.3)
    options = {"preset": "mergekit", "weights": weights, "density": 0.3}
    theirs = merge.ties(theta_0, taus, **options)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    key = jax.random.key(3)
    options = {"weight": 1.0, "density": 0.5, "rescale": False, "key": key}
    mine = family(theta_0, taus, method="dare_linear", **options)
    options = {"drop_rate": 0.5, "rescale": "none", "key": key}
    theirs = merge.dare(theta_0, taus, **options)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize("size", [50, 70_000])  # the second is sampled first
def test_densities_of_several_tasks_are_exact_in_leaves_of_any_size(size):
    taus = [{"w": np.float32(normal(i, size))} for i in range(2)]
    merged = mergekit.generalized_task_arithmetic(
        *({"w": np.zeros(size, np.float32)}, taus),
        **{"method": "breadcrumbs", "weight": [1.0, 0.0], "density": [0.31, 0.6]},
        gamma=[0.1, 0.0],
    )["w"]
    count = int(0.31 * size)
    order = np.argsort(-np.abs(taus[0]["w"]))
    kept = np.sort(order[int(0.1 * size) :][:count])
    np.testing.assert_array_equal(np.flatnonzero(merged), kept)


# The random ones.


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_the_density_and_the_sum_of_magnitudes(method):
    tau = {"w": jnp.asarray(normal(0, 50, 400), jnp.float32)}
    params_0 = {"w": jnp.zeros((50, 400))}
    merged = mergekit.generalized_task_arithmetic(
        *(params_0, [tau]),
        **{"method": method, "weight": 1.0, "density": 0.3, "key": jax.random.key(0)},
    )["w"]
    kept = np.asarray(merged) != 0
    # Five deviations of the mean of 20,000 draws.
    assert abs(kept.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / kept.size)
    total = np.abs(tau["w"]).sum()
    np.testing.assert_allclose(np.abs(merged).sum(), total, rtol=1e-5)
    ratios = np.asarray(merged)[kept] / np.asarray(tau["w"])[kept]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


def test_dare_without_rescaling_keeps_the_density_in_the_mean():
    tau = {"w": jnp.ones(100)}
    options = {"method": "dare_linear", "weight": 1.0, "density": 0.25}

    def draw(key):
        return mergekit.generalized_task_arithmetic(
            {"w": jnp.zeros(100)}, [tau], rescale=False, key=key, **options
        )["w"]

    draws = [draw(key) for key in jax.random.split(jax.random.key(0), 40)]
    mean = float(np.mean(draws))
    assert abs(mean - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_della_keeps_entries_with_probabilities_that_rise_along_the_second_axis():
    tau = jnp.tile(jnp.arange(1.0, 6.0)[None, :, None], (4000, 1, 2))
    merged = mergekit.generalized_task_arithmetic(
        {"w": jnp.zeros_like(tau)},
        [{"w": tau}],
        **{"method": "della_linear", "weight": 1.0, "rescale": False},
        **{"density": 0.5, "epsilon": 0.2, "key": jax.random.key(0)},
    )["w"]
    rates = np.mean(np.asarray(merged) != 0, axis=(0, 2))
    # Five deviations of the mean of 8,000 draws.
    np.testing.assert_allclose(rates, [0.3, 0.4, 0.5, 0.6, 0.7], atol=0.028)


@pytest.mark.parametrize("method", RANDOM)
def test_random_entries_depend_on_key_path_and_task_alone(method):
    theta_0 = in_float32(leaves(0))
    taus = [in_float32(tau) for tau in task_vectors(2)]

    def merged(paths, seed):
        part, *parts = ({path: x[path] for path in paths} for x in (theta_0, *taus))
        options = {"method": method, "weight": 1.0, "density": 0.4}
        return mergekit.generalized_task_arithmetic(
            part, parts, key=jax.random.key(seed), **options
        )

    whole = merged(["a.matrix", "d.one"], 0)["a.matrix"]
    np.testing.assert_array_equal(merged(["a.matrix"], 0)["a.matrix"], whole)
    assert not np.array_equal(merged(["a.matrix"], 1)["a.matrix"], whole)


@pytest.mark.parametrize("method", RANDOM)
def test_a_density_of_one_keeps_all_and_of_zero_nothing(x64, method):
    theta_0, taus = leaves(0), task_vectors(2)
    options = {"method": method, "weight": [1.0, 0.5], "key": jax.random.key(0)}
    merged = mergekit.generalized_task_arithmetic(
        theta_0, taus, density=[1.0, 0.0], **options
    )
    consensus, normalize, _ = DEFAULTS[method]
    assert_merged(
        merged,
        lambda path: combined(
            *(theta_0[path], [taus[0][path], 0 * taus[1][path]], [1, 0.5], 1.0),
            *(consensus, normalize),
        ),
    )


# The models themselves.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("base", [zeros, lambda: leaves(0)])
def test_linear_sums_models(x64, normalize, base):
    theta_0, taus = base(), task_vectors(3)
    weights = {"a.matrix": [2.0, -0.5, 1.0]}

    def weight(path):
        return weights.get(path, 0.4)

    merged = mergekit.linear(theta_0, taus, weight=weight, normalize=normalize)

    def expected(path):
        w = np.broadcast_to(weight(path), 3)
        w = w / w.sum() if normalize else w
        return sum(
            w * (theta_0[path] + tau[path]) for w, tau in zip(w, taus, strict=True)
        )

    assert_merged(merged, expected)


def arc(a, b, t, threshold, least):
    """Weights of SLERP between vectors along the last axis."""

    def length(x):
        return np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), least)

    cosine = (a * b).sum(-1, keepdims=True) / length(a) / length(b)
    angle = np.arccos(np.where(np.abs(cosine) > threshold, 0, cosine))
    curved = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.where(np.abs(cosine) > threshold, (1 - t) * a + t * b, curved)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_on_whole_models_and_linear_where_they_are_nearly_parallel(x64, t):
    models = task_vectors(2)
    models[1]["c.conv"] = 1.5 * models[0]["c.conv"] + 1e-3 * models[1]["c.conv"]
    models[0]["d.one"] = np.zeros(1)  # at a right angle to the other
    merged = mergekit.slerp(
        zeros(), models, t=lambda path: 0.8 if path == "a.matrix" else t
    )

    def expected(path):
        a, b = (model[path].reshape(-1) for model in models)
        at = 0.8 if path == "a.matrix" else t
        return arc(a, b, at, 0.9995, 1e-300).reshape(SHAPES[path])

    assert_merged(merged, expected)
    assert 0 < t < 1 or np.isclose(merged["d.one"], t * models[1]["d.one"]).all()


@pytest.mark.parametrize("base", [zeros, lambda: leaves(0)])
@pytest.mark.parametrize(
    ("flatten", "row_wise"), [(True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("weight", [[1.0, 3.0], [0.7, -0.7], [3.0, -1.0]])
def test_nuslerp_of_leaves_or_along_an_axis(x64, base, flatten, row_wise, weight):
    theta_0, taus = base(), task_vectors(2)
    options = {"weight": weight, "flatten": flatten, "row_wise": row_wise}
    merged = mergekit.nuslerp(theta_0, taus, **options)
    t = 0.5 if sum(weight) == 0 else weight[1] / sum(weight)

    def expected(path):
        a, b = (tau[path] for tau in taus)
        axis = 0 if row_wise else -1
        if flatten or not a.ndim:
            a, b, axis = a.reshape(-1), b.reshape(-1), 0
        vectors = (np.moveaxis(x, axis, -1) for x in (a, b))
        moved = np.moveaxis(arc(*vectors, t, 1 - 1e-14, 1e-7), -1, axis)
        return theta_0[path] + moved.reshape(SHAPES[path])

    assert_merged(merged, expected)


def multislerp(vectors, weights, eps=1e-8):
    """By the tangent space at the mean, as mergekit goes about it."""
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / (norm + eps) for v, norm in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangents = [u - (u @ mean) * mean for u in units]
    step = sum(w * v for w, v in zip(weights, tangents, strict=True))
    length = np.linalg.norm(step) + eps
    assert length < 1e-7  # it vanishes: the mean is where the weighted vectors cancel
    moved = np.cos(length) * mean + np.sin(length) / length * step
    return moved * sum(w * norm for w, norm in zip(weights, norms, strict=True))


@pytest.mark.parametrize("base", [zeros, lambda: leaves(0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_the_mean_direction_times_the_mean_norm(x64, base, normalize):
    theta_0, taus, weights = base(), task_vectors(3), np.array([0.5, 1.0, 0.7])
    options = {"weight": weights, "normalize": normalize}
    merged = mergekit.multislerp(theta_0, taus, **options)
    weights = weights / weights.sum() if normalize else weights

    def expected(path):
        if not theta_0[path].size:
            return theta_0[path]
        moved = multislerp([tau[path].reshape(-1) for tau in taus], weights)
        return theta_0[path] + moved.reshape(SHAPES[path])

    # mergekit's ε leaves vectors of length one shorter by it, in the cosine too.
    assert_merged(merged, expected, rtol=1e-7)


def test_multislerp_adds_where_there_is_no_direction():
    params_0 = {"w": jnp.ones(3), "v": jnp.ones(3)}
    tau = jnp.array([1.0, 2.0, 2.0])
    taus = [{"w": s * tau, "v": 0 * tau} for s in (1.0, -0.5, -0.5, 2.0, -2.0, 3.0)]
    taus[-1]["w"] = 0 * tau
    merged = mergekit.multislerp(params_0, taus[:3], weight=[2.0, 1.0, 1.0])
    np.testing.assert_allclose(merged["w"], 1 + 0.25 * tau, rtol=1e-6)
    np.testing.assert_array_equal(merged["v"], params_0["v"])
    single = mergekit.multislerp(params_0, taus[:1], weight=0.3, normalize=False)
    np.testing.assert_array_equal(single["w"], 1 + tau)


def test_karcher_of_models_is_where_their_logarithms_cancel(x64):
    models = task_vectors(3)
    merged = mergekit.karcher(zeros(), models, max_iter=50, tol=1e-9)
    for path in ("a.matrix", "c.conv"):
        mean, *vectors = (np.ravel(leaf[path]) for leaf in (merged, *models))
        norms = [np.linalg.norm(v) for v in vectors]
        np.testing.assert_allclose(np.linalg.norm(mean), np.mean(norms), rtol=1e-10)
        mean, pull = mean / np.linalg.norm(mean), 0
        for vector, norm in zip(vectors, norms, strict=True):
            cosine = mean @ vector / norm
            angle = np.arccos(cosine)
            pull += angle / np.sin(angle) * (vector / norm - cosine * mean)
        np.testing.assert_allclose(pull, 0, atol=1e-8)


# Model Stock, SCE, NearSwap.


@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the second has norms below the bound
def test_model_stock_with_cosines_as_they_are(x64, filter_wise, scale):
    theta_0 = leaves(0)
    taus = [jax.tree.map(lambda x: scale * x, tau) for tau in task_vectors(3)]
    merged = mergekit.model_stock(theta_0, taus, filter_wise=filter_wise)
    ratios = []

    def expected(path):
        rows = [
            t[path] if filter_wise and t[path].ndim else t[path].ravel() for t in taus
        ]
        cosines = []
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            norms = [np.sqrt((rows[k] ** 2).sum(-1)) for k in (i, j)]
            product = np.maximum(norms[0] * norms[1], 1e-6)
            cosines.append(np.clip((rows[i] * rows[j]).sum(-1) / product, -1, 1))
        cosine = np.mean(cosines, axis=0)[..., None]
        divisor = 1 + 2 * cosine
        fine = np.abs(divisor) >= 1e-6
        ratio = np.where(fine, 3 * cosine / np.where(fine, divisor, 1), 0)
        ratios.extend(ratio.ravel())
        return theta_0[path] + (ratio * np.mean(rows, axis=0)).reshape(SHAPES[path])

    assert_merged(merged, expected)
    assert min(ratios) < 0 < max(ratios)


def test_model_stock_stays_where_the_formula_has_no_value():
    params_0 = {"w": jnp.array([5.0])}
    taus = [{"w": jnp.array([1.0])}, {"w": jnp.array([-3.0])}]
    np.testing.assert_array_equal(mergekit.model_stock(params_0, taus)["w"], [5.0])


@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the second has equal weights
@pytest.mark.parametrize("share", [1.0, 0.45, 0.01, 0.0])
def test_sce_selects_weighs_and_erases(x64, share, scale):
    theta_0 = leaves(0)
    taus = [jax.tree.map(lambda x: scale * x, tau) for tau in task_vectors(3)]
    for tau in taus[1:]:
        tau["a.matrix"][:3] = taus[0]["a.matrix"][:3]  # without variance
    merged = mergekit.sce(theta_0, taus, select_topk=share)

    def expected(path):
        stacked = np.stack([tau[path].ravel() for tau in taus])
        if share < 1:
            variance = stacked.var(axis=0) * (np.ptp(stacked, axis=0) > 0)
            count = max(int(np.count_nonzero(variance) * share), 1) if share else 0
            kept = np.zeros(len(variance))
            kept[np.argsort(-variance)[:count]] = 1
            stacked = stacked * kept
        squares = (stacked**2).mean(axis=1)
        few = squares.sum() < 1e-6
        weights = np.full(3, 1 / 3) if few else squares / squares.sum()
        agree = np.sign(stacked) == np.where(stacked.sum(axis=0) >= 0, 1, -1)
        weights = weights[:, None] * agree
        total = np.maximum(weights.sum(axis=0), 1e-6)
        moved = (weights * stacked).sum(axis=0) / total
        return theta_0[path] + moved.reshape(SHAPES[path])

    with np.errstate(invalid="ignore"):
        assert_merged(merged, lambda p: expected(p) if theta_0[p].size else theta_0[p])


def test_nearswap_takes_near_entries_over(x64):
    theta_0, tau = leaves(0), leaves(1)
    tau["c.conv"][0, 0] = [[0, 1e-8]] * 2
    merged = mergekit.nearswap(
        theta_0, [tau], t=lambda path: 0.5 if path == "a.matrix" else 1e-7
    )

    def expected(path):
        t = 0.5 if path == "a.matrix" else 1e-7
        share = np.clip(t / np.maximum(np.abs(tau[path]), 1e-6), 0, 1)
        return theta_0[path] + share * tau[path]

    assert_merged(merged, expected)
    assert 0 < np.sum(np.abs(tau["a.matrix"]) < 0.5) < tau["a.matrix"].size


# All of them.

METHODS = {
    "linear": (mergekit.linear, {"weight": 1.0}, 2),
    "slerp": (mergekit.slerp, {"t": 0.4}, 2),
    "nuslerp": (mergekit.nuslerp, {"weight": [1.0, 2.0]}, 2),
    "multislerp": (mergekit.multislerp, {"weight": 1.0}, 3),
    "karcher": (mergekit.karcher, {}, 3),
    "model_stock": (mergekit.model_stock, {}, 3),
    "sce": (mergekit.sce, {"select_topk": 0.5}, 3),
    "nearswap": (mergekit.nearswap, {"t": 0.3}, 1),
} | {
    name: (
        mergekit.generalized_task_arithmetic,
        {"method": name, "weight": 0.6, "density": 0.5, "key": jax.random.key(0)},
        3,
    )
    for name in DEFAULTS
}
ALL = pytest.mark.parametrize(
    ("method", "options", "count"), METHODS.values(), ids=METHODS
)


@ALL
def test_sums_are_in_float32_and_cast_once(method, options, count):
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), leaves(0))
    params_0 = {path: rounded[path] for path in ("a.matrix", "d.one")}
    taus = [in_float32(tau) for tau in task_vectors(count)]
    merged = method(params_0, taus, **options)
    wide = method(jax.tree.map(np.float32, params_0), taus, **options)
    for path, leaf in merged.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wide[path].astype(jnp.bfloat16))
    assert not np.array_equal(merged["a.matrix"], params_0["a.matrix"])


@pytest.mark.parametrize("name", ["linear", "nuslerp", "sce", "ties", "della"])
def test_a_jitted_merge_agrees(name):
    method, options, count = METHODS[name]
    params_0 = in_float32(leaves(0))
    taus = [in_float32(tau) for tau in task_vectors(count)]
    jitted = jax.jit(lambda params_0, taus: method(params_0, taus, **options))
    merged = method(params_0, taus, **options)
    for path, leaf in jitted(params_0, taus).items():
        # XLA contracts products and sums in other places.
        np.testing.assert_allclose(leaf, merged[path], rtol=1e-5, atol=1e-6)


def test_wrong_options_are_errors():
    params_0, tau = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    family = mergekit.generalized_task_arithmetic

    def fails(message, function, taus, **options):
        with pytest.raises(ValueError, match=message):
            function(params_0, taus, **options)

    fails("unknown method 'tie'", family, [tau], method="tie", weight=1.0)
    ties = {"method": "ties", "weight": 1.0}
    fails(r"density of w is 1.2.*in \[0, 1\]", family, [tau], **ties, density=1.2)
    fails("density of w has shape", family, [tau], **ties, density=[0.1, 0.2])
    fails("dare_ties needs a key", family, [tau], method="dare_ties", weight=1.0)
    della = {"method": "della", "weight": 1.0, "key": jax.random.key(0)}
    fails("epsilon .* must be in", family, [tau], **della, density=0.9)
    fails("weights sum to zero", mergekit.linear, [tau] * 2, weight=[1.0, -1.0])
    of_path = r"weights of w sum to zero"
    fails(of_path, mergekit.multislerp, [tau], weight=lambda path: 0.0)
    fails("exactly two models; found 3", mergekit.slerp, [tau] * 3, t=0.5)
    fails("exactly two models; found 1", mergekit.nuslerp, [tau], weight=0.5)
    fails("found 2 task vectors", mergekit.nearswap, [tau] * 2, t=0.5)
    fails("at least 2 task vectors", mergekit.model_stock, [tau])
    fails("select_topk is 2.0", mergekit.sce, [tau], select_topk=2.0)
