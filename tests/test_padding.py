"""Batches that devices and micro-batches do not divide: nothing of a step changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_run
from checks import assert_close

from jaxarith import sharding, tau_jp, train
from jaxarith.train import padding

TASKS = 2
CONFIG = train.TrainConfig(steps=2, warmup_steps=0, batch_size=10, penalty_batch_size=3)
KINDS = {
    "ordinary": {},
    "cyclic": {"linearized": True, "penalty": "cyclic"},
    "squared": {"linearized": True, "penalty": "strict", "penalty_power": 2},
    "distilled": {"distill": train.Distill(coef=0.5)},
}


def loss_fn(outputs, batch, scale):
    return jnp.mean((outputs - batch["label"]) ** 2) * scale


def tokens(params, x):  # [B, 5] to three outputs of each sample
    hidden = training_run.apply_fn(params, x)
    return jnp.stack([hidden, 2 * hidden, hidden**2], axis=1)


def sources():
    rngs = [np.random.default_rng(seed) for seed in (1, 2, 3)]
    return [
        [
            {
                "image": rng.normal(size=5).astype(np.float32),
                "label": rng.normal(size=2).astype(np.float32),
                "there": np.array([1, i % 2, 0], np.int32),
            }
            for i in range(20)
        ]
        for rng in rngs
    ]


def trained(kind, sizes, micro_batches=1, **given):
    """What two steps of gradient descent have made, and their metrics."""
    config = dataclasses.replace(CONFIG, micro_batches=micro_batches, **KINDS[kind])
    own, mesh, lines = sources(), sharding.make_mesh(sizes), []
    batches = train.task_batches(
        own[:TASKS],
        config,
        others=[own[1:], [own[0], own[2]]],
        inputs=("image", "there") if given else ("image",),
        mesh=mesh,
    )
    taus = train.fine_tune(
        given.pop("apply_fn", training_run.apply_fn),
        training_run.params_0(),
        given.pop("loss", loss_fn),
        batches,
        config,
        names=["a", "b"],
        constants=np.ones(TASKS, np.float32),
        mesh=mesh,
        optimizer=optax.sgd(0.1),
        observe=lambda done, taus, metrics: lines.append(metrics),
        observe_every=1,
        **given,
    )
    return sharding.to_host(taus), lines


WHERE = [("data=1", 3), pytest.param("data=4,fsdp=2", 1, marks=pytest.mark.devices)]
WHERE += [pytest.param("task=2,data=4", 2, marks=pytest.mark.devices)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "micro_batches"), WHERE)
def test_a_step_is_that_of_one_device_without_copies(kind, sizes, micro_batches):
    expected, lines = trained(kind, "data=1")
    actual, measured = trained(kind, sizes, micro_batches)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-2
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for line, other in zip(measured, lines, strict=True):
        for name in {"loss", "penalty", "distillation"} & other.keys():
            assert_close(line[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.devices
def test_a_penalty_on_tokens_leaves_copies_out():
    def loss(outputs, batch, scale):
        return jnp.mean((outputs[:, 0] - batch["label"]) ** 2) * scale

    given = {"apply_fn": tokens, "loss": loss, "penalty_mask": "there"}
    expected, lines = trained("cyclic", "data=1", **given)
    actual, measured = trained("cyclic", "data=8", **given)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert_close(measured[1]["penalty"], lines[1]["penalty"], rtol=1e-5, atol=1e-6)
    assert lines[1]["penalty"]["a"] > 0.01


def test_weights_make_a_mean_over_parts_the_mean_of_the_samples():
    values = np.random.default_rng(0).normal(size=(12, 3))
    weight = padding.weights(np.arange(12), 7, 12)[padding.WEIGHT]
    parts = [
        tau_jp.penalty(jnp.asarray(values[i : i + 4]), weight=weight[i : i + 4])
        for i in (0, 4, 8)
    ]
    expected = np.linalg.norm(values[:7], axis=1).mean()
    np.testing.assert_allclose(np.mean(parts), expected, rtol=1e-6)


def test_joint_batches_are_filled_up_and_say_so():
    config = dataclasses.replace(CONFIG, batch_size=5, micro_batches=4)
    batch = train.joint_batches(sources(), config)[1]
    assert batch["task"].shape == (1, 16)
    weight = batch[padding.WEIGHT][0]
    np.testing.assert_allclose(weight, [16 / 15] * 15 + [0])
    np.testing.assert_array_equal(batch["image"][0, 15], batch["image"][0, 0])


@pytest.mark.devices
def test_no_part_is_nothing_but_copies_of_the_own_samples():
    config = dataclasses.replace(CONFIG, micro_batches=2)
    mesh = sharding.make_mesh("data=8")
    with pytest.raises(ValueError, match="2 micro-batches of 10 samples .* has 1"):
        train.task_batches(sources(), config, mesh=mesh)


@pytest.mark.devices
@pytest.mark.parametrize(
    ("sizes", "tasks", "expected"),
    [
        ("task=8", 8, (8, 1, 1)),
        ("task=8", 6, (2, 4, 1)),
        ("task=8", 1, (1, 8, 1)),
        ("task=4,fsdp=2", 3, (1, 4, 2)),
    ],
)
def test_devices_that_tasks_do_not_divide_share_batches(sizes, tasks, expected):
    mesh = sharding.make_mesh(sizes)
    found = sharding.for_tasks(mesh, tasks)
    assert found.devices.shape == expected
    assert [*found.devices.flat] == [*mesh.devices.flat]


def test_a_penalty_that_starts_later_leaves_the_first_steps_alone():
    """The first step is that without a penalty, and both are one program."""

    def run(**given):
        own = sources()[:TASKS]
        config = dataclasses.replace(
            CONFIG, linearized=True, steps=3, penalty_coef=5.0, **given
        )
        found = []
        train.fine_tune(
            training_run.apply_fn,
            training_run.params_0(),
            loss_fn,
            train.task_batches(own, config),
            config,
            names=["a", "b"],
            constants=np.ones(TASKS, np.float32),
            optimizer=optax.sgd(0.1),
            observe=lambda done, taus, metrics: found.append(sharding.to_host(taus)),
            observe_every=1,
        )
        return found

    late = run(penalty="cyclic", penalty_start=2)
    never, always = run(), run(penalty="cyclic")
    # Two programs, whose sums round numbers of size 1 in another order: 2 units.
    assert_close(late[1], never[1], rtol=1e-6, atol=2**-22)
    for other in (never[2], always[2]):
        gap = np.abs(late[2][0]["in"]["kernel"] - other[0]["in"]["kernel"]).max()
        assert gap > 1e-3
