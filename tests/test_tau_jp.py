"""The tau-Jacobian product: penalty, fused step, draws, matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import flops, normal

from jaxarith import tangent, tau_jp

CLOSE = dict(rtol=1e-10, atol=1e-10)  # for float64


FIELDS = ("x", "shift")


def encoder(params, x, shift):
    return jnp.tanh((x + shift) @ params["in"]) @ params["out"]


def vector(seed):
    return {"in": normal((seed, 0), 4, 6), "out": normal((seed, 1), 6, 3)}


def batch(seed, size):
    return normal((seed, 2), size, 4), normal((seed, 3), size, 4)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_penalty_is_the_mean_norm_to_the_power(x64, power, shape):
    tangents = normal(0, *shape)
    expected = np.mean(np.linalg.norm(tangents, axis=-1) ** power)
    np.testing.assert_allclose(tau_jp.penalty(tangents, power=power), expected, **CLOSE)


@pytest.mark.parametrize("power", [1, 2])
def test_penalty_counts_what_the_mask_keeps(x64, power):
    tangents, mask = normal(0, 6, 3), np.array([1, 0, 1, 1, 0, 0], bool)
    actual = tau_jp.penalty(tangents, mask, power)
    np.testing.assert_allclose(actual, tau_jp.penalty(tangents[mask], None, power))
    assert tau_jp.penalty(tangents, np.zeros(6, bool), power) == 0


def test_penalty_of_a_pytree_is_that_of_the_concatenated_outputs(x64):
    a, b = normal(0, 5, 3), normal(1, 5, 2)
    joined = tau_jp.penalty(np.concatenate([a, b], axis=1))
    np.testing.assert_allclose(tau_jp.penalty({"a": a, "b": b}), joined, **CLOSE)


@pytest.mark.parametrize("power", [1, 2])
def test_penalty_has_gradient_zero_at_tau_zero(power):
    params_0, inputs = vector(0), batch(0, 5)

    def loss(tau):
        _, tangents = tangent.jvp(encoder, params_0, tau, *inputs)
        return tau_jp.penalty(tangents, power=power)

    gradient = jax.grad(loss)(jax.tree.map(jnp.zeros_like, params_0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_penalty_does_not_hide_nan():
    assert np.isnan(tau_jp.penalty(jnp.array([[1.0, jnp.nan], [1.0, 1.0]])))


def test_penalty_refuses_other_powers():
    with pytest.raises(ValueError, match="power is 3; it must be 1 or 2"):
        tau_jp.penalty(jnp.ones((2, 3)), power=3)


@pytest.mark.parametrize("mode", tau_jp.MODES)
@pytest.mark.parametrize("power", [1, 2])
def test_fused_step_equals_separate_passes(x64, mode, power):
    params_0, tau, inputs = vector(0), vector(1), batch(0, 6)
    pools = [batch(10 + task, 4) for task in range(3)]
    numbers = tau_jp.draw(mode, step=4, tasks=3, batch=4)
    samples = [i % 4 for i in range(len(numbers))]
    others = tuple(
        np.stack([pools[t][part][i] for t, i in zip(numbers, samples, strict=True)])
        for part in range(2)
    )
    mask = np.arange(len(numbers)) != 1
    weights = normal(5, 6, 3)

    def fused(tau):
        outputs, penalty = tau_jp.linearized_and_penalty(
            encoder, params_0, tau, inputs, others, mask=mask, power=power
        )
        return jnp.sum(weights * outputs) + penalty, (outputs, penalty)

    def separate(tau):
        outputs, tangents = tangent.jvp(encoder, params_0, tau, *inputs)
        _, penalised = tangent.jvp(encoder, params_0, tau, *others)
        penalty = tau_jp.penalty(penalised, mask, power)
        outputs = outputs + tangents
        return jnp.sum(weights * outputs) + penalty, (outputs, penalty)

    values, gradients = zip(
        *(jax.value_and_grad(f, has_aux=True)(tau) for f in (fused, separate)),
        strict=True,
    )
    assert values[0][1][0].shape == (6, 3) and values[0][1][1] > 0.1
    compare = lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)  # noqa: E731
    jax.tree.map(compare, *values)
    jax.tree.map(compare, *gradients)


@pytest.mark.parametrize("extra", [8, 64])
def test_penalty_costs_its_share_of_samples(extra):
    layers, size, width = 6, 64, 128
    params_0 = {f"{i}": normal(i, width, width) / width**0.5 for i in range(layers)}

    def stack(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"{i}"])
        return x

    def plain(tau, params_0, x):
        return jnp.sum(sum(tangent.jvp(stack, params_0, tau, x)) ** 2)

    def penalised(tau, params_0, x, others):
        outputs, penalty = tau_jp.linearized_and_penalty(
            stack, params_0, tau, (x,), (others,)
        )
        return jnp.sum(outputs**2) + penalty

    args = params_0, params_0, normal(10, size, width)
    ratio = flops(jax.grad(penalised), *args, normal(11, extra, width)) / flops(
        jax.grad(plain), *args
    )
    assert ratio == pytest.approx((size + extra) / size, rel=0.02)


def test_cyclic_draws_take_the_tasks_in_turn():
    tasks = [tau_jp.draw("cyclic", step, tasks=3, batch=2) for step in range(7)]
    assert [list(numbers) for numbers in tasks] == [
        [t, t] for t in (0, 1, 2) * 2 + (0,)
    ]


def test_strict_draws_take_a_batch_of_every_task():
    assert list(tau_jp.draw("strict", 5, tasks=3, batch=2)) == [0, 0, 1, 1, 2, 2]


def test_mixed_draws_are_uniform_over_the_tasks():
    draws = np.stack([tau_jp.draw("mixed", step, 5, batch=8) for step in range(2000)])
    assert draws.shape == (2000, 8)
    counts = np.bincount(draws.ravel(), minlength=5)
    expected = draws.size / 5
    assert np.sum((counts - expected) ** 2 / expected) < 13.3  # chi², 4 d.o.f., 1 %
    # and independent of one another, within a step and from step to step
    for a, b in [(draws[:, 0], draws[:, 1]), (draws[:-1, 0], draws[1:, 0])]:
        assert np.mean(a == b) == pytest.approx(1 / 5, abs=0.03)


def test_mixed_draws_depend_on_seed_and_step_alone():
    first = tau_jp.draw("mixed", 7, tasks=5, batch=64, seed=3)
    np.random.seed(0)
    tau_jp.draw("mixed", 6, tasks=5, batch=64, seed=3)
    np.testing.assert_array_equal(tau_jp.draw("mixed", 7, 5, 64, seed=3), first)
    assert not np.array_equal(tau_jp.draw("mixed", 8, 5, 64, seed=3), first)
    assert not np.array_equal(tau_jp.draw("mixed", 7, 5, 64, seed=4), first)


def test_strict_penalty_is_the_mean_over_tasks_of_their_means(x64):
    tangents = normal(0, 12, 3)
    tasks = tau_jp.draw("strict", 0, tasks=3, batch=4)
    means = [tau_jp.penalty(tangents[tasks == task]) for task in range(3)]
    np.testing.assert_allclose(tau_jp.penalty(tangents), np.mean(means), **CLOSE)


def test_draw_refuses_unknown_modes_and_no_task():
    with pytest.raises(ValueError, match="'random'.* cyclic, strict, mixed"):
        tau_jp.draw("random", 0, 3, 4)
    with pytest.raises(ValueError, match="at least one other task"):
        tau_jp.draw("cyclic", 0, 0, 4)


@pytest.mark.parametrize("power", [1, 2])
def test_matrix_is_a_loop_of_jvps_over_unpadded_samples(x64, power):
    params_0, taus = vector(0), [vector(1), vector(2), {"out": vector(3)["out"]}]
    data = [batch(4, 10), batch(5, 3)]

    def batches(inputs, size=4):
        for start in range(0, len(inputs[0]), size):
            parts = [part[start : start + size] for part in inputs]
            padding = size - len(parts[0])
            mask = np.arange(size) < len(parts[0])
            pad = [(0, padding), (0, 0)]
            x, shift = (np.pad(p, pad, constant_values=9) for p in parts)
            yield {"x": x, "shift": shift, "mask": mask}

    datasets = [batches(inputs) for inputs in data]
    actual = tau_jp.matrix(encoder, params_0, taus, datasets, FIELDS, power=power)
    expected = [
        [
            np.mean(
                np.linalg.norm(tangent.jvp(encoder, params_0, tau, *inputs)[1], axis=1)
                ** power
            )
            for inputs in data
        ]
        for tau in taus
    ]
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, **CLOSE)


def test_matrix_names_the_dataset_without_samples():
    full = dict(zip(FIELDS, batch(0, 4), strict=True)) | {"mask": np.ones(4, bool)}
    empty = full | {"mask": np.zeros(4, bool)}
    with pytest.raises(ValueError, match="dataset 1 has no sample"):
        tau_jp.matrix(encoder, vector(0), [vector(1)], [[full], [empty]], FIELDS)


def test_matrix_needs_a_task_vector():
    with pytest.raises(ValueError, match="at least one task vector"):
        full = dict(zip(FIELDS, batch(0, 4), strict=True))
        tau_jp.matrix(encoder, vector(0), [], [[full]], FIELDS)


def test_matrix_by_token_counts_the_tokens_that_are_no_padding(x64):
    """Of samples that count; what `mask` leaves out has no token that does."""
    tokens, weights = normal(0, 3, 5, 4), {"w": normal(1, 4, 2)}
    data = {
        "image": tokens,
        "mask": np.array([True, True, False]),
        "attention_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1] * 5]),
    }
    found = tau_jp.matrix(
        *(lambda params, x: x @ params["w"], {"w": np.zeros((4, 2))}, [weights]),
        [[data]],
        penalty_mask="attention_mask",
    )
    norms = np.linalg.norm(tokens @ weights["w"], axis=-1)
    kept = np.concatenate([norms[0, :3], norms[1]])
    np.testing.assert_allclose(found, [[kept.mean()]], **CLOSE)


def test_batches_of_pairs_or_without_an_input_are_refused():
    pairs = [(batch(0, 4), np.ones(4, bool))]
    lacking = [{"x": np.ones((4, 4))}]
    arguments = encoder, vector(0), [vector(1)]
    with pytest.raises(ValueError, match="a batch is a tuple; expected a dict"):
        tau_jp.matrix(*arguments, [pairs], FIELDS)
    with pytest.raises(ValueError, match="no field 'shift'; it has 'x'"):
        tau_jp.matrix(*arguments, [lacking], FIELDS)
    with pytest.raises(ValueError, match="a batch is a str"):
        tau_jp.matrix(*arguments, lacking, FIELDS)  # one dataset, not in a list


def test_the_mean_of_magnitudes_is_that_of_the_papers_code_for_t5():
    rng = np.random.default_rng(0)
    tangents = rng.normal(size=(3, 2, 50)).astype(np.float32)
    mask = np.array([[True, False]] * 3)
    found = tau_jp.penalty(
        jnp.asarray(tangents), jnp.asarray(mask), norm="mean_absolute"
    )
    np.testing.assert_allclose(found, np.abs(tangents[:, 0]).mean(), rtol=1e-6)
    euclidean = tau_jp.penalty(jnp.asarray(tangents), jnp.asarray(mask))
    assert found <= euclidean / np.sqrt(50)
    squared = tau_jp.penalty(jnp.asarray(tangents), power=2, norm="mean_absolute")
    np.testing.assert_allclose(
        squared, (np.abs(tangents).mean(-1) ** 2).mean(), rtol=1e-6
    )
    slope = jax.grad(lambda x: tau_jp.penalty(x, norm="mean_absolute"))(
        jnp.zeros((2, 4))
    )
    np.testing.assert_array_equal(slope, 0)
