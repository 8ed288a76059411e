"""DARE, and what all merges by random drops promise."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import normal

from jaxarith import merge, task_vectors

KEY = jax.random.key(7)
SIZE = 100_000
RANDOM = {
    "dare": functools.partial(merge.dare, drop_rate=0.7),
    "magprune": lambda params_0, taus, *, key, coef=1.0: merge.task_arithmetic(
        params_0, merge.magprune(taus, drop_rate=0.4, epsilon=0.2, key=key), coef=coef
    ),
}
every_random = pytest.mark.parametrize("method", RANDOM.values(), ids=RANDOM)


def dropped(method, tau, **options):
    """What is left of one task vector."""
    zeros = jax.tree.map(jnp.zeros_like, tau)
    return method(zeros, [tau], key=KEY, **options)


def tree_of(seed, **shapes):
    return {
        path: jnp.asarray(normal((seed, i), *shape), jnp.float32)
        for i, (path, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99])
def test_a_share_of_entries_is_dropped_and_the_mean_is_kept(drop_rate):
    tau = {"w": jnp.ones(SIZE)}
    left = np.asarray(dropped(merge.dare, tau, drop_rate=drop_rate)["w"])
    deviation = math.sqrt(drop_rate * (1 - drop_rate) / SIZE)
    assert abs(np.mean(left == 0) - drop_rate) < 4 * deviation
    assert abs(np.mean(left) - 1) < 4 * deviation / (1 - drop_rate)
    np.testing.assert_allclose(left[left != 0], 1 / (1 - drop_rate), rtol=1e-6)


@every_random
def test_the_expectation_is_the_task_vector(method):
    tau = np.array([0.1, -0.5, 2.0, -3.0], np.float32)
    rows = dropped(method, {"w": jnp.asarray(np.tile(tau, (SIZE, 1)))})["w"]
    left = np.asarray(rows, np.float64)
    deviation = np.std(left, axis=0) / math.sqrt(SIZE)
    assert (deviation > 0).all()
    assert (np.abs(np.mean(left, axis=0) - tau) < 4 * deviation).all()


@every_random
def test_draws_depend_on_key_path_and_task_alone(method):
    tau = tree_of(0, a=(64,), b=(64,))
    tau["b"] = tau["a"]
    params_0 = jax.tree.map(jnp.zeros_like, tau)
    run = functools.partial(method, params_0)

    def signs(params):
        return {path: tuple(np.asarray(x) != 0) for path, x in params.items()}

    both = signs(run([tau], key=KEY))
    assert both == signs(run([tau], key=KEY))
    # Other paths, tasks and keys have other draws.
    second = signs(run([tau, tau], coef=[0, 1], key=KEY))
    other = signs(run([tau], key=jax.random.key(8)))
    assert len({both["a"], both["b"], second["a"], other["a"]}) == 4
    # The same, whatever else there is and in whatever order.
    reverse = collections.OrderedDict(reversed(tau.items()))  # JAX sorts a dict
    assert [x.tolist() for x in jax.tree.leaves(reverse)] == [
        x.tolist() for x in (tau["b"], tau["a"])
    ]
    zeros = jax.tree.map(jnp.zeros_like, reverse)
    assert signs(method(zeros, [reverse], key=KEY)) == both
    assert signs(run([reverse], key=KEY)) == both
    alone = signs(run([{"a": tau["a"]}], key=KEY))
    assert alone["a"] == both["a"]
    assert signs(run([tau, tau], coef=[1, 0], key=KEY)) == both


@every_random
def test_draws_do_not_depend_on_the_dtype(method):
    tau = {"w": jnp.arange(1.0, 65)}

    def kept(dtype):
        left = dropped(method, jax.tree.map(lambda x: x.astype(dtype), tau))["w"]
        return np.asarray(left != 0)

    expected = kept(jnp.float32)
    assert 0 < expected.sum() < 64
    np.testing.assert_array_equal(kept(jnp.bfloat16), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(kept(jnp.float64), expected)


@every_random
def test_jit_draws_the_same_numbers(method):
    tau = tree_of(0, a=(33, 5))
    plain = dropped(method, tau)["a"]
    jitted = jax.jit(functools.partial(dropped, method))(tau)["a"]
    np.testing.assert_array_max_ulp(np.asarray(jitted), np.asarray(plain), 1)


@every_random
@pytest.mark.devices
def test_shards_draw_the_same_numbers(method):
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("needs 8 (virtual) CPU devices")
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=auto, devices=devices[:8])
    tau = tree_of(0, a=(16, 8))
    expected = dropped(method, tau)["a"]
    for spec in (P("x", "y"), P(None, ("x", "y"))):
        left = dropped(method, jax.device_put(tau, NamedSharding(mesh, spec)))["a"]
        np.testing.assert_array_equal(left, expected)


@pytest.mark.parametrize("sparsify", [merge.drop, merge.magprune])
def test_l1_restores_the_sum_of_magnitudes_of_every_leaf(sparsify):
    tau = tree_of(0, a=(40, 10), b=(30,))
    tau["c"] = jnp.zeros(30)
    [left] = sparsify([tau], rescale="l1", key=KEY)
    left = jax.tree.map(jnp.asarray, left)
    assert any(np.any((left[path] == 0) & (tau[path] != 0)) for path in "ab")
    for path in tau:
        before, after = np.sum(np.abs(tau[path])), np.sum(np.abs(left[path]))
        np.testing.assert_allclose(after, before, rtol=1e-6)


def test_without_rescaling_entries_are_kept_as_they_are():
    tau = tree_of(0, a=(200,))
    left = dropped(merge.dare, tau, drop_rate=0.5, rescale="none")["a"]
    kept = np.asarray(left != 0)
    assert 50 < kept.sum() < 150
    np.testing.assert_array_equal(left, np.where(kept, tau["a"], 0))


@pytest.mark.parametrize("drop_rate", [0.0, 0.29, 0.5, 0.99])
def test_magnitude_drops_the_smallest_entries_of_every_leaf(drop_rate):
    tau = tree_of(0, a=(10, 10), b=(7,), c=())
    zeros = jax.tree.map(jnp.zeros_like, tau)
    left = merge.dare(zeros, [tau], drop_rate=drop_rate, strategy="magnitude")
    for path, leaf in tau.items():
        entries = np.asarray(leaf).ravel()
        fewer = round(100 * drop_rate) * entries.size // 100  # 0.29 * 100 < 29
        kept = np.argsort(np.abs(entries))[fewer:]
        expected = np.zeros_like(entries)
        expected[kept] = entries[kept] * entries.size / len(kept)
        np.testing.assert_allclose(left[path].ravel(), expected, rtol=1e-6)
    if drop_rate * 100 % 1 == 0:
        share = np.asarray(left["a"] / tau["a"])
        np.testing.assert_allclose(share[share != 0], 1 / (1 - drop_rate), rtol=1e-6)
    np.testing.assert_array_equal(left["c"], tau["c"])


def test_magnitude_keeps_all_entries_equal_to_the_smallest_that_is_kept():
    tau = {"w": jnp.array([1.0, -2, 2, 2, 3]), "same": jnp.full(10, -4.0)}
    options = dict(drop_rate=0.6, strategy="magnitude")
    left = merge.dare(jax.tree.map(jnp.zeros_like, tau), [tau], **options)
    np.testing.assert_allclose(left["w"], np.array([0, -2, 2, 2, 3]) * 5 / 4)
    np.testing.assert_array_equal(left["same"], tau["same"])


def test_magnitude_rescales_leaves_of_several_dtypes_and_tasks():
    with jax.enable_x64(True):
        row = normal(0, 10)
        taus = [{"w": jnp.asarray(row, d)} for d in (jnp.float32, jnp.float64)]
        params_0 = {"w": jnp.zeros(10)}
        merged = merge.dare(params_0, taus, drop_rate=0.5, strategy="magnitude")
        kept = np.abs(row) > np.sort(np.abs(row))[4]
        np.testing.assert_allclose(merged["w"], np.where(kept, 4 * row, 0), rtol=1e-6)


@pytest.mark.parametrize(
    "into",
    [
        merge.task_arithmetic,
        merge.average,
        functools.partial(merge.ties, density=0.3),
        functools.partial(merge.awd, steps=5),
        merge.karcher,
    ],
)
@pytest.mark.parametrize(
    "sparsify", [merge.drop, functools.partial(merge.drop, strategy="magnitude")]
)
def test_any_merge_takes_the_dropped_vectors(sparsify, into):
    params_0 = tree_of(0, a=(30,), b=(30,))
    taus = [tree_of(i, a=(30,), b=(30,)) for i in (1, 2, 3)]
    dropped = sparsify(taus, drop_rate=0.7, key=KEY)
    arrays = jax.tree.map(jnp.asarray, dropped)
    assert all(np.mean(left["a"] == 0) > 0.3 for left in arrays)
    assert_close(into(params_0, dropped), into(params_0, arrays), 1e-6)


def test_dropping_composes():
    taus = [tree_of(1, a=(4000,))]
    twice = merge.drop(merge.drop(taus, drop_rate=0.5, key=KEY), drop_rate=0.5, key=KEY)
    again = jax.random.key(8)
    other = merge.drop(
        merge.drop(taus, drop_rate=0.5, key=KEY), drop_rate=0.5, key=again
    )
    share = [np.mean(np.asarray(jnp.asarray(x[0]["a"])) == 0) for x in (twice, other)]
    np.testing.assert_allclose(share, [0.5, 0.75], atol=0.03)  # the same draws, others


def test_values_that_are_not_finite_are_errors_of_the_merge():
    tau = {"w": jnp.array([1.0, jnp.nan])}
    with pytest.raises(ValueError, match="task vector 0 has NaN"):
        merge.ties({"w": jnp.zeros(2)}, merge.drop([tau], key=KEY))


def test_nothing_dropped_is_plain_task_arithmetic():
    params_0, taus = tree_of(0, a=(9,)), [tree_of(1, a=(9,)), tree_of(2, a=(9,))]
    merged = merge.dare(params_0, taus, drop_rate=0, coef=0.4, key=KEY)
    expected = merge.task_arithmetic(params_0, taus, coef=0.4)
    np.testing.assert_array_equal(merged["a"], expected["a"])


def test_the_gradient_is_the_mask():
    tau = tree_of(0, a=(50,))

    def loss(tau):
        return jnp.sum(merge.dare(tau_0, [tau], drop_rate=0.5, key=KEY)["a"])

    tau_0 = jax.tree.map(jnp.zeros_like, tau)
    kept = dropped(merge.dare, tau, drop_rate=0.5)["a"] != 0
    np.testing.assert_array_equal(jax.grad(loss)(tau)["a"], jnp.where(kept, 2, 0))


ERRORS = {
    "drop_rate of 1": (dict(drop_rate=1), r"drop_rate is 1; it must be in \[0, 1\)"),
    "negative": (dict(drop_rate=-0.1), r"drop_rate is -0.1; it must be in \[0, 1\)"),
    "NaN": (dict(drop_rate=math.nan), r"drop_rate is nan"),
    "strategy": (dict(strategy="gradient"), "known are random, magnitude"),
    "rescale": (dict(rescale="l2"), "known are inverse, l1, none"),
    "coef": (dict(coef=[1, 2, 3]), r"coef has shape \[3\]"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_options_are_errors(options, message):
    tau = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match=message):
        merge.dare(tau, [tau, tau], key=KEY, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (merge.dare, {"drop_rate": 1}),
        (merge.della, {"drop_rate": 1}),
        (merge.della, {"density": 0}),
    ],
)
def test_wrong_options_are_found_before_the_values_are_read(method, options):
    tau = {"w": jnp.array([1.0, jnp.nan])}
    with pytest.raises(ValueError, match="drop_rate|density"):
        method(tau, [tau], key=KEY, **options)


def test_random_drops_without_a_key_are_an_error():
    tau = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match='strategy="random" needs a key'):
        merge.dare(tau, [tau])


def test_drops_of_a_vector_are_no_task_vectors_of_integers():
    params_0 = {"w": jnp.zeros(4), "ids": jnp.arange(3)}
    merged = merge.dare(params_0, [{"w": jnp.ones(4)}], key=KEY)
    np.testing.assert_array_equal(merged["ids"], np.arange(3))
    assert task_vectors.difference(merged, params_0).keys() == {"w"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_entries_that_are_not_finite_are_seen_though_they_are_dropped(rescale, value):
    for place in range(6):  # at least one is dropped: five of six are not kept
        tau = np.ones(6, np.float32)
        tau[place] = value
        vectors = merge.drop(
            [{"w": tau}], drop_rate=0.8, rescale=rescale, key=jax.random.key(0)
        )
        with pytest.raises(ValueError, match="NaN or infinite"):
            merge.task_arithmetic({"w": np.zeros(6, np.float32)}, vectors)
