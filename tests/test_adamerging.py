"""AdaMerging against float64 differences and Adam by hand.

It reads losses at every step, so it cannot be traced and is no row of `test_merge`.
What it shares with those methods is claimed here.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from adamerging_case import (
    BATCHES,
    HEADS,
    LOGITS_FNS,
    SHAPES,
    head_function,
    model,
    vectors,
)
from checks import assert_close

from jaxarith import losses, merge, tree
from jaxarith.merge.adamerging import _add_gradient, _elect, _elected
from jaxarith.models import heads


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def numpy_entropy(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return -(p * np.log(p)).sum(axis=-1).mean()


def moved(params_0, taus, coefs):
    """θ0 + Σ λ τ, leaf by leaf, with `coefs` `[T]` or `{path: [T]}`."""
    rows = tree.aligned(taus)

    def leaf(path, value):
        if path not in rows:
            return value
        scales = coefs[path] if isinstance(coefs, dict) else coefs
        return value + sum(c * tau for c, tau in zip(scales, rows[path], strict=True))

    return tree.map_with_path(leaf, params_0)


@jax.jit
def summed_entropy(coefs, batches):
    params = moved(model(), vectors(), coefs)
    return sum(
        losses.entropy(logits_fn(params, batch))
        for logits_fn, batch in zip(LOGITS_FNS, batches, strict=True)
    )


def objective(coefs, step=0):
    return summed_entropy(coefs, [source[step % 2] for source in BATCHES])


@jax.jit
def gradient_of(coefs, batches):
    return jax.grad(summed_entropy)(coefs, batches)


def gradient(coefs, step):
    return gradient_of(coefs, [source[step % 2] for source in BATCHES])


def initial(scope, value=0.3):
    if scope == "task":
        return jnp.full(2, value)
    return {path: jnp.full(2, value) for path in SHAPES}


def adam(coefs, gradient_at, steps, learning_rate):
    """Kingma and Ba, Algorithm 1, in NumPy."""
    flat, unflatten = jax.flatten_util.ravel_pytree(coefs)
    c, m, v = np.array(flat), 0.0, 0.0
    for step in range(steps):
        gradient = gradient_at(unflatten(c), step)
        g = np.array(jax.flatten_util.ravel_pytree(gradient)[0])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        c = c - learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return unflatten(c)


def test_entropy_is_its_definition_and_ignores_padded_classes_and_samples():
    logits = oracles.normal(0, 6, 5, scale=3)
    np.testing.assert_allclose(
        losses.entropy(logits), numpy_entropy(logits), rtol=1e-12
    )
    own = logits[:4, :3]
    valid, mask = np.arange(5) < 3, np.arange(6) < 4
    padded = jnp.where(valid, logits, -jnp.inf)
    expected = numpy_entropy(own)
    assert expected > 0.1
    for found in (
        losses.entropy(own),
        losses.entropy(padded, mask=mask),
        losses.entropy(padded, mask=mask.astype(int)),
        losses.entropy(padded.at[4:].set(jnp.nan), mask=mask),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_nan_is_no_padding_and_padding_does_not_spread_nan():
    logits = jnp.array([[1.0, jnp.nan, 0.0], [1.0, 2.0, -jnp.inf]])
    assert np.isnan(losses.entropy(logits)) and np.isnan(losses.entropy(logits[0]))
    mask, labels = np.array([0, 1]), np.array([0, 1])
    for loss in (
        functools.partial(losses.entropy, mask=mask),
        lambda logits: losses.cross_entropy(logits, labels, mask),
    ):
        both = jax.jit(jax.value_and_grad(loss))
        value, slopes = both(logits)
        np.testing.assert_allclose(value, both(logits.at[0].set(0))[0])
        np.testing.assert_array_equal(slopes[0], 0)
        assert value > 0.1 and np.isfinite(slopes[1]).all() and slopes[1].any()


@jax.jit
def gradient_in_features(x, head, valid):
    return jax.grad(lambda x: losses.entropy(heads.logits(head, x, valid)))(x)


def test_entropy_of_a_padded_head_has_the_gradient_of_the_head_alone():
    padded = heads.pad([jnp.asarray(HEADS[1]), jnp.asarray(HEADS[0])])
    x = jnp.asarray(oracles.normal(1, 7, 4))

    def at(head, valid):
        return gradient_in_features(x, head, valid)

    with_padding = at(padded["head"][0], padded["valid"][0])
    np.testing.assert_allclose(with_padding, at(HEADS[1], None), rtol=1e-10)
    sure = jnp.array([[1e4, -1e4, -jnp.inf]])
    assert not jnp.any(jax.grad(losses.entropy)(sure)) and losses.entropy(sure) == 0


@pytest.mark.parametrize("scope", ["layer", "task"])
def test_gradients_are_the_differences_of_the_summed_entropy(scope):
    taus, coefs = vectors(), initial(scope)
    total = jax.tree.map(jnp.zeros_like, coefs)
    params = moved(model(), taus, coefs)
    for logits_fn, source in zip(LOGITS_FNS, BATCHES, strict=True):
        _, total = _add_gradient(logits_fn, params, taus, source[0], None, total)
    flat, unflatten = jax.flatten_util.ravel_pytree(coefs)
    expected = [
        oracles.central_difference(lambda c: objective(unflatten(c)), flat, direction)
        for direction in np.eye(len(flat))
    ]
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(
        *(jax.flatten_util.ravel_pytree(total)[0], expected), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("scope", ["layer", "task"])
def test_steps_are_adam_on_the_sum_of_the_tasks(scope):
    found = merge.adamerging(
        *(model(), vectors(), LOGITS_FNS, BATCHES),
        **dict(scope=scope, steps=5, learning_rate=0.02, clamp=None),
    )
    expected = adam(initial(scope), gradient, 5, 0.02)
    assert_close(found.coefs, expected, 1e-10)
    assert_close(found.params, moved(model(), vectors(), expected), 1e-10)
    assert found.losses.shape == (5, 2)
    np.testing.assert_allclose(found.losses[0].sum(), objective(initial(scope)))
    coef = found.coefs if scope == "task" else found.coefs.__getitem__
    again = merge.task_arithmetic(model(), vectors(), coef=coef)
    assert_close(again, found.params, 1e-14)


def test_batches_may_be_a_function_of_the_step():
    sources = [lambda step, t=t: BATCHES[t][step % 2] for t in range(2)]
    found = [
        merge.adamerging(model(), vectors(), LOGITS_FNS, batches, steps=3)
        for batches in (BATCHES, sources)
    ]
    assert_close(found[0].coefs, found[1].coefs, 0)


def test_padding_of_a_batch_does_not_count():
    batch = {"x": oracles.normal(5, 7, 5), "mask": np.arange(7) < 4}
    found = [
        merge.adamerging(model(), vectors()[:1], LOGITS_FNS[:1], [[b]], steps=3)
        for b in (batch, {"x": batch["x"][:4]})
    ]
    assert_close(found[0].coefs, found[1].coefs, 1e-10)


def own_entries(taus, density):
    """The authors' `ties_merging_split` on `[task, d]`: entries with the final sign."""
    size = taus.shape[1]
    thresholds = oracles.ties_thresholds(taus, size - int(size * density))
    trimmed = taus * (np.abs(taus) >= thresholds[:, None])
    sign = np.sign(trimmed.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    return np.where(trimmed * sign > 0, trimmed, 0)


def test_plus_plus_keeps_every_vectors_own_entries_of_the_elected_sign():
    taus = np.round(4 * oracles.normal(3, 3, 60)) / 8  # ties, and sums that cancel
    taus[1, ::3] = -taus[0, ::3]
    taus[2, ::3] = 0
    cut = [{"a": tau[:24].reshape(4, 6), "b": tau[24:]} for tau in taus]
    expected = own_entries(taus, 0.4)
    assert len(np.unique(np.count_nonzero(expected, axis=1))) > 1
    election = _elect([jax.tree.map(jnp.asarray, tau) for tau in cut], 0.4)
    np.testing.assert_array_equal(_elected(tuple(taus), *election), expected)
    params_0 = {"a": jnp.ones((4, 6)), "b": jnp.ones(36)}
    merged = merge.adamerging(
        *(params_0, cut, LOGITS_FNS[:1] * 3, BATCHES[:1] * 3),
        **dict(density=0.4, steps=0, coef=0.5),
    )
    assert merged.losses.shape == (0, 3)
    flat = np.concatenate([merged.params["a"].ravel(), merged.params["b"]])
    np.testing.assert_allclose(flat, 1 + 0.5 * expected.sum(axis=0), rtol=1e-12)


def test_plus_plus_is_adamerging_of_those_entries():
    rows = tree.aligned(vectors())
    joined = np.stack(
        [np.concatenate([np.ravel(row[t]) for row in rows.values()]) for t in range(2)]
    )
    own = own_entries(joined, 0.5)
    assert np.count_nonzero(own) < 0.5 * own.size
    cuts = np.cumsum([row[0].size for row in rows.values()])[:-1]
    own_taus = [
        tree.unflatten(
            {
                path: jnp.asarray(part.reshape(row[0].shape))
                for (path, row), part in zip(
                    rows.items(), np.split(tau, cuts), strict=True
                )
                if path in tree.flatten(whole)
            }
        )
        for tau, whole in zip(own, vectors(), strict=True)
    ]
    options = dict(steps=3, learning_rate=0.05)
    found = merge.adamerging(
        *(model(), vectors(), LOGITS_FNS, BATCHES), density=0.5, **options
    )
    expected = merge.adamerging(model(), own_taus, LOGITS_FNS, BATCHES, **options)
    assert_close(found.coefs, expected.coefs, 1e-10)
    assert_close(found.params, expected.params, 1e-10)


def product(params, batch):
    return batch["x"] @ params["w"]


def toy(clamp):
    """One vector makes all predictions surer, the other takes that back twice."""
    params_0, eye = {"w": 2 * jnp.eye(3)}, jnp.eye(3)
    taus = [{"w": 2 * eye}, {"w": -4 * eye}]
    return merge.adamerging(
        *(params_0, taus, [product] * 2),
        *([[{"x": np.eye(3)}]] * 2,),
        **dict(scope="task", steps=60, learning_rate=0.02, clamp=clamp),
    )


def test_a_harmful_vector_gets_no_weight_and_entropy_falls():
    found = toy((0.0, 1.0))
    useful, harmful = found.coefs
    assert harmful == 0 and useful > 0.9
    totals = found.losses.sum(axis=1)
    assert np.all(np.diff(totals[:20]) < 0) and totals[-1] < 0.3 * totals[0]


def test_without_clamp_a_harmful_vector_is_subtracted():
    assert toy(None).coefs[1] < -0.2


def test_zero_vectors_give_params_0_and_keep_the_coefficients():
    zeros = [jax.tree.map(jnp.zeros_like, tau) for tau in vectors()]
    found = merge.adamerging(model(), zeros, LOGITS_FNS, BATCHES, steps=2)
    assert_close(found.params, model(), 0)
    for coefs in found.coefs.values():
        np.testing.assert_array_equal(coefs, [0.3] * 2)
    assert found.params["ids"].dtype == model()["ids"].dtype


def test_bfloat16_parameters_stay_so():
    params_0 = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16 if x.dtype == float else x.dtype), model()
    )
    found = merge.adamerging(params_0, vectors(), LOGITS_FNS, BATCHES, steps=2)
    assert jax.tree.map(jnp.result_type, found.params) == jax.tree.map(
        jnp.result_type, params_0
    )
    assert np.any(found.coefs["out"] != 0.3)


def test_second_call_compiles_nothing(caplog):
    logits_fns = [head_function(head) for head in HEADS]

    def compilations(coef):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            merge.adamerging(
                *(model(), vectors(), logits_fns, BATCHES),
                **dict(coef=coef, steps=2, density=0.77),
            )
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert compilations(0.3)
    assert not compilations(0.2)


ERRORS = {
    "scope": (dict(scope="block"), "unknown scope 'block'"),
    "functions": (dict(logits_fns=LOGITS_FNS[:1]), "1 logits_fns for 2 task vectors"),
    "batches": (dict(batches=BATCHES[:1]), "1 batches for 2 task vectors"),
    "no batch": (dict(batches=[BATCHES[0], []]), "task 1 has no batch"),
    "coefficients": (dict(coef=[0.1, 0.2, 0.3]), r"coef has shape \[3\]"),
    "coefficients by path": (
        dict(coef=lambda path: 0.1, scope="task"),
        'given by path, but scope is "task"',
    ),
    "density": (dict(density=20), r"density is 20; it must be in \(0, 1\]"),
    "vectors": (dict(taus=[]), "found an empty list"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_merged_is_an_error(change, message):
    arguments = dict(taus=vectors(), logits_fns=LOGITS_FNS, batches=BATCHES) | change
    with pytest.raises(ValueError, match=message):
        merge.adamerging(model(), **arguments)


def test_non_finite_entropy_names_step_and_task():
    bad = [{"x": np.full((7, 5), np.nan)}]
    with pytest.raises(FloatingPointError, match="task 1 is nan at step 0"):
        merge.adamerging(*(model(), vectors(), LOGITS_FNS, [BATCHES[0], bad]), steps=3)
