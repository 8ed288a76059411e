"""mergekit's task arithmetic and its random methods against NumPy transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mergekit_trees import SHAPES, assert_merged, leaves, task_vectors, zeros
from oracles import normal

from jaxarith import merge
from jaxarith.merge import mergekit

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


def in_float32(tree):
    """Two leaves, for every method compiles them anew."""
    return {path: np.float32(tree[path]) for path in ("a.matrix", "d.one")}


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
    options = {"trim": "tensor", "weights": weights, "density": 0.3}
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
    "arcee_fusion": (mergekit.arcee_fusion, {}, 1),
    "ram": (mergekit.ram, {}, 3),
    "ramplus_tl": (mergekit.ramplus_tl, {}, 3),
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
    fails("one task vector; found 2", mergekit.nearswap, [tau] * 2, t=0.5)
    fails("at least 2 task vectors", mergekit.model_stock, [tau])
    fails("select_topk is 2.0", mergekit.sce, [tau], select_topk=2.0)
