"""TIES against a NumPy transcription of the authors' code, on adversarial vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxarith import merge
from jaxarith.merge import _order
from jaxarith.merge.ties import trim_thresholds

SIZE = 60  # entries of a task vector, cut into three leaves


def cut(vector):
    return {
        "a": vector[:24].reshape(4, 6),
        "b": {"scalar": vector[24], "rest": vector[25:]},
    }


def join(tree):
    parts = tree["a"].ravel(), tree["b"]["scalar"][None], tree["b"]["rest"]
    return np.concatenate([np.asarray(part) for part in parts])


def cancelling(seed):
    """Half of the entries cancel exactly between the tasks, at several magnitudes."""
    taus = quantised(seed)
    taus[1, ::2] = -taus[0, ::2]
    taus[2, ::2] = 0
    return taus


def quantised(seed):
    """Few distinct magnitudes: many entries at the threshold, and many zeros."""
    return np.round(2 * oracles.normal(seed, 3, SIZE)) / 4


def subnormal(seed):
    taus = oracles.normal(seed, 3, SIZE)
    taus[:, ::3] *= 1e-30
    taus[0, 1::3] = 0
    return taus


VECTORS = {
    "Gaussian": lambda seed: oracles.normal(seed, 3, SIZE),
    "quantised": quantised,
    "cancelling": cancelling,
    "of many scales": subnormal,
    "zero in one task": lambda seed: quantised(seed) * np.array([[1], [0], [1]]),
    "all equal": lambda seed: np.ones((3, SIZE)),
    "negative majority": lambda seed: (
        cancelling(seed) - 0.25 * (np.arange(SIZE) % 3 == 1)
    ),
}
DENSITIES = [0.001, 0.2, 0.29, 0.5, 1.0]  # 0.001: int(60 · 0.001) = 0


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("taus", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_is_the_authors_algorithm(taus, density, dtype):
    with jax.enable_x64(True):
        for seed in range(3):
            theta_0 = oracles.normal((seed, 9), SIZE).astype(dtype)
            vectors = taus(seed).astype(dtype)
            expected = oracles.ties(theta_0, vectors, density, coef=0.7)
            merged = merge.ties(
                cut(theta_0), [cut(tau) for tau in vectors], density=density, coef=0.7
            )
            tolerance = {"float32": 1e-6, "float64": 1e-12}[dtype]
            assert merged["a"].dtype == dtype
            np.testing.assert_allclose(
                join(merged), expected, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("aggregate", ["sum", "max"])
@pytest.mark.parametrize("taus", VECTORS.values(), ids=VECTORS)
def test_agreeing_entries_are_summed_or_the_largest_taken(taus, aggregate):
    theta_0 = oracles.normal(9, SIZE).astype(np.float32)
    vectors = taus(0).astype(np.float32)
    expected = oracles.ties(theta_0, vectors, 0.3, 0.7, aggregate)
    merged = merge.ties(
        cut(theta_0),
        [cut(tau) for tau in vectors],
        **dict(density=0.3, coef=0.7, aggregate=aggregate),
    )
    np.testing.assert_allclose(join(merged), expected, rtol=1e-6, atol=1e-6)


def test_the_preset_of_adamerging_is_the_sum_at_coefficient_three_tenths():
    taus = oracles.normal(0, 3, SIZE).astype(np.float32)
    expected = oracles.ties(np.zeros(SIZE), taus, 0.2, 0.3, "sum")
    merged = merge.ties(
        cut(np.zeros(SIZE, np.float32)), [cut(t) for t in taus], preset="adamerging"
    )
    np.testing.assert_allclose(join(merged), expected, rtol=1e-6, atol=1e-6)


def mergekit_ties(tau_leaves, weights, density):
    """One tensor `[task, n]` as mergekit merges it: weights before the election."""
    kept = max(int(density * tau_leaves.shape[1]), 1)
    trimmed = np.zeros_like(tau_leaves)
    for row, tau in zip(trimmed, tau_leaves, strict=True):
        largest = np.argsort(np.abs(tau))[-kept:]
        row[largest] = tau[largest]
    weighted = weights[:, None] * trimmed
    sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    divisor = (weights[:, None] * agree).sum(axis=0)
    return (weighted * agree).sum(axis=0) / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_mergekits_definition_trims_every_tensor(density):
    taus = oracles.normal(0, 3, SIZE).astype(np.float32)
    taus[:, 30] = [0.5, -0.25, 0]  # cancels under the weights: its sign is positive
    weights = np.array([1.0, 2.0, 0.5])
    merged = merge.mergekit.generalized_task_arithmetic(
        cut(np.zeros(SIZE, np.float32)),
        [cut(tau) for tau in taus],
        method="ties",
        density=density,
        weight=weights,
    )
    leaves = [taus[:, :24], taus[:, 24:25], taus[:, 25:]]
    expected = [mergekit_ties(leaf, weights, density) for leaf in leaves]
    np.testing.assert_allclose(
        join(merged), np.concatenate(expected), rtol=1e-6, atol=1e-6
    )


def test_a_coefficient_may_depend_on_the_path():
    params_0, taus = cut(oracles.normal(9, SIZE)), [cut(oracles.normal(1, SIZE))]
    whole = merge.ties(params_0, taus, coef=0.5)
    parts = merge.ties(
        params_0, taus, coef=lambda path: 0.5 if path.startswith("b/") else 0.0
    )
    np.testing.assert_array_equal(parts["b"]["rest"], whole["b"]["rest"])
    np.testing.assert_array_equal(parts["a"], params_0["a"].astype(np.float32))
    assert np.any(np.asarray(whole["a"]) != np.asarray(parts["a"]))


@pytest.mark.parametrize("name", ["preset", "trim", "aggregate"])
def test_unknown_options_are_errors_that_name_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown {name} 'median'; known are "):
        merge.ties({"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}], **{name: "median"})


def test_bfloat16_vectors_are_merged_in_float32():
    taus = jnp.asarray(oracles.normal(0, 3, SIZE), jnp.bfloat16)
    theta_0 = jnp.asarray(oracles.normal(1, SIZE), jnp.bfloat16)
    wide = np.asarray(taus, np.float32)
    expected = oracles.ties(np.asarray(theta_0, np.float32), wide, 0.2)
    merged = merge.ties(cut(theta_0), [cut(tau) for tau in taus], density=0.2)
    np.testing.assert_array_equal(join(merged), jnp.asarray(expected, jnp.bfloat16))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(list(VECTORS)),
    density=st.floats(1e-3, 1.0),
)
def test_thresholds_are_exact_order_statistics(seed, name, density):
    vectors = VECTORS[name](seed).astype(np.float32)
    rows = {
        "a": tuple(tau[:24].reshape(4, 6) for tau in vectors),
        "b": tuple(tau[24:] for tau in vectors),
    }
    expected = oracles.ties_thresholds(vectors, SIZE - int(SIZE * density))
    np.testing.assert_array_equal(trim_thresholds(rows, density), expected)


def test_thresholds_of_many_bfloat16_entries_are_exact():
    vectors = jnp.asarray(oracles.normal(0, 2, 10_000), jnp.bfloat16)
    thresholds = trim_thresholds({"w": tuple(vectors)}, 0.2)
    expected = oracles.ties_thresholds(np.asarray(vectors, np.float32), 8000)
    np.testing.assert_array_equal(thresholds, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e30])
def test_thresholds_of_many_entries_of_a_mixture_are_exact(scale):
    # Enough entries for the first guess to come from a sample, which is far off here:
    # the rows that it looks at are all zero.
    values = (oracles.normal(0, 2, 1200, 1000) * scale).astype(np.float32)
    values[:, ::64] = 0
    values[1, :, :300] = values[1, 0, 0]
    for density in (0.01, 0.2, 0.9):
        thresholds = trim_thresholds({"w": tuple(values)}, density)
        flat = values.reshape(2, -1)
        expected = oracles.ties_thresholds(flat, flat.shape[1] - int(density * 1.2e6))
        np.testing.assert_array_equal(thresholds, expected)


def test_density_keeps_the_largest_entries_of_the_whole_vector():
    params_0 = {"large": jnp.zeros(5), "small": jnp.zeros(5)}
    tau = {"large": 1.0 + jnp.arange(5), "small": 0.01 * (1 + jnp.arange(5))}
    merged = merge.ties(params_0, [tau], density=0.2)  # ⌊2⌋ + 1 entries
    np.testing.assert_array_equal(merged["large"], [0, 0, 3, 4, 5])
    np.testing.assert_array_equal(merged["small"], np.zeros(5))


def test_disjoint_supports_add_up():
    taus = np.zeros((3, 12), np.float32)
    for task in range(3):
        taus[task, task::3] = oracles.normal(task, 4)
    merged = merge.ties(
        {"w": jnp.zeros(12)}, [{"w": tau} for tau in taus], density=0.25
    )
    np.testing.assert_array_equal(merged["w"], taus.sum(axis=0))


@pytest.mark.parametrize(("rest", "expected"), [(1.0, 2.0), (-1.0, -2.0)])
def test_exact_cancellation_takes_the_sign_of_the_majority(rest, expected):
    taus = [{"w": jnp.array([2.0]), "v": jnp.full(3, rest)}, {"w": jnp.array([-2.0])}]
    merged = merge.ties({"w": jnp.zeros(1), "v": jnp.zeros(3)}, taus, density=1.0)
    np.testing.assert_array_equal(merged["w"], [expected])


def test_exact_cancellation_without_majority_stays_at_zero():
    taus = [{"w": jnp.array([2.0, 1.0, -1.0])}, {"w": jnp.array([-2.0, 1.0, -1.0])}]
    merged = merge.ties({"w": jnp.zeros(3)}, taus, density=1.0)
    np.testing.assert_array_equal(merged["w"], [0, 1, -1])


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 20, float("nan")])
def test_density_out_of_range_is_an_error(density):
    with pytest.raises(ValueError, match=r"density is .*; it must be in \(0, 1\]"):
        merge.ties({"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}], density=density)


@pytest.mark.parametrize("joined", [0, 2**30])
@pytest.mark.parametrize("shape", [(3, 70_000), (2, 3, 40_000), (140_000,), (80, 900)])
def test_thresholds_of_leaves_with_few_or_many_rows_are_exact(
    shape, joined, monkeypatch
):
    monkeypatch.setattr(_order, "JOINED", joined)
    values = oracles.normal(0, 2, *shape).astype(np.float32)
    rows = {"w": tuple(values), "scale": (np.float32(2), np.float32(3))}
    flat = np.concatenate([values.reshape(2, -1), [[2], [3]]], axis=1, dtype=np.float32)
    expected = oracles.ties_thresholds(flat, flat.shape[1] - int(0.2 * flat.shape[1]))
    np.testing.assert_array_equal(trim_thresholds(rows, 0.2), expected)


@pytest.mark.parametrize("whole", [0, 2**30])
def test_thresholds_of_leaves_are_exact_in_one_program_and_in_several(
    whole, monkeypatch
):
    monkeypatch.setattr(_order, "WHOLE", whole)
    monkeypatch.setattr(_order, "JOINED", 0)
    row = np.round(2 * oracles.normal(0, 3, 2**17)).astype(np.float32)
    for rank in (1, 2**16, np.array([5, 2**17, 2**13])):
        found = _order.kth_of_leaf(tuple(map(jnp.asarray, row)), rank)
        of_task = np.broadcast_to(rank, 3) - 1
        expected = np.sort(np.abs(row))[np.arange(3), of_task]
        np.testing.assert_array_equal(found, expected)
    nothing = _order.kth_of_leaf((jnp.zeros((0, 3)),) * 2, 1)
    np.testing.assert_array_equal(nothing, [0, 0])


def test_models_of_more_than_2_to_the_31_entries_are_trimmed_exactly(monkeypatch):
    # One leaf under many names; its counts are taken once.
    leaf = np.random.default_rng(0).normal(size=2**20).astype(np.float32)
    rows = dict.fromkeys(range(2**11 + 1), (jnp.asarray(leaf),))
    assert sum(row[0].size for row in rows.values()) > 2**31
    count, known = _order._count_below, {}

    def count_below(row, trials):
        key = row[0].size, np.asarray(trials).tobytes()
        if key not in known:
            known[key] = count(row, trials)
        return known[key]

    monkeypatch.setattr(_order, "_count_below", count_below)
    for share in (0.001, 0.8, 1):
        rank = int(share * len(leaf)) * len(rows)
        expected = np.sort(np.abs(leaf))[int(share * len(leaf)) - 1]
        assert _order.kth_magnitudes(rows, rank) == expected
