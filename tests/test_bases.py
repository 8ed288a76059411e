"""Task vector bases: clusters from cosines, their merges, and arithmetic with them."""

import builtins
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal

from jaxarith import merge, task_vectors, tree
from jaxarith.merge.bases import cluster, eigengap
from jaxarith.merge.bases_arithmetic import similarities
from jaxarith.merge.stitch_twice import stitched_masks


def planted(sizes, within=0.6, between=0.02, order=None):
    """Cosines of groups of similar task vectors, and the groups."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels if order is None else labels[order]
    cosines = np.where(labels[:, None] == labels[None], within, between)
    np.fill_diagonal(cosines, 1)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(len(sizes))]
    return cosines, sorted(groups)


def vectors_with(cosines, size=40):
    """Task vectors `[T, size]` with exactly these cosines and unequal norms."""
    tasks = len(cosines)
    frame = np.linalg.qr(normal(5, size, tasks))[0].T
    return np.linspace(1, 2, tasks)[:, None] * (np.linalg.cholesky(cosines) @ frame)


def trees(taus):
    return [{"a": {"w": tau[:24].reshape(4, 6)}, "b": tau[24:]} for tau in taus]


def flat(tau):
    return np.concatenate([np.ravel(tau["a"]["w"]), np.ravel(tau["b"])])


@pytest.mark.parametrize(
    "sizes", [[2, 2], [3, 2, 4], [1, 3], [2, 2, 2, 1, 1], [5, 5, 5]], ids=str
)
@pytest.mark.parametrize("between", [0.0, 0.02])
def test_planted_blocks_are_the_clusters(sizes, between):
    cosines, groups = planted(sizes, between=between)
    assert cluster(cosines, len(sizes)) == groups
    assert cluster(cosines, len(sizes), seed=7) == groups


@pytest.mark.parametrize("sizes", [[3, 3], [4, 4, 4], [3, 3, 3, 3]], ids=str)
def test_eigengap_finds_the_planted_number(sizes):
    cosines, groups = planted(sizes)
    assert eigengap(cosines) == len(sizes)
    assert cluster(cosines) == groups


@settings(max_examples=30)
@given(tasks=st.integers(3, 9), seed=st.integers(0, 99))
def test_eigengap_is_line_3_of_the_algorithm(tasks, seed):
    taus = normal(seed, tasks, 12)
    taus[1] -= 3 * taus[0]
    norms = np.linalg.norm(taus, axis=1)
    cosines = taus @ taus.T / norms[:, None] / norms[None]
    affinity = np.abs(cosines)
    laplacian = np.diag(affinity.sum(axis=1)) - affinity
    assert (cosines < 0).any()
    # λ^(1) … λ^(T), and the i of 1 < i ≤ T - 1 with the largest λ^(i+1) - λ^(i).
    eigenvalues = {i + 1: x for i, x in enumerate(np.linalg.eigvalsh(laplacian))}
    gaps = {i: eigenvalues[i + 1] - eigenvalues[i] for i in range(2, tasks)}
    assert eigengap(cosines) == max(gaps, key=gaps.get)


def test_signs_do_not_matter_to_the_clusters_without_a_threshold():
    cosines, groups = planted([3, 3, 3])
    signs = np.sign(normal(0, 9))
    assert len(set(signs)) == 2
    assert cluster(cosines * np.outer(signs, signs)) == groups


@pytest.mark.parametrize("negative", [-0.01, -0.3, -0.59])
def test_negative_directions_are_split(negative):
    cosines, _ = planted([4, 3, 4])
    signs = np.array([1, -1, -1, 1, 1, 1, 1, -1, 1, 1, 1])
    signed = cosines * np.outer(signs, signs)
    found = cluster(signed, 3, negative=negative)
    # A cluster whose cosines are all positive stays whole.
    assert found == [[0, 3], [1, 2], [4, 5, 6], [7], [8, 9, 10]]
    assert len(cluster(signed, 3, negative=-0.7)) == 3


def test_two_opposite_tasks_are_split():
    cosines = [[1, -0.9, 0, 0], [-0.9, 1, 0, 0], [0, 0, 1, 0.9], [0, 0, 0.9, 1]]
    assert cluster(jnp.array(cosines), 2) == [[0, 1], [2, 3]]
    assert cluster(jnp.array(cosines), 2, negative=-0.5) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("seed", range(4))
def test_permuting_the_tasks_permutes_the_clusters(seed):
    order = np.random.default_rng(seed).permutation(9)
    cosines, groups = planted([2, 3, 4])
    permuted = cluster(cosines[np.ix_(order, order)], 3)
    assert sorted(sorted(order[members].tolist()) for members in permuted) == groups


def test_as_many_clusters_as_tasks_and_one_cluster():
    cosines, _ = planted([2, 2])
    assert cluster(cosines, 4) == [[0], [1], [2], [3]]
    assert cluster(cosines, 1) == [[0, 1, 2, 3]]


def test_a_zero_task_vector_can_be_clustered():
    cosines, groups = planted([3, 3])
    cosines = np.pad(cosines, ((0, 1), (0, 1)))
    assert [6] in cluster(cosines, 3)
    assert cluster(cosines, 3)[:2] == groups


def test_basis_vectors_are_the_inner_merges_of_the_clusters():
    with jax.enable_x64(True):
        cosines, groups = planted([3, 4, 3], order=np.argsort(normal(3, 10)))
        assert groups[0] != [0, 1, 2]
        taus = vectors_with(cosines)
        params_0 = trees(normal(0, 1, 40))[0]
        found = merge.basis_vectors(params_0, trees(taus))
        assert found.clusters == groups
        np.testing.assert_allclose(found.cosines, cosines, atol=1e-12)
        for vector, members in zip(found.vectors, groups, strict=True):
            expected = taus[members].mean(axis=0)
            np.testing.assert_allclose(flat(vector), expected, rtol=1e-10, atol=1e-12)


def test_inner_is_any_merge():
    inner = functools.partial(merge.ties, density=0.3, coef=0.4)
    params_0, taus = trees(normal(0, 1, 40))[0], trees(normal(1, 4, 40))
    found = merge.basis_vectors(params_0, taus, inner=inner, clusters=[[0, 3, 1], [2]])
    for vector, members in zip(found.vectors, [[0, 3, 1], [2]], strict=True):
        merged = inner(params_0, [taus[i] for i in members])
        expected = task_vectors.difference(merged, params_0)
        jax.tree.map(np.testing.assert_array_equal, vector, expected)
        assert np.any(flat(vector))


def test_mean_of_means_of_equal_clusters_is_the_mean():
    params_0, taus = trees(normal(0, 1, 40))[0], trees(normal(1, 6, 40))
    found = merge.basis_vectors(params_0, taus, clusters=[[0, 4, 2], [1, 3, 5]])
    merged = merge.average(params_0, found.vectors)
    expected = merge.average(params_0, taus)
    np.testing.assert_allclose(flat(merged), flat(expected), rtol=1e-6, atol=1e-6)
    unequal = merge.basis_vectors(params_0, taus, clusters=[[0], [1, 2, 3, 4, 5]])
    merged = merge.average(params_0, unequal.vectors)
    assert np.abs(flat(merged) - flat(expected)).max() > 0.1


def test_a_basis_vector_has_the_leaves_of_its_members_in_float32():
    params_0 = {
        "a": jnp.full(3, 100, jnp.bfloat16),
        "b": jnp.ones(2),
        "n": jnp.array(1),
    }
    taus = [{"a": jnp.full(3, 0.01)}, {"b": jnp.ones(2)}, {"a": jnp.full(3, 0.03)}]
    found = merge.basis_vectors(params_0, taus, clusters=[[0, 2], [1]])
    assert [list(vector) for vector in found.vectors] == [["a"], ["b"]]
    assert found.vectors[0]["a"].dtype == jnp.float32
    np.testing.assert_allclose(found.vectors[0]["a"], 0.02, rtol=1e-3)


def test_clusters_are_given_or_numbered():
    cosines, groups = planted([2, 2, 2])
    taus, params_0 = trees(vectors_with(cosines)), trees(np.zeros((1, 40)))[0]
    for number in (3, np.int64(3)):
        assert merge.basis_vectors(params_0, taus, clusters=number).clusters == groups
    given = [[5, 0], [1, 2, 3, 4]]
    found = merge.basis_vectors(params_0, taus, clusters=np.array(given, object))
    assert found.clusters == given


PARTITIONS = {
    "missing": [[0], [1]],
    "twice": [[0, 1], [1, 2]],
    "out of range": [[0, 1], [2, 3]],
    "empty": [[0, 1, 2], []],
}


@pytest.mark.parametrize("clusters", PARTITIONS.values(), ids=PARTITIONS)
def test_what_is_no_partition_is_an_error(clusters):
    tau = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="no partition of the 3 tasks"):
        merge.basis_vectors({"w": jnp.zeros(2)}, [tau] * 3, clusters=clusters)
    masks = [{"w": jnp.ones(2, bool)}] * 3
    with pytest.raises(ValueError, match="no partition of the 3 tasks"):
        merge.mask_sharing(masks, clusters)
    with pytest.raises(ValueError, match="no partition of the 3 tasks"):
        merge.stitch_twice(
            {"w": jnp.zeros(2)}, [tau] * 3, masks=masks, clusters=clusters
        )


def test_errors_of_the_clustering():
    cosines, _ = planted([2, 2])
    with pytest.raises(ValueError, match="found 2 task vectors; the eigengap needs"):
        cluster(np.eye(2))
    with pytest.raises(ValueError, match="clusters is 5 for 4 task vectors"):
        cluster(cosines, 5)
    with pytest.raises(ValueError, match=r"negative is 0.5; it must be in \[-1, 0\)"):
        cluster(cosines, 2, negative=0.5)
    taus, params_0 = trees(vectors_with(cosines)), trees(np.zeros((1, 40)))[0]
    halves = dict(clusters=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"negative is -2; it must be in \[-1, 0\)"):
        merge.basis_vectors(params_0, taus, negative=-2, **halves)
    with pytest.raises(ValueError, match="negative is -0.5, but a given"):
        merge.basis_vectors(params_0, taus, negative=-0.5, **halves)
    with pytest.raises(ValueError, match=r"shape \[2, 4\]; expected \[T, T\]"):
        cluster(cosines[:2])
    with pytest.raises(ValueError, match="inside `jit`; pass a partition"):
        jax.jit(lambda cosines: cluster(cosines, 2))(cosines)


def test_missing_scikit_learn_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs scikit-learn: pip install"):
        cluster(planted([2, 2])[0], 2)


BASES = [{"w": jnp.array([3.0, 0, 0])}, {"w": jnp.array([0, 2.0, 0])}]


def test_negation_subtracts_the_most_similar_basis():
    params_0 = {"w": jnp.ones(3), "b": jnp.ones(2)}
    for tau, nearest in ([2.0, 1, 5], 0), ([-9.0, 0.1, 0], 1):
        tau = {"w": jnp.array(tau)}
        merged = merge.bases_negation(params_0, BASES, tau, coef=0.3)
        expected = task_vectors.apply(params_0, BASES[nearest], -0.3)
        jax.tree.map(np.testing.assert_array_equal, merged, expected)
        jitted = jax.jit(functools.partial(merge.bases_negation, coef=0.3))
        merged = jitted(params_0, BASES, tau)
        jax.tree.map(np.testing.assert_allclose, merged, expected)


def test_negation_of_a_task_that_no_basis_is_similar_to_is_an_error():
    params_0 = {"w": jnp.ones(3)}
    for tau in ([0.0, 0, 0], [0.0, 0, 5], [-1.0, -2, 0]):
        tau = {"w": jnp.array(tau)}
        with pytest.raises(ValueError, match="no basis vector is similar"):
            merge.bases_negation(params_0, BASES, tau)
        merged = jax.jit(merge.bases_negation)(params_0, BASES, tau)
        assert np.isfinite(merged["w"]).all()


def test_similarities_are_cosines_with_every_vector():
    with jax.enable_x64(True):
        taus = normal(1, 5, 40)
        tau, *vectors = trees(taus)
        del vectors[2]["b"]
        taus[3, 24:] = 0
        norms = np.linalg.norm(taus, axis=1)
        expected = taus[1:] @ taus[0] / norms[1:] / norms[0]
        np.testing.assert_allclose(similarities(vectors, tau), expected, rtol=1e-10)


def score(goal):
    return lambda params: -float(jnp.sum((params["w"] - jnp.array(goal)) ** 2))


def test_generalization_takes_the_most_similar_basis_and_the_best_coefficient():
    params_0, tau = {"w": jnp.zeros(3)}, {"w": jnp.array([0.1, 0.3, 0.0])}
    found = merge.bases_generalization(params_0, BASES, tau, score([3.0, 1.3, 0]))
    assert found.chosen == [1]
    assert found.coef == pytest.approx(0.65)
    np.testing.assert_allclose(found.params["w"], [0, 1.3, 0], rtol=1e-6)
    assert found.score == pytest.approx(-9.0)
    assert len(found.vectors) == 2


def test_generalization_merges_the_bases_above_the_threshold():
    params_0, tau = {"w": jnp.zeros(3)}, {"w": jnp.array([0.4, 0.3, 0.0])}
    options = dict(threshold=0.55, coefs=[1.0, 0.5], outer=merge.task_arithmetic)
    found = merge.bases_generalization(
        params_0, BASES, tau, score([1.5, 1.0, 0]), **options
    )
    assert (found.chosen, found.coef) == ([0, 1], 0.5)
    np.testing.assert_allclose(found.params["w"], [1.5, 1, 0])
    options["threshold"] = 0.7
    found = merge.bases_generalization(
        params_0, BASES, tau, score([3, 0, 0]), **options
    )
    assert (found.chosen, found.coef) == ([0], 1.0)


def test_an_unrelated_task_becomes_a_basis():
    params_0, tau = {"w": jnp.zeros(3)}, {"w": jnp.array([0.0, 0.1, 2.0])}
    found = merge.bases_generalization(
        params_0, BASES, tau, score([0.0, 0, 2]), threshold=0.5
    )
    assert (found.chosen, found.coef, found.score) == ([], 0.0, -4.0)
    assert found.params is params_0
    assert found.vectors[:2] == BASES and found.vectors[2] is tau


def test_the_first_of_equal_scores_wins_and_nan_is_an_error():
    params_0, tau = {"w": jnp.zeros(3)}, BASES[0]
    find = functools.partial(merge.bases_generalization, params_0, BASES, tau)
    assert find(lambda params: 1.0, coefs=[0.2, 0.1]).coef == 0.2
    with pytest.raises(ValueError, match="coefficient 0.2 is NaN"):
        find(lambda params: float("nan"), coefs=[0.2])
    with pytest.raises(ValueError, match="no coefficient to try"):
        find(lambda params: 1.0, coefs=[])


def masks_of(bits):
    """`bool[T, 10]` as T trees."""
    return [{"w": jnp.array(row[:6].reshape(2, 3)), "b": row[6:]} for row in bits]


def bits_of(masks):
    return np.array([np.concatenate([np.ravel(m["w"]), m["b"]]) for m in masks])


CLUSTERS = [[0, 3], [1, 2, 4], [5]]
BITS = np.random.default_rng(0).random((6, 10)) < 0.5


def test_mask_sharing_rounds_the_mean_mask_of_every_cluster():
    shared = merge.mask_sharing(masks_of(BITS), CLUSTERS, half=False)
    expected, half = np.zeros_like(BITS), 0
    for members in CLUSTERS:
        mean = np.mean(BITS[members].astype(float), axis=0)
        expected[members] = np.round(mean)  # to even
        half += np.sum(mean == 0.5)
    assert half and expected.any() and not expected.all()
    np.testing.assert_array_equal(bits_of(shared), expected)
    assert shared[1]["w"] is shared[4]["w"]
    kept = bits_of(merge.mask_sharing(masks_of(BITS), CLUSTERS))
    assert kept.sum() == expected.sum() + 2 * half


def test_stitch_twice_is_two_normalisations():
    with jax.enable_x64(True):
        taus, theta_0 = normal(2, 6, 10), normal(3, 10)

        def as_tree(x):
            return {"w": jnp.asarray(x[:6].reshape(2, 3)), "b": jnp.asarray(x[6:])}

        merged = merge.stitch_twice(
            *(as_tree(theta_0), [as_tree(tau) for tau in taus]),
            **dict(masks=masks_of(BITS), clusters=CLUSTERS),
        )
        once = np.zeros(BITS.shape)
        for members in CLUSTERS:
            total = np.maximum(BITS[members].sum(axis=0), 1)
            once[members] = np.round(BITS[members] / total)
        overlap = once.sum(axis=0)
        assert (overlap > 1).any() and (overlap == 0).any()
        expected = theta_0 + np.sum(once / np.maximum(overlap, 1) * taus, axis=0)
        actual = np.concatenate([merged["w"].ravel(), merged["b"]])
        np.testing.assert_allclose(actual, expected, rtol=1e-10)
        np.testing.assert_array_equal(
            bits_of(stitched_masks(masks_of(BITS), CLUSTERS)), once
        )


@pytest.mark.parametrize("mix", [merge.mask_sharing, stitched_masks])
def test_masks_that_are_not_bool_are_an_error(mix):
    masks = masks_of(BITS)
    masks[2]["b"] = masks[2]["b"].astype(np.float32)
    with pytest.raises(ValueError, match="mask 2 has float32 at b; expected bool"):
        mix(masks, CLUSTERS)


def test_clusters_of_one_task_change_no_mask():
    alone = [[i] for i in range(6)]
    for masks in (
        merge.mask_sharing(masks_of(BITS), alone),
        stitched_masks(masks_of(BITS), alone),
    ):
        np.testing.assert_array_equal(bits_of(masks), BITS)


def test_shared_masks_keep_the_leaves_of_every_task():
    masks = [{"a": jnp.ones(2, bool)}, {"a": jnp.ones(2, bool), "b": jnp.ones(1, bool)}]
    shared = merge.mask_sharing([*masks, masks[1]], [[0, 1, 2]])
    assert list(shared[0]) == ["a"] and shared[1]["b"].all()
    stitched = stitched_masks(masks, [[0, 1]])
    assert not stitched[0]["a"].any() and stitched[1]["b"].all()
    assert tree.flatten(stitched[0]).keys() == {"a"}
