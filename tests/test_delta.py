"""A linearised teacher and an ordinary student, trained in one step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_networks
import training_run
from checks import assert_close, assert_same

from experiments.common import bank
from jaxarith import curvature, sharding, train, tree

CONFIG = train.TrainConfig(
    steps=4, batch_size=8, learning_rate=0.02, distill=train.Distill(coef=0.3)
)


def run(config=CONFIG, **options):
    return training_run.run(config=config, **options)


@pytest.fixture(scope="module")
def whole():
    """The task vectors of a run that nothing disturbed."""
    return run()


def squared(outputs, batch, _=None):
    return jnp.mean((outputs - batch["label"]) ** 2)


def test_the_objective_and_its_gradient_are_the_papers(x64):
    apply_fn, params_0, x = tiny_networks.network()
    taus = {
        "student": tiny_networks.vector(params_0, 1),
        "teacher": tiny_networks.vector(params_0, 2),
    }
    label = np.random.default_rng(3).normal(size=(len(x), 3))
    batch = {"image": x, "label": label, "alpha": np.full(len(x), 0.7)}
    objective = train.objective(apply_fn, squared, CONFIG)

    def moved(tau):
        return jax.jvp(lambda p: apply_fn(p, x), (params_0,), (tau,))

    def add(coef, tau):
        return jax.tree.map(lambda p, t: p + coef * t, params_0, tau)

    f0, along = moved(taus["teacher"])
    target = np.asarray(f0 + 0.7 * along)  # a constant

    def student(tau):
        distance = jnp.sum((apply_fn(add(0.7, tau), x) - target) ** 2) / len(x)
        return squared(apply_fn(add(1, tau), x), batch) + 0.3 * distance, distance

    def teacher(tau):
        return squared(sum(moved(tau)), batch)

    def gradient(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))

    (want, distance), slope = gradient(student)(taus["student"])
    (value, metrics), slopes = gradient(objective)(taus, params_0, batch, None)
    assert_close(value, want + teacher(taus["teacher"]), 1e-12)
    assert_close(slopes["student"], slope, 1e-11)
    assert_close(slopes["teacher"], jax.grad(teacher)(taus["teacher"]), 1e-11)
    assert distance > 1 and metrics.keys() == {"loss", "teacher_loss", "distillation"}
    assert_close(metrics["distillation"], distance, 1e-12)
    assert_close(metrics["loss"], want - 0.3 * distance, 1e-11)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_the_teacher_and_a_student_without_distillation_are_trained_as_if_alone(
    clip_norm,
):
    shared = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    pairs = run(dataclasses.replace(shared, distill=train.Distill(coef=0)))
    for model, linearized in (("student", False), ("teacher", True)):
        config = dataclasses.replace(shared, distill=None, linearized=linearized)
        found = [pair[model] for pair in pairs]
        assert_close(found, run(config), rtol=1e-4, atol=1e-6)


def test_of_a_linear_model_student_and_teacher_are_one():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
    samples = {"x": x.astype("f4"), "label": label.astype("f4")}
    [pair] = train.fine_tune(
        lambda params, x: x @ params["w"],
        {"w": np.zeros((3, 2), "f4")},
        squared,
        train.task_batches([samples], CONFIG, names=["a"]),
        CONFIG,
        names=["a"],
        inputs=["x"],
    )
    assert np.abs(pair["student"]["w"]).max() > 0.04
    assert_close(pair["student"], pair["teacher"], 1e-6)


@pytest.mark.parametrize("own", [True, False])
def test_both_are_penalised_by_curvature(own):
    found = [
        curvature.collect(
            training_run.apply_fn,
            training_run.params_0(),
            [{"image": np.stack([sample["image"] for sample in source])}],
            probes=None,
        )
        for source in training_run.sources()
    ]
    given = curvature.others(found) if own else curvature.merge(found)
    start = [dict.fromkeys(("student", "teacher"), training_run.params_0())] * 2
    config = dataclasses.replace(
        CONFIG, steps=1, clip_norm=None, penalty="diagonal", penalty_coef=0.3
    )
    lines = []
    options = dict(start=start, optimizer=optax.sgd(0.01))
    with_it = run(
        config,
        curvature=given,
        observe=lambda _, taus, line: lines.append(line),
        observe_every=1,
        **options,
    )
    plain = run(dataclasses.replace(config, penalty=None), **options)
    for task, name in enumerate(training_run.NAMES):
        other = given[task] if own else given
        tau = jax.tree.map(jnp.float32, start[task]["student"])
        value, slope = jax.value_and_grad(curvature.penalty)(tau, other)
        want = jax.tree.map(lambda g: 0.01 * 0.3 * g, slope)
        moved = jax.tree.map(jnp.subtract, plain[task], with_it[task])
        assert_close(moved["student"], want, rtol=1e-3, atol=1e-5)
        assert_close(moved["teacher"], want, rtol=1e-3, atol=1e-5)
        assert_close(lines[0]["penalty"][name], 2 * value, 1e-5)


def test_a_run_that_is_resumed_ends_with_the_same_bits(whole, tmp_path):
    def stop(done, taus, line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, save_every=1, observe=stop, observe_every=[3])
    done = []
    again = run(folder=tmp_path, observe=lambda n, *_: done.append(n), observe_every=1)
    assert done == [3, 4]  # it went on after step 2
    assert_same(again, whole)


def test_a_recipe_without_distillation_has_the_identity_that_it_had(tmp_path):
    plain = dataclasses.replace(CONFIG, distill=None, steps=1)
    run(plain, folder=tmp_path)
    [manifest] = (tmp_path / "checkpoints").glob("*/manifest.json")
    assert "distill" not in json.loads(manifest.read_text())["config"]["train"]
    assert "distill" not in bank.plain_recipe(plain)
    assert bank.plain_recipe(CONFIG)["distill"] == {
        "coef": 0.3,
        "low": 0.5,
        "high": 1.0,
    }


def test_micro_batches_make_the_same_step(whole):
    parts = run(dataclasses.replace(CONFIG, micro_batches=4))
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_tasks_trained_together_equal_tasks_trained_alone(whole):
    for task, source in enumerate(training_run.sources()):
        [alone] = train.fine_tune(
            training_run.apply_fn,
            training_run.params_0(),
            training_run.loss_fn,
            train.task_batches([source], CONFIG, seeds=[task]),
            CONFIG,
            names=["alone"],
            constants=np.array([task + 1], np.float32),
        )
        assert_close(alone, whole[task], rtol=1e-5, atol=1e-7)


@pytest.mark.devices
@pytest.mark.parametrize("sizes", ["task=2,data=2,fsdp=2", "fsdp=8"])
def test_devices_share_tasks_and_samples(sizes, whole):
    found = run(mesh=sharding.make_mesh(sizes))
    assert_close(sharding.to_host(found), whole, rtol=1e-4, atol=1e-5)


def test_alpha_is_drawn_once_a_step_and_task_within_its_range():
    config = dataclasses.replace(
        CONFIG, steps=30, distill=train.Distill(low=0.2, high=0.6)
    )
    batches = train.task_batches(training_run.sources(), config, seeds=[0, 1])
    alphas = np.stack([batch["alpha"] for batch in batches])
    assert alphas.shape == (30, 2, 8) and alphas.dtype == np.float32
    assert (alphas == alphas[..., :1]).all()
    assert 0.2 <= alphas.min() < 0.25 and 0.55 < alphas.max() <= 0.6
    assert_close(alphas.mean(), 0.4, 0.05)
    assert (alphas[:, 0] != alphas[:, 1]).all()
    again = train.task_batches(training_run.sources(), config, seeds=[0, 1])
    assert (again[7]["alpha"] == alphas[7]).all()
    joint = train.joint_batches(training_run.sources(), config)
    assert joint[3]["alpha"].shape == (1, 16)


def test_only_the_selected_leaves_of_both_are_trained():
    [pair, _] = run(dataclasses.replace(CONFIG, trained="in/.*"))
    paths = ["in/bias", "in/kernel"]
    assert list(tree.flatten(pair)) == [
        f"{model}/{path}" for model in ("student", "teacher") for path in paths
    ]


@pytest.mark.parametrize(
    "options",
    [{"linearized": True}, {"penalty": "cyclic"}],
)
def test_what_does_not_go_with_distillation_is_refused(options):
    with pytest.raises(ValueError, match="an ordinary and a linearised model together"):
        train.TrainConfig(distill=train.Distill(), **options)


def test_a_range_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected 0 <= low <= high"):
        train.Distill(low=1.0, high=0.5)


@pytest.mark.parametrize("coef", [-1.0, float("nan")])
def test_weights_below_zero_are_refused(coef):
    with pytest.raises(ValueError, match="at least 0 is needed"):
        train.Distill(coef=coef)
    with pytest.raises(ValueError, match="penalty_coef is"):
        train.TrainConfig(penalty_coef=coef)


def test_true_is_no_distillation():
    with pytest.raises(ValueError, match=r"expected train.Distill\(\)"):
        train.TrainConfig(distill=True)  # pyright: ignore[reportArgumentType]


def test_batches_without_alpha_are_refused():
    plain = dataclasses.replace(CONFIG, distill=None)
    batches = train.task_batches(training_run.sources(), plain)
    with pytest.raises(ValueError, match="distillation needs `alpha`"):
        train.fine_tune(
            training_run.apply_fn,
            training_run.params_0(),
            training_run.loss_fn,
            batches,
            CONFIG,
            names=training_run.NAMES,
            constants=np.array([1.0, 2.0], np.float32),
        )
