"""Coefficients by path: as a function, as a mapping, and leaf by leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge, task_vectors, tree
from jaxarith.merge import mergekit

KEY = jax.random.key(0)
SHAPES = {"block/kernel": (6, 5), "block/bias": (5,), "scale": ()}
VALUES = {"block/kernel": 0.25, "block/bias": 0.5, "scale": 0.75}


def vector(seed, scale=1.0):
    return tree.unflatten(
        {
            path: jnp.asarray(normal((seed, i), *shape, scale=scale), jnp.float32)
            for i, (path, shape) in enumerate(SHAPES.items())
        }
    )


PARAMS_0, TAUS = vector(0), [vector(1, 0.5), vector(2, 0.5)]


def only(method, count):
    """A method that takes one task vector or exactly so many."""
    return lambda params_0, taus, **options: method(params_0, taus[:count], **options)


def fisher(params_0, taus, weights):
    # One of the two weights depends on the path: only their ratio matters.
    first = functools.partial(jax.tree.map, jnp.square)
    return merge.fisher(params_0, taus, [first(tau) for tau in taus], weights=weights)


def adapted(method, params_0, taus, coef):
    """AdaMerging and AdaRank before their first step."""

    def logits(params, batch):
        return batch["x"] @ params["block"]["kernel"]

    batch = {"x": jnp.ones((1, 6))}
    return method(
        params_0, taus, [logits] * 2, [[batch]] * 2, coef=coef, steps=0
    ).params


def general(method, option, **options):
    """mergekit's task arithmetic as a function of one of its options."""
    given = {"weight": 1.0, "density": 0.75, "epsilon": 0.1, **options}

    def merged(params_0, taus, **chosen):
        return mergekit.generalized_task_arithmetic(
            params_0, taus, method=method, key=KEY, **(given | chosen)
        )

    return merged, option


# A merge and the name of its coefficient.
MERGES = {
    "task_arithmetic": (merge.task_arithmetic, "coef"),
    "wise_ft": (lambda p, taus, coef: merge.wise_ft(p, taus[:1], coef=coef), "coef"),
    "apply": (lambda p, taus, coef: task_vectors.apply(p, taus[0], coef), "coef"),
    "ties": (merge.ties, "coef"),
    "topk": (functools.partial(merge.topk, density=0.5), "coef"),
    "magmax": (merge.magmax, "coef"),
    "slerp": (merge.slerp, "t"),
    "breadcrumbs": (functools.partial(merge.breadcrumbs, beta=0.3), "coef"),
    "dare": (functools.partial(merge.dare, drop_rate=0.3, key=KEY), "coef"),
    "average": (merge.average, "coef"),
    "karcher": (merge.karcher, "coef"),
    "model_stock": (merge.model_stock, "coef"),
    "slerp_coef": (merge.slerp, "coef"),
    "emr": (merge.emr, "coef"),
    "wudi": (functools.partial(merge.wudi, matrices=None, in_out="x"), "coef"),
    "localize_and_stitch": (merge.localize_and_stitch, "coef"),
    "della": (functools.partial(merge.della, key=KEY), "coef"),
    "pcb": (functools.partial(merge.pcb, density=0.5), "coef"),
    "consensus": (functools.partial(merge.consensus, least=1), "coef"),
    "tsv": (merge.tsv, "coef"),
    "iso_c": (merge.iso_c, "coef"),
    "iso_cts": (merge.iso_cts, "coef"),
    "dc_merge": (merge.dc_merge, "coef"),
    "cart": (merge.cart, "coef"),
    "esm": (functools.partial(merge.esm, matrices=None, in_out="x"), "coef"),
    "ace": (functools.partial(merge.ace, matrices=None, in_out="x"), "coef"),
    "awd": (functools.partial(merge.awd, steps=5), "coef"),
    "awd_adam": (functools.partial(merge.awd, steps=5, solver="adam"), "coef"),
    "bases_negation": (
        lambda p, taus, coef: merge.bases_negation(p, taus, taus[0], coef=coef),
        "coef",
    ),
    "fisher": (fisher, "weights"),
    "adamerging": (functools.partial(adapted, merge.adamerging), "coef"),
    "adarank": (
        functools.partial(adapted, functools.partial(merge.adarank, matrices=None)),
        "coef",
    ),
    "mergekit_linear": (functools.partial(mergekit.linear, normalize=False), "weight"),
    "mergekit_slerp": (mergekit.slerp, "t"),
    "mergekit_nuslerp": (mergekit.nuslerp, "weight"),
    "mergekit_multislerp": (
        functools.partial(mergekit.multislerp, normalize=False),
        "weight",
    ),
    "mergekit_sce": (mergekit.sce, "select_topk"),
    "mergekit_nearswap": (only(mergekit.nearswap, 1), "t"),
    "mergekit_weight": general("ties", "weight", normalize=False),
    "mergekit_density": general("ties", "density"),
    "mergekit_gamma": general("breadcrumbs", "gamma", density=0.25),
    "mergekit_epsilon": general("della", "epsilon", density=0.5),
    "mergekit_coef": general("dare_linear", "coef"),
}
# Some divide by the sum of equal weights, or have leaves too small for a share.
CONSTANT = {"fisher", "mergekit_nuslerp"}
SCALES = {"mergekit_epsilon": 0.5}
every_merge = pytest.mark.parametrize("name", MERGES)


def merged(name, coef, params_0=PARAMS_0, taus=TAUS):
    method, option = MERGES[name]
    return tree.flatten(method(params_0, taus, **{option: coef}))


def values(name):
    scale = SCALES.get(name, 1.0)
    if name in CONSTANT:  # weights of both tasks, of which the ratio matters
        return {path: [value, 1.0] for path, value in VALUES.items()}
    return {path: scale * value for path, value in VALUES.items()}


@every_merge
def test_a_mapping_gives_every_leaf_what_its_value_alone_gives(name):
    by_path = values(name)
    found = merged(name, by_path)
    assert found.keys() == VALUES.keys()
    for path, value in by_path.items():
        np.testing.assert_array_equal(found[path], merged(name, value)[path], path)
    # The values matter: each leaf is another with the value of another.
    other = merged(name, by_path["scale"])
    assert any(np.any(found[path] != other[path]) for path in found)


# One way to look a value up, in every kind of merge.
@pytest.mark.parametrize(
    "name", ["task_arithmetic", "slerp", "ties", "mergekit_weight"]
)
def test_a_mapping_is_the_function_that_looks_it_up(name):
    by_path = values(name)
    function = merged(name, by_path.__getitem__)
    for path, leaf in merged(name, by_path).items():
        np.testing.assert_array_equal(leaf, function[path], path)


@every_merge
def test_a_mapping_that_lacks_a_leaf_is_an_error_with_the_paths(name):
    by_path = values(name)
    by_path["block/kernle"] = by_path.pop("block/kernel")
    message = "lacks block/kernel and has block/kernle, which no task vector has"
    with pytest.raises(ValueError, match=message):
        merged(name, by_path)


@pytest.mark.parametrize("coef", [{"w": 2.0, "more": 1.0}, {"w": [2.0]}])
def test_a_mapping_may_have_other_leaves_and_a_list_by_task(coef):
    params = merge.task_arithmetic({"w": jnp.ones(2)}, [{"w": jnp.ones(2)}], coef=coef)
    np.testing.assert_array_equal(params["w"], [3.0, 3.0])


def test_many_missing_leaves_are_not_all_printed():
    tau = {str(i): jnp.ones(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"coef lacks 0, 1, 10.* and 12 more\. A"):
        task_vectors.apply(tau, tau, {})


def test_coefficients_of_a_jitted_mapping_are_differentiated():
    def loss(coefs):
        return jnp.sum(merge.task_arithmetic(PARAMS_0, TAUS, coef=coefs)["scale"])

    gradient = jax.jit(jax.grad(loss))({p: jnp.ones(2) for p in VALUES})
    expected = [tau["scale"] for tau in TAUS]
    np.testing.assert_allclose(gradient["scale"], expected, rtol=1e-6)
    assert not np.any(gradient["block/bias"])


def test_apply_scales_by_one_number():
    with pytest.raises(ValueError, match=r"coef has shape \[2\]; expected one number"):
        task_vectors.apply(PARAMS_0, TAUS[0], [1.0, 2.0])


def test_task_wise_adamerging_refuses_coefficients_by_path():
    with pytest.raises(ValueError, match='given by path, but scope is "task"'):
        merge.adamerging(
            PARAMS_0, TAUS, [None] * 2, [[{}]] * 2, scope="task", coef=VALUES
        )
