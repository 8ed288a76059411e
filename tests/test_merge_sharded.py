"""Trees that are sharded over many devices: the bits of one device, where they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import normal
from test_merge import KEY, MERGES, changed, of_all_tasks

from jaxarith import merge, task_vectors, tree
from jaxarith.merge import _leaves, mergekit
from jaxarith.merge.bases_arithmetic import similarities

pytestmark = [pytest.mark.devices, pytest.mark.usefixtures("default_emitters")]

# Options that add up what the defaults of a method do not.
OPTIONS = {
    "awd_row_adam": functools.partial(merge.awd, scope="row", solver="adam", steps=5),
    "awd_direct": functools.partial(merge.awd, solver="direct", key=KEY, steps=5),
    "dare_l1": functools.partial(merge.dare, drop_rate=0.5, rescale="l1", key=KEY),
    "dare_magnitude_l1": functools.partial(
        merge.dare, drop_rate=0.5, strategy="magnitude", rescale="l1"
    ),
    "della_l1": functools.partial(merge.della, rescale="l1", key=KEY),
    "emr_official": functools.partial(
        of_all_tasks, functools.partial(merge.emr_masks, preset="official")
    ),
    "fisher_normalize": lambda params_0, taus: merge.fisher(
        params_0, taus, jax.tree.map(jnp.square, taus), normalize=True
    ),
    "slerp_of_vectors": lambda params_0, taus: merge.slerp(
        params_0, taus[:2], between="task_vectors"
    ),
}
COEFS = {"wide": 0.5, "tall": [0.2, 0.4, 0.6], "scale": 1.0}
OF_VECTOR = COEFS | {"tall": 0.2}  # of a merge that scales one merged vector
OPTIONS |= {
    "task_arithmetic_by_path": functools.partial(merge.task_arithmetic, coef=COEFS),
    "awd_by_path": functools.partial(merge.awd, coef=COEFS, steps=5),
    "ties_by_path": functools.partial(merge.ties, coef=OF_VECTOR),
    "mergekit_by_path": functools.partial(
        mergekit.generalized_task_arithmetic,
        method="dare_linear",
        weight=COEFS,
        density=COEFS,
        coef=OF_VECTOR,
        key=KEY,
    ),
}
SHAPES = {"wide": (64, 192), "tall": (100, 64), "scale": ()}
# The largest dimension that 8 and 4 devices divide, if one does; `tall` over both axes.
SPECS = {
    "wide": P(None, "fsdp"),
    "tall": P("data", "fsdp"),
    "scale": P(),
}


def leaves(seed, scale=1.0):
    return {
        path: jnp.asarray(normal((seed, i), *shape, scale=scale), jnp.float32)
        for i, (path, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def params_0():
    return leaves(0)


@pytest.fixture(scope="module")
def taus():
    shared = leaves(4, 0.1)  # large vectors without a part in common are orthogonal
    own = [leaves(seed, 0.1) for seed in (1, 2, 3)]
    return [{path: tau[path] + shared[path] for path in shared} for tau in own]


def mesh_of(*sizes):
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("needs 8 (virtual) CPU devices")
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=auto, devices=devices[:8])


def shard(leaves, mesh, specs=SPECS):
    sharded = {
        path: jax.device_put(leaf, NamedSharding(mesh, specs[path]))
        for path, leaf in leaves.items()
    }
    if specs is SPECS:
        part = sharded["wide"].addressable_shards[0].data
        assert part.size == leaves["wide"].size // mesh.shape["fsdp"]
    return sharded


def replicate(leaves, mesh):
    return shard(leaves, mesh, dict.fromkeys(SPECS, P()))


def assert_same_bits(actual, expected):
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_array_equal(tree.flatten(actual)[path], leaf, err_msg=path)


def assert_sharded_like(actual, like):
    for path, leaf in actual.items():
        assert leaf.sharding.is_equivalent_to(like[path].sharding, leaf.ndim), path


@pytest.mark.filterwarnings("ignore:.*their names do not say")
@pytest.mark.parametrize(
    "method", [*MERGES.values(), *OPTIONS.values()], ids=[*MERGES, *OPTIONS]
)
def test_sharded_models_merge_to_the_same_bits_and_stay_sharded(method, params_0, taus):
    expected = method(params_0, taus)
    assert changed(expected, params_0)
    mesh = mesh_of(2, 4)
    start = shard(params_0, mesh)
    places = shard, replicate, shard
    merged = method(
        start, [place(tau, mesh) for place, tau in zip(places, taus, strict=True)]
    )
    assert_same_bits(merged, expected)
    assert_sharded_like(merged, start)


VECTORS = {
    "difference": task_vectors.difference,
    "apply": functools.partial(task_vectors.apply, coef=0.3),
    "add": lambda a, b: task_vectors.add([a, {"wide": b["wide"]}, b]),
    "negate": lambda a, b: task_vectors.negate(a),
    "analogy": lambda a, b: task_vectors.analogy(a, b, a, (0.3, 0.7)),
    "random_like": lambda a, b: task_vectors.random_like(KEY, a),
}
NUMBERS = {
    "norm": lambda a, b: task_vectors.norm(a),
    "cosine_matrix": lambda a, b: task_vectors.cosine_matrix(
        [a, b, {"tall": a["tall"]}]
    ),
    "similarities": lambda a, b: similarities([a], b),
}


@pytest.mark.parametrize("function", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("place_second", [shard, replicate])
def test_arithmetic_on_sharded_vectors_gives_the_same_bits_and_stays_sharded(
    function, place_second, params_0, taus
):
    expected = function(params_0, taus[0])
    assert changed(expected, params_0)
    for sizes in [(1, 8), (2, 4)]:
        mesh = mesh_of(*sizes)
        first = shard(params_0, mesh)
        actual = function(first, place_second(taus[0], mesh))
        assert_same_bits(actual, expected)
        assert_sharded_like(actual, first)


@pytest.mark.parametrize("function", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_sharded_vectors_have_the_same_bits(function, params_0, taus):
    expected = function(*taus[:2])
    assert np.all(np.isfinite(expected)) and np.any(expected != 0)
    for sizes in [(1, 8), (2, 4)]:
        sharded = (shard(tau, mesh_of(*sizes)) for tau in taus[:2])
        np.testing.assert_array_equal(function(*sharded), expected)


def test_gathering_leaves_alone_what_is_not_sharded(params_0):
    mesh = mesh_of(1, 8)
    alone = {"numpy": np.ones(8), "number": 1.0, "none": None, "jax": params_0["wide"]}
    for name, leaf in tree.gathered(alone).items():
        assert leaf is alone[name], name
    sharded = shard(params_0, mesh)["wide"]
    whole = tree.gathered(sharded)
    assert isinstance(whole, np.ndarray)
    np.testing.assert_array_equal(whole, sharded)
    back = tree.sharded_like(jnp.asarray(whole), sharded)
    assert_sharded_like({"": back}, {"": sharded})


@_leaves.leaf_function(whole=True)
def scaled_by_square(leaf_0, taus):
    return leaf_0 + taus[0] * jnp.sum(taus[0] ** 2)


def test_leaves_that_are_computed_when_looked_at_are_gathered_too(params_0, taus):
    def halved(row):
        return tuple(leaf / 2 for leaf in row)

    def merged(params_0, taus):
        rows = _leaves.Mapped(halved, tree.aligned(taus))
        return _leaves.fold(scaled_by_square, params_0, rows)

    mesh = mesh_of(1, 8)
    start = shard(params_0, mesh)
    expected, actual = merged(params_0, taus), merged(start, [shard(taus[0], mesh)])
    assert changed(expected, params_0)
    assert_same_bits(actual, expected)
    assert_sharded_like(actual, start)


@pytest.mark.parametrize("name", ["model_stock", "dare_l1", "awd"])
def test_sharded_models_merge_inside_jit(name, params_0, taus):
    # There the compiler cuts the sums: close, not the same bits.
    method = (MERGES | OPTIONS)[name]
    mesh = mesh_of(2, 4)
    start, moves = shard(params_0, mesh), [shard(tau, mesh) for tau in taus]
    expected = method(params_0, taus)
    for merged in (
        jax.jit(method)(start, moves),
        jax.jit(lambda moves: method(start, moves))(moves),
    ):
        for path, leaf in expected.items():
            np.testing.assert_allclose(merged[path], leaf, rtol=2e-6, atol=2e-6)
