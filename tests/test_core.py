"""Core space: adapters merged in the space that they span."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge
from jaxarith.merge import Factors
from jaxarith.models import lora

IN, OUT, PATH = 12, 9, "layer/kernel"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def adapters(ranks=(2, 2, 2), path=PATH):
    return [
        {path: Factors(normal((i, 0), IN, r), (1 + i) * normal((i, 1), r, OUT))}
        for i, r in enumerate(ranks)
    ]


def update(found):
    return np.asarray(found[PATH].a) @ np.asarray(found[PATH].b)


def whole(method, given):
    """The merge of the whole updates."""
    taus = [{PATH: update(adapter)} for adapter in given]
    return method({PATH: np.zeros((IN, OUT))}, taus)[PATH]


LINEAR = functools.partial(merge.task_arithmetic, coef=[0.3, 0.5, 0.7])


@pytest.mark.parametrize("basis", ["core", "knots"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (5, 5, 5)])
@pytest.mark.parametrize("method", [LINEAR, merge.average], ids=["ta", "average"])
def test_linear_merges_are_those_of_whole_updates(method, ranks, basis):
    given = adapters(ranks)  # of the last, 15 > 9 outputs: the cores are capped
    found = merge.core(given, method, basis=basis)
    expected = whole(method, given)
    np.testing.assert_allclose(update(found.factors), expected, rtol=1e-9, atol=1e-10)
    assert found.factors[PATH].a.shape[1] <= min(sum(ranks), IN, OUT)
    np.testing.assert_allclose(found.energy[PATH], 1)


@pytest.mark.parametrize("method", [merge.tsv, merge.iso_c], ids=["tsv", "iso_c"])
def test_methods_that_turn_with_the_bases_give_the_same(method):
    given = adapters()
    found = merge.core(given, method)
    expected = whole(method, given)
    np.testing.assert_allclose(update(found.factors), expected, rtol=1e-8, atol=1e-9)
    assert np.abs(expected - whole(LINEAR, given)).max() > 0.1


def reference(given, method):
    """The definition with whole updates and NumPy's decompositions."""
    updates = [update(adapter) for adapter in given]
    rank = sum(adapter[PATH].a.shape[1] for adapter in given)

    def leading(side_by_side):
        u = np.linalg.svd(side_by_side)[0][:, :rank]
        return u * np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])

    v = leading(np.concatenate(updates, axis=1))
    u = leading(np.concatenate([tau.T for tau in updates], axis=1))
    cores = [{PATH: v.T @ tau @ u} for tau in updates]
    return v @ method({PATH: np.zeros((rank, rank))}, cores)[PATH] @ u.T


TIES = functools.partial(merge.ties, density=0.4)


def test_entrywise_methods_see_the_cores_of_the_definition():
    given = adapters()
    found = update(merge.core(given, TIES).factors)
    np.testing.assert_allclose(found, reference(given, TIES), rtol=1e-8, atol=1e-9)
    assert np.abs(found - whole(TIES, given)).max() > 0.1


@pytest.mark.parametrize("basis", ["core", "knots"])
def test_another_way_to_write_an_adapter_changes_nothing(basis):
    given = adapters()
    turned = []
    for i, adapter in enumerate(given):
        a, b = adapter[PATH]
        q = normal((9, i), 2, 2) + 2 * np.eye(2)
        turned.append({PATH: Factors(a @ q, np.linalg.solve(q, b))})
    one, two = (merge.core(x, TIES, basis=basis).factors for x in (given, turned))
    np.testing.assert_allclose(update(one), update(two), rtol=1e-8, atol=1e-9)


def test_knots_merges_the_rows_times_their_singular_values():
    given = adapters()
    updates = [update(adapter).T for adapter in given]  # [out, in], as in the paper
    u, s, vt = np.linalg.svd(np.concatenate(updates, axis=1), full_matrices=False)
    rank = 6
    u = u[:, :rank] * np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))][:rank])
    parts = [{PATH: (u.T @ tau).T} for tau in updates]
    scaled = np.abs(s[:rank, None] * vt[:rank, :IN])
    np.testing.assert_allclose(np.abs(parts[0][PATH].T), scaled, atol=1e-10)
    expected = TIES({PATH: np.zeros((IN, rank))}, parts)[PATH] @ u.T
    found = update(merge.core(given, TIES, basis="knots").factors)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


def test_a_capped_rank_is_the_best_of_its_kind_and_its_energy_is_told():
    given = adapters((3, 3, 3))
    found = merge.core(given, LINEAR, rank=4)
    u, s, vt = np.linalg.svd(whole(LINEAR, given))
    best = u[:, :4] * s[:4] @ vt[:4]
    np.testing.assert_allclose(update(found.factors), best, rtol=1e-8, atol=1e-9)
    share = np.sum(s[:4] ** 2) / np.sum(s**2)
    np.testing.assert_allclose(found.energy[PATH], share, rtol=1e-9)
    assert share < 0.999
    a, b = found.factors[PATH]
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-8
    )


def test_a_larger_rank_adds_zeros():
    found = merge.core(adapters((1, 1)), merge.average, rank=5).factors[PATH]
    assert found.a.shape == (IN, 5) and found.b.shape == (5, OUT)
    assert not np.any(found.a[:, 2:]) and not np.any(found.b[2:])


def test_a_kernel_that_an_adapter_lacks_counts_as_zero():
    first, second = adapters((2, 3))
    second["other/kernel"] = Factors(normal(5, 4, 1), normal(6, 1, 4))
    found = merge.core([first, second], merge.average).factors
    a, b = second["other/kernel"]
    other = np.asarray(found["other/kernel"].a) @ np.asarray(found["other/kernel"].b)
    np.testing.assert_allclose(other, a @ b / 2, rtol=1e-9, atol=1e-12)


def test_factors_of_zeros_stay_so_and_nothing_is_nan():
    zero = {PATH: Factors(jnp.ones((IN, 2)), jnp.zeros((2, OUT)))}
    found = merge.core([zero, zero], merge.tsv)
    assert not np.any(update(found.factors))
    np.testing.assert_array_equal(found.energy[PATH], 1)


def test_the_way_from_parameters_and_back():
    params = {"fc": {"lora_a": normal(0, 5, 2), "lora_b": normal(1, 2, 4)}}
    found = merge.core([lora.factors(params, alpha=6)] * 2, merge.average, rank=3)
    again = lora.from_factors(found.factors)
    delta = lora.delta(again, alpha=3)["fc"]["kernel"]
    expected = lora.delta(params, alpha=6)["fc"]["kernel"]
    np.testing.assert_allclose(delta, expected, rtol=1e-9, atol=1e-12)


def test_float32_is_as_exact_as_it_can_be_under_jit():
    given = jax.tree.map(lambda x: np.asarray(x, np.float32), adapters())
    found = jax.jit(lambda x: merge.core(x, LINEAR).factors)(given)
    assert found[PATH].a.dtype == np.float32
    expected = whole(LINEAR, adapters())
    np.testing.assert_allclose(update(found), expected, atol=3e-5)


@pytest.mark.parametrize(
    ("given", "options", "match"),
    [
        ([], {}, "found none"),
        ([{}], {}, "found none"),
        (adapters((2,)) + adapters((2,), "x"), {"rank": 0}, "rank is 0"),
        ([{PATH: Factors(np.ones((3, 2)), np.ones((1, 3)))}], {}, r"\[3, 2\] and"),
        ([{PATH: Factors(np.full((3, 1), np.nan), np.ones((1, 3)))}], {}, "NaN"),
        (adapters(), {"basis": "other"}, "unknown basis"),
    ],
)
def test_bad_input_is_named(given, options, match):
    with pytest.raises(ValueError, match=match):
        merge.core(given, merge.average, **options)
