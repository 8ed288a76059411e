"""Training with curvature in the place of the other tasks' samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_run
from checks import assert_close

from jaxarith import curvature, sharding, train

CONFIG = train.TrainConfig(
    steps=4,
    batch_size=8,
    learning_rate=0.05,
    linearized=True,
    penalty="diagonal",
    penalty_coef=0.3,
)


def measured(**options):
    """The curvature of both tasks."""
    return [
        curvature.collect(
            training_run.apply_fn,
            training_run.params_0(),
            [{"image": np.stack([sample["image"] for sample in source])}],
            probes=None,
            chunk=40,
            **options,
        )
        for source in training_run.sources()
    ]


FOUND = measured(rank=6)


def run(config=CONFIG, **options):
    options = {"curvature": curvature.others(FOUND)} | options
    return training_run.run(config=config, **options)


@pytest.mark.parametrize("linearized", [True, False])
def test_a_step_is_that_of_the_loss_and_the_penalty(linearized):
    config = dataclasses.replace(CONFIG, steps=1, warmup_steps=0, linearized=linearized)
    start = [
        jax.tree.map(
            lambda leaf, s=seed: np.random.default_rng(s).normal(size=leaf.shape),
            training_run.params_0(),
        )
        for seed in (5, 6)
    ]
    options = dict(start=start, optimizer=optax.sgd(1.0))
    found = run(config, **options)
    plain = run(dataclasses.replace(config, penalty=None), curvature=None, **options)
    for task in range(2):
        slope = jax.grad(curvature.penalty)(
            jax.tree.map(jnp.float32, start[task]), FOUND[1 - task]
        )
        moved = jax.tree.map(jnp.subtract, plain[task], found[task])
        want = jax.tree.map(lambda g: 0.3 * g, slope)
        assert_close(moved, want, rtol=1e-4, atol=1e-4)


def test_of_a_linear_model_the_penalty_is_the_strict_squared_tau_jp():
    rng = np.random.default_rng(0)
    sources = [
        [
            {"x": x.astype("f4"), "label": y.astype("f4")}
            for x, y in zip(
                rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), strict=True
            )
        ]
        for _ in range(2)
    ]
    params = {"w": np.zeros((3, 2), "f4")}

    def apply_fn(params, x):
        return x @ params["w"]

    def loss_fn(outputs, batch, _):
        return jnp.mean((outputs - batch["label"]) ** 2)

    config = train.TrainConfig(
        steps=3,
        batch_size=8,
        learning_rate=0.1,
        linearized=True,
        penalty="strict",
        penalty_power=2,
        penalty_batch_size=8,  # all samples of the other task
    )

    def fine_tune(config, **options):
        batches = train.task_batches(sources, config, names=["a", "b"], inputs=["x"])
        return train.fine_tune(
            apply_fn,
            params,
            loss_fn,
            batches,
            config,
            names=["a", "b"],
            inputs=["x"],
            **options,
        )

    found = [
        curvature.collect(
            apply_fn,
            params,
            [{"x": np.stack([sample["x"] for sample in source])}],
            inputs=["x"],
            probes=None,
            full_up_to=6,  # the whole matrix is one block: exact
        )
        for source in sources
    ]
    without_data = fine_tune(
        dataclasses.replace(config, penalty="diagonal"),
        curvature=curvature.others(found),
    )
    for one, other in zip(without_data, fine_tune(config), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_micro_batches_compute_the_penalty_once_and_the_same():
    parts = run(dataclasses.replace(CONFIG, micro_batches=4))
    for one, other in zip(parts, run(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_penalty_of_every_other_step_is_twice_as_strong(tmp_path):
    config = dataclasses.replace(CONFIG, steps=3, penalty_every=2)
    options = dict(optimizer=optax.sgd(0.01), start=[training_run.params_0()] * 2)
    lines = []

    def observe(done, taus, line):
        lines.append((taus, line))

    run(config, observe=observe, observe_every=1, **options)
    assert ["penalty" in line for _, line in lines] == [True, False, True]
    plain = []
    run(
        dataclasses.replace(CONFIG, steps=3, penalty=None),
        curvature=None,
        observe=lambda done, taus, line: plain.append(taus),
        observe_every=1,
        **options,
    )
    slope = jax.grad(curvature.penalty)(
        jax.tree.map(jnp.float32, training_run.params_0()), FOUND[1]
    )
    moved = jax.tree.map(jnp.subtract, plain[0][0], lines[0][0][0])
    want = jax.tree.map(lambda g: 0.01 * 2 * 0.3 * g, slope)
    assert_close(moved, want, rtol=1e-3, atol=1e-5)


def test_one_curvature_for_all_is_that_one_for_each():
    merged = curvature.merge(FOUND)
    for one, other in zip(
        run(curvature=merged), run(curvature=[merged, merged]), strict=True
    ):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.devices
@pytest.mark.parametrize("sizes", ["task=2,data=2", "fsdp=4"])
def test_devices_share_tasks_and_samples(sizes):
    found = run(mesh=sharding.make_mesh(sizes))
    for one, other in zip(found, run(), strict=True):
        assert_close(sharding.to_host(one), other, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_other_curvature_are_refused(tmp_path):
    run(folder=tmp_path)
    others = curvature.others(measured(rank=2))
    with pytest.raises(ValueError, match="curvature"):
        run(folder=tmp_path, curvature=others)


@pytest.mark.parametrize(
    "penalty, given, message",
    [
        ("diagonal", lambda: None, "is not given"),
        (None, lambda: FOUND[0], "no other reads it"),
        ("eigen", lambda: FOUND[0], "of the form 'diagonal'"),
        ("diagonal", lambda: FOUND[:1], "1 curvatures for 2 tasks"),
        (
            "diagonal",
            lambda: dataclasses.replace(FOUND[0], base=1),
            "other|fingerprint",
        ),
        ("diagonal", lambda: {"a": FOUND[0], "b": FOUND[1]}, "in the order of the tas"),
        ("diagonal", lambda: [FOUND[0], (FOUND[1], {})], "1 is a tuple"),
        ("diagonal", lambda: [FOUND[0], measured(rank=2)[1]], "0 and 1 are of other"),
    ],
)
def test_mistakes_are_found_before_training(penalty, given, message):
    config = dataclasses.replace(CONFIG, penalty=penalty)
    with pytest.raises(ValueError, match=message):
        run(config, curvature=given())


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the forms of curvature"):
        train.TrainConfig(penalty="kfac")
    with pytest.raises(ValueError, match="it is for curvature"):
        train.TrainConfig(penalty="cyclic", linearized=True, penalty_every=2)
    with pytest.raises(ValueError, match="needs linearized=True"):
        train.TrainConfig(penalty="cyclic")
