"""What every merge promises. A new method is one row of `MERGES`."""

import copy
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import normal

from jaxarith import merge, task_vectors, tree

KEY = jax.random.key(0)


def slerp_of_the_first_two(params_0, taus):
    """As `slerp` takes exactly two task vectors."""
    return merge.slerp(params_0, taus if isinstance(taus, dict) else taus[:2])


def of_all_tasks(method, params_0, taus):
    """The sum of the vectors of all tasks: methods that make one model per task."""
    masked = method(params_0, taus)
    vectors = [masked.vector(task) for task in range(len(masked.masks))]
    return merge.task_arithmetic(params_0, vectors)


def ties_of_dropped(params_0, taus):
    """DARE with TIES."""
    return merge.ties(params_0, merge.drop(taus, drop_rate=0.5, key=KEY))


def mean_of_bases(params_0, taus):
    """The mean of bases that are themselves means, with one cluster of two tasks."""
    clusters = [[0, *range(2, len(taus))], [1]] if len(taus) > 1 else [[0]]
    found = merge.basis_vectors(params_0, taus, clusters=clusters)
    return merge.average(params_0, found.vectors)


def fisher_of_squares(params_0, taus):
    """Fisher merging with the squared task vectors in place of Fishers."""
    return merge.fisher(params_0, taus, jax.tree.map(jnp.square, taus))


def regmean_of_products(params_0, taus):
    """RegMean with Gram matrices of all matrices made from the task vectors."""
    leaves = tree.flatten(params_0).items()
    matrices = {path: leaf for path, leaf in leaves if jnp.ndim(leaf) == 2 if leaf.size}

    def gram(tau, path):
        rows = tree.gathered(tau.get(path, jnp.zeros_like(matrices[path])))
        rows = jnp.asarray(rows, jnp.float32)
        return 0.01 * jnp.eye(len(rows)) + rows @ rows.T

    flat = [tree.flatten(tau) for tau in taus]
    grams = [{path: gram(tau, path) for path in matrices} for tau in flat]
    return merge.regmean(params_0, taus, grams)


MERGES = {
    "average": merge.average,
    "task_arithmetic": merge.task_arithmetic,
    "ties": merge.ties,
    "awd": functools.partial(merge.awd, step_size=0.05, steps=20),
    "awd_layer": functools.partial(
        merge.awd, scope="layer", objective="reverse", step_size=0.05, steps=20
    ),
    "awd_row": functools.partial(merge.awd, scope="row", solver="momentum", steps=10),
    "awd_adam": functools.partial(merge.awd, solver="adam", steps=5),
    "bases": mean_of_bases,
    "localize_and_stitch": functools.partial(merge.localize_and_stitch, density=0.5),
    "slerp": slerp_of_the_first_two,
    "karcher": merge.karcher,
    "model_stock": merge.model_stock,
    "magmax": merge.magmax,
    "topk": functools.partial(merge.topk, density=0.3),
    "breadcrumbs": functools.partial(merge.breadcrumbs, beta=0.3, gamma=0.9),
    "dare": functools.partial(merge.dare, drop_rate=0.5, key=KEY),
    "dare_ties": ties_of_dropped,
    "della": functools.partial(merge.della, key=KEY),
    "pcb": functools.partial(merge.pcb, density=0.5),
    "emr": merge.emr,
    "emr_masks": functools.partial(of_all_tasks, merge.emr_masks),
    "tall_masks": functools.partial(of_all_tasks, merge.tall_masks),
    "consensus": merge.consensus,
    "consensus_ties": functools.partial(merge.consensus, of="ties", density=0.5),
    "tsv": merge.tsv,
    "iso_c": merge.iso_c,
    "dc_merge": functools.partial(merge.dc_merge, smoothing="linear", keep=0.5),
    "cart": merge.cart,
    "iso_cts": functools.partial(merge.iso_cts, common=0.4),
    "esm": functools.partial(merge.esm, coef=0.05),  # its vector is long here
    "ace": merge.ace,
    "wudi": functools.partial(merge.wudi, matrices=None, steps=20),
    "wudi_closed": functools.partial(merge.wudi, matrices=None, solver="closed"),
    "fisher": fisher_of_squares,
    "regmean": regmean_of_products,
}
# `wise_ft` takes one task vector and `greedy_soup` scores models outside `jit`: their
# promises are in their own tests. So are those of `regmean_plusplus`: it runs a model.
# With one task, or its vector alone, these give the fine-tuned model back.
GIVE_ONE_TASK_BACK = {
    "average": merge.average,
    "task_arithmetic": merge.task_arithmetic,
    "ties": functools.partial(merge.ties, density=1.0),
    "localize_and_stitch": functools.partial(merge.localize_and_stitch, density=1.0),
    "karcher": merge.karcher,
    "magmax": functools.partial(merge.magmax, coef=1.0),
    "topk": functools.partial(merge.topk, density=1.0),
    "breadcrumbs": functools.partial(merge.breadcrumbs, beta=0, gamma=1, coef=1.0),
    "dare": functools.partial(merge.dare, drop_rate=0, key=KEY),
    "della": functools.partial(merge.della, drop_rate=0, epsilon=0, key=KEY),
    "emr": merge.emr,
    "emr_masks": functools.partial(of_all_tasks, merge.emr_masks),
    "tall_masks": functools.partial(of_all_tasks, merge.tall_masks),
    "consensus": functools.partial(merge.consensus, least=1),
    "dc_merge": functools.partial(merge.dc_merge, keep=1.0),
    "cart": merge.cart,
    "tsv": merge.tsv,
    "fisher": fisher_of_squares,
    "wudi": functools.partial(merge.wudi, matrices=None, others="average"),
    "wudi_closed": functools.partial(
        merge.wudi, matrices=None, others="average", solver="closed"
    ),
    "regmean": regmean_of_products,
    "bases": mean_of_bases,
}
# What a task contributes depends on its place in the list: random draws are keyed by
# it, or the list is not one of equals.
ORDERED = {
    "slerp",  # of the first two of the tests' three
    "bases",  # the test's clusters are those of places in the list
    *("dare", "dare_ties", "della"),
}
# Something is measured per leaf, so cutting the vector otherwise changes the result.
PER_LEAF = {
    *("awd_layer", "awd_row"),
    *("slerp", "karcher", "model_stock"),  # angles
    "breadcrumbs",  # quantiles
    *("dare", "dare_ties", "della"),  # a leaf's draws are keyed by its path
    *("tsv", "iso_c", "iso_cts", "wudi", "wudi_closed", "regmean"),  # matrices
    *("dc_merge", "cart", "esm", "ace"),
}
every_merge = pytest.mark.parametrize("method", MERGES.values(), ids=MERGES)


def merges_except(names):
    rest = {name: method for name, method in MERGES.items() if name not in names}
    return pytest.mark.parametrize("method", rest.values(), ids=rest)


# Every distinct shape is one more program to compile, in every test of every method.
SHAPES = {"block/kernel": (4, 3), "block/bias": (3,), "scale": (), "empty": (0, 2)}


def model(dtype=jnp.float32):
    """Parameters with leaves of every odd shape, and integers that no task changes."""
    leaves = {
        path: jnp.asarray(normal((0, i), *shape), dtype)
        for i, (path, shape) in enumerate(SHAPES.items())
    }
    return tree.unflatten({**leaves, "ids": jnp.arange(5)})


def vector(seed, without=()):
    return tree.unflatten(
        {
            path: jnp.asarray(normal((seed, i), *shape, scale=0.1), jnp.float32)
            for i, (path, shape) in enumerate(SHAPES.items())
            if path not in without
        }
    )


PARTIAL = [vector(1), vector(2, without=["scale"]), vector(3, ["block/kernel"])]


def changed(actual, params_0):
    """Whether the merge did something, so that a test of it is not degenerate."""
    pairs = zip(*map(jax.tree.leaves, (actual, params_0)), strict=True)
    return any(np.any(a != b) for a, b in pairs)


@pytest.mark.parametrize("method", GIVE_ONE_TASK_BACK.values(), ids=GIVE_ONE_TASK_BACK)
def test_one_task_gives_its_model_back(method):
    params_0, tau = model(), vector(1)
    merged = method(params_0, [tau])
    assert_close(merged, task_vectors.apply(params_0, tau), 1e-7)


@merges_except(ORDERED)
def test_order_of_tasks_does_not_matter(method):
    params_0 = model()
    merged = method(params_0, PARTIAL)
    assert changed(merged, params_0)
    for order in [(1, 2, 0), (2, 1, 0)]:
        assert_close(method(params_0, [PARTIAL[i] for i in order]), merged, 1e-6)


@every_merge
def test_absent_leaves_count_as_zeros(method):
    params_0 = model()
    full = [tree.fill(tau, vector(1)) for tau in PARTIAL]
    assert_close(method(params_0, PARTIAL), method(params_0, full), 1e-6)


@every_merge
def test_zero_vectors_give_params_0_and_finite_gradients_and_jit_changes_nothing(
    method,
):
    params_0 = model()
    zeros = [jax.tree.map(jnp.zeros_like, tau) for tau in PARTIAL]
    assert_close(method(params_0, zeros), params_0)

    def loss(taus, params_0):
        merged = method(params_0, taus)
        leaves = tree.flatten(merged)
        return sum(jnp.sum(leaves[path] ** 2) for path in SHAPES), merged

    # One program for both claims: its compilation is most of the time.
    program = jax.jit(jax.grad(loss, has_aux=True))
    gradients, merged = program(zeros, params_0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert_close(merged, params_0)
    _, merged = program(PARTIAL, params_0)
    assert_close(merged, method(params_0, PARTIAL), 1e-6)


@every_merge
def test_structure_and_dtypes_are_those_of_params_0(method):
    params_0 = model()
    params_0["block"] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), params_0["block"]
    )
    merged = method(params_0, PARTIAL)
    assert jax.tree.structure(merged) == jax.tree.structure(params_0)
    assert jax.tree.map(jnp.result_type, merged) == jax.tree.map(
        jnp.result_type, params_0
    )
    np.testing.assert_array_equal(merged["ids"], np.arange(5))
    # Summed in float32 and cast once: the bfloat16 leaves are the rounded float32 ones.
    wide = method(jax.tree.map(lambda x: x.astype(jnp.float32), params_0), PARTIAL)
    rounded = wide["block"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["block"]["kernel"], rounded)


@every_merge
def test_nan_in_constants_of_a_jitted_function_is_found(method):
    params_0 = model()
    params_0["scale"] = jnp.nan
    with pytest.raises(ValueError, match="NaN .* scale"):
        jax.jit(lambda taus: method(params_0, taus))(PARTIAL)


@every_merge
def test_second_call_compiles_nothing(method, caplog):
    def compilations(seed):
        # A shape of this test alone, so that the first call has something to compile.
        size = 37 + list(MERGES.values()).index(method)
        shapes = {"dense/kernel": (4, size)}
        params_0, *taus = (
            tree.unflatten({p: jnp.asarray(normal(s, *shapes[p])) for p in shapes})
            for s in [(seed,), *((seed, i) for i in range(3))]
        )
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            jax.block_until_ready(method(params_0, taus))
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert compilations(0)
    assert not compilations(1)


@merges_except(PER_LEAF)
@pytest.mark.parametrize(
    "shapes", [[(4, 3), (3,), (), (0, 2), (1, 1)], [(0, 2)]], ids=["odd", "empty"]
)
def test_it_does_not_matter_how_the_vector_is_cut_into_leaves(method, shapes):
    def leaves(seed):
        return {
            str(i): normal((seed, i), *shape).astype(np.float32)
            for i, shape in enumerate(shapes)
        }

    def joined(leaves):
        return {"all": np.concatenate([leaf.ravel() for leaf in leaves.values()])}

    params_0, *taus = (leaves(seed) for seed in range(4))
    merged = method(params_0, taus)
    assert all(merged[path].shape == leaf.shape for path, leaf in params_0.items())
    one_leaf = method(joined(params_0), [joined(tau) for tau in taus])
    assert_close(joined(merged), one_leaf, 1e-6)


@every_merge
def test_inputs_are_not_modified(method):
    params_0, *taus = jax.tree.map(np.array, [model(), *PARTIAL])
    before = copy.deepcopy([params_0, taus])
    assert changed(method(params_0, taus), params_0)
    assert_close([params_0, taus], before)


GOOD = {"a": {"w": jnp.ones(2)}}
ERRORS = {
    "no task vector": ([], "needs a list of task vectors; found an empty list"),
    "a tree, not a list": (GOOD, "needs a list of task vectors; found one tree"),
    "no leaf": ([{}, {}], "none of the task vectors has a leaf"),
    "shape": (
        [GOOD, {"a": {"w": jnp.ones(3)}}],
        r"task vector 1 does not fit(.|\n)* a/w: \[3\] in the task vector 1, \[2\] in",
    ),
    "extra leaf": (
        [GOOD, {"a": {"b": jnp.ones(3)}}],
        r"a/b \[3\]: not in the floating-point pre-trained parameters",
    ),
    "NaN": (
        [GOOD, {"a": {"w": jnp.array([1, jnp.nan])}}],
        "task vector 1 has NaN or infinite values in 1 leaf: a/w",
    ),
    "infinity": (
        [{"a": {"w": jnp.array([1, -jnp.inf])}}, GOOD],
        "task vector 0 has NaN or infinite values in 1 leaf: a/w",
    ),
}


@every_merge
@pytest.mark.parametrize(("taus", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_merged_is_an_error(method, taus, message):
    with pytest.raises(ValueError, match=message):
        method({"a": {"w": jnp.zeros(2)}}, taus)


@every_merge
def test_non_finite_model_is_an_error(method):
    with pytest.raises(ValueError, match="pre-trained model has NaN .*: a/w"):
        method({"a": {"w": jnp.array([jnp.nan, 0])}}, [GOOD, GOOD])


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (merge.average, "weights"),
        (merge.task_arithmetic, "coef"),
        (merge.awd, "coef"),
        (merge.ties, "coef"),
    ],
    ids=["average", "task_arithmetic", "awd", "ties"],
)
def test_wrong_number_of_coefficients_is_an_error(method, name):
    with pytest.raises(ValueError, match=rf"{name} has shape \[3\]"):
        method({"a": {"w": jnp.zeros(2)}}, [GOOD, GOOD], **{name: [0.1, 0.2, 0.3]})


def test_task_arithmetic_is_the_weighted_sum():
    with jax.enable_x64(True):
        params_0, taus, coefs = normal(0, 3, 4), normal(1, 3, 3, 4), [0.3, -1.0, 0.7]
        merged = merge.task_arithmetic(params_0, list(taus), coef=coefs)
        expected = params_0 + np.tensordot(coefs, taus, 1)
        np.testing.assert_allclose(merged, expected, rtol=1e-12, atol=1e-12)


def test_coefficients_may_depend_on_the_path_and_the_task():
    params_0, taus = model(), [vector(1), vector(2)]

    def coef(path):
        return [0.5, 2.0] if path.startswith("block/") else 0.25

    expected = tree.flatten(params_0)
    for path, leaves in tree.aligned(taus).items():
        coefs = np.broadcast_to(coef(path), 2)
        expected[path] = expected[path] + coefs[0] * leaves[0] + coefs[1] * leaves[1]
    merged = merge.task_arithmetic(params_0, taus, coef=coef)
    assert_close(merged, tree.unflatten(expected), 1e-6)


def test_wrong_number_of_coefficients_of_a_leaf_is_an_error_with_its_path():
    def coef(path):
        return [0.5, 2.0, 1.0] if path == "block/bias" else 0.25

    with pytest.raises(ValueError, match=r"coef of block/bias has shape \[3\]"):
        merge.task_arithmetic(model(), [vector(1), vector(2)], coef=coef)


@pytest.mark.parametrize("method", [merge.task_arithmetic, merge.ties, merge.awd])
def test_coefficients_that_are_not_finite_are_errors(method):
    with pytest.raises(ValueError, match="coef is nan; it must be finite"):
        method(model(), [vector(1), vector(2)], coef=float("nan"))


def test_a_sum_that_overflows_is_an_error():
    params_0, tau = {"w": jnp.ones(1, jnp.float16)}, {"w": jnp.full(1, 6e4)}
    with pytest.raises(ValueError, match="overflows the dtype"):
        merge.task_arithmetic(params_0, [tau], coef=2.0)


def test_plain_numbers_are_leaves_too():
    merged = merge.ties({"w": 1.0}, [{"w": 2.0}, {"w": 4.0}], density=1.0)
    np.testing.assert_array_equal(merged["w"], 4.0)


def test_average_is_the_mean_of_the_models():
    with jax.enable_x64(True):
        params_0, taus = normal(0, 3, 4), normal(1, 3, 3, 4)
        merged = merge.average(params_0, list(taus), weights=[1, 2, 5])
        expected = np.average(params_0 + taus, axis=0, weights=[1, 2, 5])
        np.testing.assert_allclose(merged, expected, rtol=1e-12, atol=1e-12)


def test_negative_coefficient_forgets():
    params_0, tau = model(), vector(1)
    merged = merge.task_arithmetic(params_0, [tau], coef=-0.5)
    assert_close(merged, task_vectors.apply(params_0, tau, -0.5), 1e-7)


@pytest.mark.parametrize("weights", [[1.0, -1.0], 0.0, [float("nan"), 1.0]])
def test_average_refuses_weights_that_cannot_be_normalised(weights):
    tau = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="must be (positive|finite)"):
        merge.average({"w": jnp.ones(2)}, [tau, tau], weights=weights)


def test_task_vectors_that_move_integers_are_refused_with_the_path():
    params_0 = {"w": jnp.ones(2), "steps": jnp.array([1, 2])}
    tau = {"w": jnp.ones(2), "steps": jnp.array([0.7, 0.7])}
    with pytest.raises(ValueError, match=r"\+ steps .* floating-point"):
        merge.task_arithmetic(params_0, [tau])
