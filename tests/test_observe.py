"""Other optimizers than AdamW, and what may be observed while a run trains."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_run
from checks import assert_close

from jaxarith import train, tree

CONFIG = train.TrainConfig(
    steps=8, warmup_steps=2, batch_size=4, learning_rate=0.05, decay="constant"
)
NAMES = training_run.NAMES


def run(folder=None, *, config=CONFIG, **options):
    return training_run.run(folder, config=config, **options)


# The optimizer is the caller's.


def test_sgd_makes_the_steps_of_plain_gradients():
    rate = 1e-3
    found = run(optimizer=optax.sgd(rate))
    batches = train.task_batches(training_run.sources(), CONFIG, seeds=range(2))
    scales = np.array([1.0, 2.0], np.float32)
    for task in range(2):
        params = training_run.params_0()

        def loss(params, batch, task=task):
            outputs = training_run.apply_fn(params, batch["image"])
            return training_run.loss_fn(outputs, batch, scales[task])

        for batch in batches:
            own = jax.tree.map(lambda leaf, task=task: leaf[task], batch)
            grads = jax.grad(loss)(params, own)
            assert float(optax.tree.norm(grads)) > 0.1
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        moved = jax.tree.map(jnp.subtract, params, training_run.params_0())
        assert_close(found[task], moved, rtol=1e-4, atol=1e-5)


def test_the_recipes_optimizer_given_is_the_recipes_own():
    for given, own in zip(run(optimizer=train.optimizer(CONFIG)), run(), strict=True):
        assert_close(given, own, rtol=0, atol=0)


def kinds(params):
    return tree.map_with_path(lambda path, _: path.split("/")[-1], params)


OPTIMIZERS = {
    "sgd with momentum": optax.sgd(train.schedule(CONFIG), momentum=0.9),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4),
    "two rates": optax.multi_transform(
        {"kernel": optax.adam(0.01), "bias": optax.set_to_zero()}, kinds
    ),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.01)),
    "schedule-free": optax.contrib.schedule_free_adamw(0.01, warmup_steps=2),
    "accumulated": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, name):
    options = {"optimizer": OPTIMIZERS[name], "save_every": 3}
    whole = run(tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    def stop(done, taus, metrics):
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "two", observe=stop, observe_every={5}, **options)
    resumed = run(tmp_path / "two", **options)
    for a, b in zip(resumed, whole, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert float(optax.tree.norm(whole[0])) > 0


def test_labels_of_leaves_choose_their_transformation():
    for tau in run(optimizer=OPTIMIZERS["two rates"]):
        assert not np.any(tau["in"]["bias"])
        assert np.all(np.abs(np.asarray(tau["in"]["kernel"])).max(axis=1) > 0)


def test_the_state_starts_at_the_parameters():
    # Schedule-free training keeps a second copy of the parameters in its state.
    optimizer = optax.contrib.schedule_free_sgd(0.1)
    start = training_run.params_0()
    _, state = train.init_state(start, CONFIG, 2, optimizer=optimizer)
    z = jax.tree.map(lambda leaf: leaf[1], optax.tree.get(state, "z"))
    assert_close(z, start, rtol=0, atol=0)


def test_checkpoints_of_another_optimizer_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="optimizer: absent there, given here"):
        run(tmp_path, optimizer=optax.sgd(0.1))


def test_something_that_is_no_transformation_is_refused():
    with pytest.raises(ValueError, match=r"Write optax.sgd\(1e-2\)"):
        run(optimizer=optax.sgd)


# Metrics are observed.


def test_observe_receives_the_line_of_the_log(tmp_path):
    seen = {}
    config = train.TrainConfig(
        steps=6, batch_size=8, linearized=True, penalty="mixed", penalty_batch_size=4
    )
    run(
        tmp_path,
        config=config,
        observe=lambda done, taus, metrics: seen.update({done: metrics}),
        observe_every=3,
    )
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert list(seen) == [3, 6]
    for done, metrics in seen.items():
        assert metrics == json.loads(lines[done - 1])
        assert metrics["step"] == done - 1
        assert metrics["learning_rate"] > 0 and metrics["samples_per_second"] > 0
        for name in ("loss", "penalty", "gradient_norm"):
            assert list(metrics[name]) == NAMES


def test_the_rate_of_an_optimizer_that_is_given_is_not_known():
    seen = []
    run(optimizer=optax.sgd(0.1), observe=lambda *found: seen.append(found[2]))
    run(
        optimizer=optax.sgd(0.1),
        observe=lambda *found: seen.append(found[2]),
        observe_every=8,
    )
    assert len(seen) == 1 and "learning_rate" not in seen[0]


# Observing may end the run.


@pytest.mark.parametrize("answer", [True, np.True_, jnp.array(True)], ids=repr)
def test_true_ends_the_run_with_the_vectors_of_that_step(answer):
    seen = []

    def observe(done, taus, metrics):
        seen.append(done)
        return answer if done == 4 else None

    found = run(observe=observe, observe_every=2)
    assert seen == [2, 4]
    expected = run(config=train.TrainConfig(**{**vars(CONFIG), "steps": 4}))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "answer", [False, None, {"loss": 1}, 1, np.ones(3), jnp.array(0.5)], ids=repr
)
def test_nothing_else_does(answer):
    seen = []
    run(observe=lambda done, *_: seen.append(done) or answer, observe_every=4)
    assert seen == [4, 8]


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_run_that_ended_returns_its_vectors_again(tmp_path, save_every, capsys):
    options = {"save_every": save_every, "observe_every": 2}
    found = run(tmp_path, observe=lambda done, *_: done == 4, **options)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert "after step 4 of 8" in capsys.readouterr().err
    data = training_run.sources()
    again = run(tmp_path, observe=pytest.fail, data=data, **options)
    assert "after step 4 of 8" in capsys.readouterr().err
    for a, b in zip(again, found, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert all(len(source.read) <= 3 for source in data)  # what tells them apart
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


# TensorBoard is one more observer.


def test_metrics_go_to_tensorboard_by_task(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is missing")
    from tensorboardX.proto import event_pb2

    run(tmp_path, observe=train.tensorboard(tmp_path / "events"), observe_every=4)
    [file] = (tmp_path / "events").iterdir()
    assert "tensorflow" not in sys.modules
    content, values = file.read_bytes(), {}
    while content:  # length, checksum, event, checksum
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
        content = content[16 + size :]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    for done in (4, 8):
        line = json.loads(lines[done - 1])
        for task in NAMES:
            found = values[f"loss/{task}", done]
            np.testing.assert_allclose(found, line["loss"][task], rtol=1e-6)
        assert values["learning_rate", done] > 0
    assert ("step", 4) not in values


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"Install jaxarith\[tensorboard\]"):
        train.tensorboard(tmp_path)
