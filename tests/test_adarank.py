"""AdaRank against finite differences, its formulas in NumPy, AdaMerging and CART."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from adamerging_case import BATCHES, HEADS, LOGITS_FNS, head_function, model, vectors
from checks import assert_close
from jax.flatten_util import ravel_pytree

from jaxarith import losses, merge, tree
from jaxarith.merge.adarank import (
    LAYERS,
    _add_gradient,
    _merge,
    _parts,
    _slopes,
    _zeros,
)

MATRICES = ("in/kernel", "out")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def decomposed(tau):
    return np.linalg.svd(np.asarray(tau), full_matrices=False)


def moved(params_0, taus, coefs, scores):
    """The equation of AdaRank; scores `{path: [T, r]}` are those of matrices."""
    rows = tree.aligned(taus)

    def leaf(path, value):
        if path not in rows:
            return value
        for task, tau in enumerate(rows[path]):
            if path in scores:
                u, s, vt = decomposed(tau)
                on = np.asarray(scores[path][task] > 0)
                tau = (u * (s * on)) @ vt
            value = value + coefs[path][task] * tau
        return value

    return tree.map_with_path(leaf, params_0)


@jax.jit
def entropy_of(params):
    return sum(
        losses.entropy(logits_fn(params, source[0]))
        for logits_fn, source in zip(LOGITS_FNS, BATCHES, strict=True)
    )


def case():
    """Coefficients and scores that differ, with some directions off."""
    rows = tree.aligned(vectors())
    coefs = {
        path: jnp.asarray(0.3 + oracles.normal((7, i), 2, scale=0.1))
        for i, path in enumerate(rows)
    }
    scores = {
        path: jnp.asarray(oracles.normal((8, i), 2, min(rows[path][0].shape), scale=3))
        for i, path in enumerate(MATRICES)
    }
    assert all(0.1 < np.mean(own > 0) < 0.9 for own in scores.values())
    return coefs, scores


def found_slopes(coefs, scores):
    rows = tree.aligned(vectors())
    parts = {
        path: _parts(row, path in MATRICES, "pretrained") for path, row in rows.items()
    }
    every = {path: scores.get(path) for path in rows}
    params = _merge(model(), parts, coefs, every)
    assert_close(params, moved(model(), vectors(), coefs, scores), 1e-10)
    total = _zeros(params, parts)
    for logits_fn, source in zip(LOGITS_FNS, BATCHES, strict=True):
        _, total = _add_gradient(logits_fn, params, source[0], total)
    return _slopes(total, parts, coefs, every)


def test_gradients_of_coefficients_are_the_differences_of_the_summed_entropy():
    coefs, scores = case()
    flat, unflatten = ravel_pytree(coefs)

    def objective(flat):
        return entropy_of(moved(model(), vectors(), unflatten(flat), scores))

    expected = [
        oracles.central_difference(objective, flat, direction)
        for direction in np.eye(len(flat))
    ]
    assert np.abs(expected).max() > 0.01
    found, _ = ravel_pytree(found_slopes(coefs, scores)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


def test_gradients_of_scores_are_straight_through():
    """λ σ uᵀGv times the derivative of sigmoid(b / 10), also where B is 0."""
    coefs, scores = case()
    params = moved(model(), vectors(), coefs, scores)
    gradient = tree.flatten(jax.grad(entropy_of, allow_int=True)(params))
    _, found = found_slopes(coefs, scores)
    assert {path for path in found if found[path] is not None} == set(MATRICES)
    for path in MATRICES:
        for task, tau in enumerate(tree.aligned(vectors())[path]):
            u, s, vt = decomposed(tau)
            products = np.array(
                [
                    sigma * left @ gradient[path] @ right
                    for left, sigma, right in zip(u.T, s, vt, strict=True)
                ]
            )
            soft = 1 / (1 + np.exp(-scores[path][task] / 10))
            expected = coefs[path][task] * products * soft * (1 - soft) / 10
            assert np.abs(expected).min() > 1e-7
            np.testing.assert_allclose(
                found[path][task], expected, rtol=1e-9, atol=1e-14
            )


adarank_of = functools.partial(merge.adarank, matrices=None)


def test_with_all_directions_on_it_is_adamerging():
    """In five steps no score changes its sign."""
    arguments = model(), vectors(), LOGITS_FNS, BATCHES
    found = adarank_of(*arguments, steps=5, learning_rate=0.01)
    expected = merge.adamerging(*arguments, steps=5, learning_rate=0.01, clamp=None)
    assert all(np.all(own) for own in found.kept.values())
    assert_close(found.coefs, expected.coefs, 1e-10)
    assert_close(found.params, expected.params, 1e-10)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-10)


def test_the_first_directions_are_on_at_first():
    found = adarank_of(model(), vectors(), LOGITS_FNS, BATCHES, steps=0, rank=0.5)
    assert found.losses.shape == (0, 2) and set(found.kept) == set(MATRICES)
    for path, rank in zip(MATRICES, (2, 2), strict=True):
        own = np.arange(found.kept[path].shape[1]) < rank
        np.testing.assert_array_equal(found.kept[path], [own, own])
    scores = {path: 1.0 * found.kept[path] for path in MATRICES}
    coefs = dict.fromkeys(tree.aligned(vectors()), [0.3, 0.3])
    assert_close(found.params, moved(model(), vectors(), coefs, scores), 1e-10)
    assert all(np.all(own == 0.3) for own in found.coefs.values())


def test_from_the_mean_it_starts_at_cart():
    third = jax.tree.map(lambda x: x[::-1] if x.ndim else 2 * x, vectors()[0])
    taus = [*vectors(), third]
    found = adarank_of(
        *(model(), taus, LOGITS_FNS[:1] * 3, BATCHES[:1] * 3), start="mean", steps=0
    )
    assert_close(found.params, merge.cart(model(), taus), 1e-10)
    for path in MATRICES:  # 16 % of 5 and 4 directions
        np.testing.assert_array_equal(np.sum(found.kept[path], axis=1), 1)


def test_from_the_mean_steps_are_those_about_the_average():
    average = merge.average(model(), vectors())
    rows = tree.aligned(vectors())
    differences = [
        tree.unflatten({path: row[t] - sum(row) / 2 for path, row in rows.items()})
        for t in range(2)
    ]
    stepped = functools.partial(
        adarank_of, steps=3, learning_rate=0.05, rank=0.5, coef=0.7
    )
    found = stepped(model(), vectors(), LOGITS_FNS, BATCHES, start="mean")
    expected = stepped(average, differences, LOGITS_FNS, BATCHES)
    assert_close(found.params, expected.params, 1e-9)
    assert_close(found.coefs, expected.coefs, 1e-9)


def product(params, batch):
    return batch["x"] @ params["w"]


def toy(**options):
    """The first two directions make predictions surer, the third takes that back."""
    tau = {"w": jnp.diag(jnp.array([3.0, 2.5, -2.0]))}
    batches = [[{"x": np.eye(3)}]]
    return adarank_of({"w": 2.5 * jnp.eye(3)}, [tau], [product], batches, **options)


def test_a_harmful_direction_is_dropped_and_entropy_falls():
    found = toy(steps=40, learning_rate=0.02)
    np.testing.assert_array_equal(found.kept["w"], [[True, True, False]])
    totals = found.losses.sum(axis=1)
    assert totals[-1] < 0.5 * totals[0]
    expected = 2.5 + found.coefs["w"][0] * np.array([3.0, 2.5, 0.0])
    np.testing.assert_allclose(found.params["w"], np.diag(expected), atol=1e-10)


def test_a_useful_direction_comes_back():
    found = toy(steps=40, learning_rate=0.02, rank=0.3)
    np.testing.assert_array_equal(found.kept["w"], [[True, True, False]])


def test_the_same_call_gives_the_same_bits():
    arguments = model(), vectors(), LOGITS_FNS, BATCHES
    runs = [adarank_of(*arguments, steps=4, learning_rate=0.05) for _ in range(2)]
    assert np.any(runs[0].coefs["out"] != 0.3)
    assert not np.all(runs[0].kept["out"])
    assert_close(runs[0]._asdict(), runs[1]._asdict(), 0)


def test_batches_may_be_a_function_of_the_step_and_padded():
    padded = [{**b, "mask": np.arange(7) < 4} for b in BATCHES[0]]
    cut = [{"x": b["x"][:4]} for b in BATCHES[0]]
    found = [
        adarank_of(model(), vectors()[:1], LOGITS_FNS[:1], [batches], steps=3)
        for batches in (padded, lambda step: cut[step % 2])
    ]
    assert_close(found[0].coefs, found[1].coefs, 1e-10)


def test_zero_vectors_give_params_0_and_keep_coefficients_and_directions():
    zeros = [jax.tree.map(jnp.zeros_like, tau) for tau in vectors()]
    found = adarank_of(model(), zeros, LOGITS_FNS, BATCHES, steps=2)
    assert_close(found.params, model(), 0)
    assert all(np.all(own == 0.3) for own in found.coefs.values())
    assert all(np.all(own) for own in found.kept.values())
    assert found.params["ids"].dtype == model()["ids"].dtype


def test_running_statistics_are_averaged_and_dtypes_stay():
    def with_mean(tree, value):
        return {**tree, "norm": {"mean": jnp.full(3, value)}}

    params_0 = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16 if x.dtype == float else x.dtype),
        with_mean(model(), 1.0),
    )
    taus = [with_mean(tau, value) for tau, value in zip(vectors(), (1, 3), strict=True)]
    for start in ("pretrained", "mean"):
        found = adarank_of(
            params_0, taus, LOGITS_FNS, BATCHES, steps=1, start=start, rank=0.5
        )
        np.testing.assert_array_equal(found.params["norm"]["mean"], 3)
        assert "norm/mean" not in found.coefs
        assert jax.tree.map(jnp.result_type, found.params) == jax.tree.map(
            jnp.result_type, params_0
        )


def test_second_call_compiles_nothing(caplog):
    logits_fns = [head_function(head) for head in HEADS]

    def compilations(coef):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            adarank_of(model(), vectors(), logits_fns, BATCHES, coef=coef, steps=2)
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert compilations(0.3)
    assert not compilations(0.2)


def test_the_default_takes_weights_of_attention_and_mlp():
    taken = [
        "vision_model/encoder/layers/3/self_attn/q_proj/kernel",
        "vision_model/encoder/layers/3/mlp/fc1/kernel",
        "encoder/block/0/layer/0/SelfAttention/q/kernel",
        "encoder/block/0/layer/1/DenseReluDense/wi/kernel",
        "roberta/encoder/layer/3/attention/self/query/kernel",
        "roberta/encoder/layer/3/intermediate/dense/kernel",
        "transformer/h/0/attn/c_attn/kernel",
    ]
    others = [
        "visual_projection/kernel",
        "vision_model/embeddings/position_embedding/embedding",
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
        "shared/embedding",
    ]
    found = [path for path in taken + others if re.fullmatch(LAYERS, path)]
    assert found == taken


ERRORS = {
    "start": (dict(start="zero"), "unknown start 'zero'; known are pretrained, mean"),
    "rank": (dict(rank=0.0), r"rank is 0.0; it must be in \(0, 1\]"),
    "functions": (dict(logits_fns=LOGITS_FNS[:1]), "1 logits_fns for 2 task vectors"),
    "batches": (dict(batches=BATCHES[:1]), "1 batches for 2 task vectors"),
    "no batch": (dict(batches=[BATCHES[0], []]), "task 1 has no batch"),
    "coefficients": (dict(coef=[0.1, 0.2, 0.3]), r"coef has shape \[3\]"),
    "matrices": (dict(matrices="mlp.*"), "no 2-D leaf matches matrices='mlp"),
    "vectors": (dict(taus=[]), "found an empty list"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_merged_is_an_error(change, message):
    arguments = dict(taus=vectors(), logits_fns=LOGITS_FNS, batches=BATCHES)
    with pytest.raises(ValueError, match=message):
        adarank_of(model(), **arguments | change)


def test_non_finite_entropy_names_step_and_task():
    bad = [{"x": np.full((7, 5), np.nan)}]
    with pytest.raises(FloatingPointError, match="task 1 is nan at step 0"):
        adarank_of(model(), vectors(), LOGITS_FNS, [BATCHES[0], bad], steps=3)
