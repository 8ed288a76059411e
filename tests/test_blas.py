"""BLAS has one thread while merges factor small matrices, and then its own again."""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from jaxarith import merge
from jaxarith.merge import _blas, _leaves


def threads():
    import scipy.linalg  # noqa: F401

    found = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in found if pool["user_api"] == "blas"]


def test_small_matrices_are_factored_in_one_thread():
    before = threads()
    with _blas.limited([jnp.ones((3, 2000)), jnp.ones(5)]):
        assert set(threads()) == {1}
    assert threads() == before


@pytest.mark.parametrize("shapes", [[(2000, 1500)], [(5,), (2, 2, 2)], []])
def test_large_matrices_and_other_leaves_keep_the_threads(shapes):
    found = _blas.limited(np.broadcast_to(np.zeros(()), shape) for shape in shapes)
    assert isinstance(found, contextlib.nullcontext)


def test_threads_return_when_the_last_is_done():
    before = threads()
    small = [jnp.ones((3, 5))]
    first, second = _blas.limited(small), _blas.limited(small)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before


def test_results_come_in_order_and_few_are_waited_for(monkeypatch):
    monkeypatch.setattr(_blas, "_AT_A_TIME", 2)
    taken, open_doors = [], [threading.Event() for _ in range(5)]
    started = []

    def work(i):
        started.append(i)
        assert open_doors[i].wait(10)
        return i * i

    with _blas.Queue(lambda path, result: taken.append((path, result))) as queue:
        queue.add("0", functools.partial(work, 0))
        queue.add("1", functools.partial(work, 1))
        open_doors[1].set()
        assert not taken
        for door in open_doors:
            door.set()
        for i in range(2, 5):
            queue.add(str(i), functools.partial(work, i))
            assert len(taken) == i - 1
    assert taken == [(str(i), i * i) for i in range(5)]


def test_an_error_of_one_leaf_is_raised_and_the_rest_given_up():
    def fail():
        raise ValueError("no matrix")

    taken = []
    with (
        pytest.raises(ValueError, match="no matrix"),
        _blas.Queue(lambda path, result: taken.append(path)) as queue,
    ):
        queue.add("a", fail)
        queue.add("b", lambda: 1)
    assert not taken


def many(shape=(6, 5), leaves=12):
    rng = np.random.default_rng(0)
    return [
        {f"{i}": jnp.asarray(rng.normal(size=shape)) for i in range(leaves)}
        for _ in range(4)
    ]


@pytest.mark.parametrize("x64", [False, True])
def test_side_by_side_gives_the_bits_of_one_by_one(monkeypatch, x64):
    with jax.enable_x64(x64):
        params_0, *taus = many()
        seen = []
        work = _leaves._OfWhole.work
        monkeypatch.setattr(
            _leaves._OfWhole, "work", lambda *args: seen.append(1) or work(*args)
        )
        found = merge.tsv(params_0, taus)
        assert len(seen) == len(params_0)
        monkeypatch.setattr(_blas, "fit_beside_others", lambda *_: False)
        expected = merge.tsv(params_0, taus)
        assert len(seen) == len(params_0)
    for path, leaf in expected.items():
        assert leaf.dtype == (jnp.float64 if x64 else jnp.float32)
        assert (found[path] == leaf).all()


def test_large_leaves_and_others_are_merged_one_by_one():
    matrix = jnp.ones((3, 4))
    assert _blas.fit_beside_others([matrix, matrix], 0.5, matrix, None, jnp.ones(9))
    devices = jax.sharding.Mesh(jax.devices()[:2], "d")
    spread = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    spread = jax.device_put(matrix, spread)
    vector, array = jnp.ones(3), np.ones((3, 4))
    for other in (vector, array, jnp.ones((1025, 1025)), jnp.ones((1024, 4097))):
        assert not _blas.fit_beside_others([matrix, other])
    assert not _blas.fit_beside_others([matrix, spread])
    assert not _blas.fit_beside_others([matrix], {"a": spread})


def test_what_is_traced_is_merged_where_it_is_traced():
    matrix = jnp.ones((3, 4))

    def traced(x):
        assert not _blas.fit_beside_others([x])
        assert not _blas.fit_beside_others([matrix], x)
        return x

    jax.eval_shape(traced, matrix)


def test_leaf_functions_of_whole_leaves_run_so(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def limited(leaves):
        seen.extend(jnp.shape(leaf) for leaf in leaves)
        yield

    monkeypatch.setattr(_blas, "limited", limited)
    total = _leaves.leaf_function(lambda leaf_0, taus: leaf_0 + sum(taus), whole=True)
    total(jnp.ones((2, 3)), (jnp.ones((2, 3)),))
    assert seen == [(2, 3)]
