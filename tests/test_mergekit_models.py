"""mergekit's averages of models, Model Stock, SCE and NearSwap against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mergekit_trees import SHAPES, assert_merged, leaves, task_vectors, zeros

from jaxarith.merge import mergekit

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
