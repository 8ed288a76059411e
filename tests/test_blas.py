"""BLAS has one thread while merges factor small matrices, and then its own again."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

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
