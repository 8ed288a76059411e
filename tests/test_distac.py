"""Repair of a ready task vector from unlabelled samples of its task."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_networks
from checks import assert_close

from jaxarith import task_vectors, train, tree
from jaxarith.train.distac import divergence

CONFIG = train.TrainConfig(steps=40, batch_size=8, learning_rate=0.02, weight_decay=0.0)


def softmax(z):
    exp = np.exp(z - z.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperatures", [(10.0, 10.0), (1.0, 10.0), (2.0, 0.5)])
def test_the_divergence_is_the_papers(temperatures, x64):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(2, 6, 4))
    p = softmax(teacher / temperatures[0])
    q = softmax(student / temperatures[1])
    want = np.prod(temperatures) * np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert want > 0.1
    assert_close(divergence(student, teacher, temperatures), want, 1e-12)
    # Classes that neither has, as of heads that are padded to one size.
    padded = [
        np.concatenate([z, np.full((6, 2), -np.inf)], axis=1)
        for z in (student, teacher)
    ]
    assert_close(divergence(*padded, temperatures), want, 1e-12)
    slope = jax.grad(divergence)(*padded, temperatures)
    wanted = np.prod(temperatures) * (q - p) / temperatures[1] / 6
    assert_close(slope[:, :4], wanted, 1e-12)
    assert_close(slope[:, 4:], np.zeros((6, 2)))


def test_at_the_teacher_and_equal_temperatures_nothing_moves(x64):
    logits = 3 * np.random.default_rng(0).normal(size=(6, 4))
    value, slope = jax.value_and_grad(divergence)(logits, logits, (10.0, 10.0))
    assert_close([value, slope], [0.0, np.zeros((6, 4))], atol=1e-14)


@pytest.fixture(scope="module")
def case():
    """A model, its pre-trained parameters, a task vector and unlabelled samples."""
    apply_fn, params_0, _ = tiny_networks.network(samples=1)
    params_0 = jax.tree.map(np.float32, params_0)
    x = np.random.default_rng(2).normal(size=(32, 3)).astype("f4")
    return apply_fn, params_0, tiny_networks.vector(params_0), {"image": x}


def repaired(case, config=CONFIG, **options):
    apply_fn, params_0, tau, samples = case
    return train.distac(apply_fn, params_0, tau, samples, config, **options)


def test_targets_are_the_teachers_outputs_of_the_same_samples(case):
    apply_fn, params_0, tau, samples = case
    taught = train.with_targets(apply_fn, params_0, samples, batch_size=5)
    assert len(taught) == 32
    for i in (0, 7, 31):
        row = taught[i]
        assert_close(row["image"], samples["image"][i])
        want = apply_fn(params_0, samples["image"][i : i + 1])[0]
        assert_close(row["target"], want, 1e-6)


def test_it_is_a_distillation_from_the_teacher_itself(case):
    apply_fn, params_0, tau, samples = case
    teacher = task_vectors.apply(params_0, tau)

    def loss(outputs, batch, _):
        targets = apply_fn(teacher, batch["image"])
        return divergence(outputs, targets, (4.0, 5.0))

    config = dataclasses.replace(CONFIG, steps=3)
    batches = train.task_batches([samples], config, names=["task"])
    start = [jax.tree.map(lambda leaf: 0.5 * leaf, tau)]
    [want] = train.fine_tune(
        apply_fn, params_0, loss, batches, config, names=["task"], start=start
    )
    found = repaired(case, config, scale=0.5, temperatures=(4.0, 5.0), anchor=0.0)
    assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_the_norm_stays_and_the_predictions_come_back(case):
    apply_fn, params_0, tau, samples = case

    def distance(vector):
        logits = [
            apply_fn(task_vectors.apply(params_0, t), samples["image"])
            for t in (vector, tau)
        ]
        return divergence(*logits, (10.0, 10.0))

    half = jax.tree.map(lambda leaf: 0.5 * leaf, tau)
    norm = optax.tree.norm(half)
    ends = {
        anchor: repaired(case, scale=0.5, anchor=anchor) for anchor in (0.0, 0.3, 100.0)
    }
    free, kept, held = (optax.tree.norm(end) for end in ends.values())
    assert_close(held, norm, rtol=1e-2)
    assert_close(kept, norm, rtol=0.2)
    assert abs(free - norm) > 1.5 * abs(kept - norm)
    assert distance(ends[0.0]) < distance(ends[0.3]) < 0.7 * distance(half)


def test_only_the_leaves_of_the_vector_move(case):
    apply_fn, params_0, tau, samples = case
    part = tree.select(tau, "second/.*")
    config = dataclasses.replace(CONFIG, steps=2)
    found = train.distac(apply_fn, params_0, part, samples, config, scale=0.5)
    assert jax.tree.structure(found) == jax.tree.structure(part)
    same = jax.tree.map(lambda a, b: np.array_equal(a, 0.5 * b), found, part)
    assert not any(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "options",
    [{"linearized": True}, {"distill": train.Distill()}, {"penalty": "diagonal"}],
)
def test_other_recipes_are_refused(case, options):
    with pytest.raises(ValueError, match="its own penalty"):
        repaired(case, dataclasses.replace(CONFIG, **options))


@pytest.mark.parametrize(
    "options, message",
    [({"temperatures": (0.0, 1.0)}, "two above 0"), ({"anchor": -1.0}, "anchor is -1")],
)
def test_a_temperature_and_an_anchor_that_are_none_are_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        repaired(case, **options)


def test_outputs_that_are_no_array_are_refused(case):
    apply_fn, params_0, _, samples = case
    with pytest.raises(ValueError, match="returned a dict; expected one array"):
        train.with_targets(lambda p, x: {"logits": apply_fn(p, x)}, params_0, samples)
    with pytest.raises(ValueError, match="batch_size is 0"):
        train.with_targets(apply_fn, params_0, samples, batch_size=0)
