"""Runs that are stopped, in whatever way, end as if they had not been."""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import training_run

from jaxarith import fingerprint, sharding, train, tree
from jaxarith.data import pipeline
from jaxarith.train import interrupts

ROOT = Path(training_run.__file__).parents[1]


def newest(folder):
    """The manifest of the newest checkpoint, with fingerprints of the state."""
    manifests = sorted((folder / "checkpoints").glob("step_*/manifest.json"))
    return json.loads(manifests[-1].read_text())


def losses(folder):
    """What depends on the samples of every step."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["penalty"]) for line in lines]


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Whoever runs the suite: a shell's job in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    taus = training_run.run(folder, save_every=5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(taus)) > 0.1
    return folder, fingerprint.combined(taus)


def assert_same_end(folder, taus_fingerprint, uninterrupted):
    whole, expected = uninterrupted
    assert taus_fingerprint == expected
    assert newest(folder)["fingerprints"] == newest(whole)["fingerprints"]
    assert losses(folder) == losses(whole)


def start(folder, seconds_per_step="0.02"):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training_run", str(folder), seconds_per_step],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """The fingerprint that a run prints when it ends."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return int(re.search(r"ends (\d+)", output)[1])


def steps_done(folder):
    found = sorted((folder / "checkpoints").glob("step_*/manifest.json"))
    return int(found[-1].parent.name[5:]) if found else 0


def test_a_run_killed_at_five_moments_ends_with_the_same_bits(tmp_path, uninterrupted):
    rng, reached = random.Random(0), [0]
    for attempt in range(5):
        process = start(tmp_path)
        assert process.stdout.readline() == "begins\n"
        # At any moment of the start, or in or between a step and a save after it.
        while attempt % 3 and steps_done(tmp_path) == reached[-1]:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached.append(steps_done(tmp_path))
    assert reached == sorted(reached) and 0 < reached[-1] < training_run.CONFIG.steps
    assert_same_end(tmp_path, end(start(tmp_path, "0")), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path, uninterrupted):
    process = start(tmp_path)
    assert process.stdout.readline() == "begins\n"
    while steps_done(tmp_path) < 10:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    found = re.search(rf"{number.name}: saved after step (\d+) of 80", errors)
    assert "Run the same again to go on" in errors and "Traceback" not in errors
    assert steps_done(tmp_path) == int(found[1]) == len(losses(tmp_path))
    assert_same_end(tmp_path, resumed(tmp_path), uninterrupted)


class Stop(Exception):
    """What a run is stopped by where no process has to die."""


def stopped(folder, steps, monkeypatch, **options):
    """Runs until so many steps are done, then fails."""
    check = train.run._check_finite

    def check_and_stop(metrics, norms, number, *names):
        check(metrics, norms, number, *names)
        if number + 1 == steps:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train.run, "_check_finite", check_and_stop)
        with pytest.raises(Stop):
            training_run.run(folder, save_every=5, **options)


def resumed(folder, **options):
    return fingerprint.combined(training_run.run(folder, save_every=5, **options))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped(folder, 58, patch)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    damage, tmp_path, uninterrupted, stopped_run
):
    shutil.copytree(stopped_run, tmp_path, dirs_exist_ok=True)
    newest_folder = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest_folder.name == "step_00000055"
    file = max(newest_folder.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="step_00000055 is damaged.*") as caught:
        found = resumed(tmp_path)
    assert "step_00000050 is used instead" in str(caught[0].message)
    assert_same_end(tmp_path, found, uninterrupted)


@pytest.mark.devices
@pytest.mark.parametrize("mesh", ["data=1", "task=2,fsdp=2"])
def test_a_run_on_eight_devices_goes_on_on_others(mesh, tmp_path, monkeypatch):
    # SGD: AdamW divides by roots of sums of squares, which magnifies rounding.
    monkeypatch.setattr(train.step, "optimizer", lambda config: optax.sgd(0.01))
    monkeypatch.setattr(sharding.mesh, "SMALLEST_SHARDED", 8)
    config = dataclasses.replace(training_run.CONFIG, steps=20, penalty_batch_size=8)
    expected = training_run.run(config=config)
    eight = {"mesh": sharding.make_mesh("data=2,fsdp=4"), "config": config}
    stopped(tmp_path, 12, monkeypatch, **eight)
    assert steps_done(tmp_path) == 10
    taus = training_run.run(
        tmp_path, save_every=5, config=config, mesh=sharding.make_mesh(mesh)
    )
    for tau, other in zip(taus, expected, strict=True):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(other)) > 0.01
        for path, leaf in tree.flatten(other).items():
            np.testing.assert_allclose(
                tree.flatten(tau)[path], leaf, rtol=0, atol=1e-6, err_msg=path
            )


def identified():
    """Sources of which nothing was read but what tells them from others."""
    whole = training_run.sources()
    train.task_batches(whole, training_run.CONFIG, seeds=[0, 1]).identity()
    assert all(0 < len(source.read) <= 3 for source in whole)
    return whole


def test_a_finished_run_is_not_run_again(tmp_path, uninterrupted):
    whole, expected = uninterrupted
    folder, data = tmp_path / "run", training_run.sources()
    shutil.copytree(whole, folder)
    assert resumed(folder, data=data) == expected
    for source, alike in zip(data, identified(), strict=True):
        assert source.read == alike.read
    assert losses(folder) == losses(whole)


def test_a_resumed_run_reads_no_batch_before_its_step(tmp_path, monkeypatch):
    config = dataclasses.replace(training_run.CONFIG, steps=20)
    stopped(tmp_path, 17, monkeypatch, config=config)
    data, whole = training_run.sources(), identified()
    resumed(tmp_path, data=data, config=config)
    batches = train.task_batches(whole, config, seeds=[0, 1])
    for step in range(15, 20):
        batches[step]
    for source, expected in zip(data, whole, strict=True):
        assert sorted(source.read) == sorted(expected.read)


def test_other_options_in_the_folder_are_refused_by_name(tmp_path, monkeypatch):
    stopped(tmp_path, 12, monkeypatch)
    other = dataclasses.replace(training_run.CONFIG, penalty="cyclic", seed=3)
    with pytest.raises(ValueError, match="another configuration") as caught:
        training_run.run(tmp_path, config=other)
    assert "train/penalty: mixed there, cyclic here" in str(caught.value)
    assert "train/seed: 0 there, 3 here" in str(caught.value)
    start = training_run.params_0()
    start["in"]["bias"][0] += 1e-6
    monkeypatch.setattr(training_run, "params_0", lambda: start)
    with pytest.raises(ValueError, match=r"configuration:\n  params_0: \d+ there"):
        training_run.run(tmp_path)
    assert steps_done(tmp_path) == 10 and len(losses(tmp_path)) >= 10


def first_changes(data):
    data[1][0] = data[1][0] | {"label": np.zeros(2, np.float32)}


@pytest.mark.parametrize("change", [first_changes, lambda data: data[0].pop(5)])
def test_other_data_in_the_folder_are_refused(tmp_path, monkeypatch, change):
    stopped(tmp_path, 12, monkeypatch)
    other = training_run.sources()
    change(other)
    with pytest.raises(ValueError, match=r"configuration:\n  data: "):
        training_run.run(tmp_path, data=other)
    batches = train.task_batches(other, training_run.CONFIG, seeds=[0, 1])
    listed = [batches[i] for i in range(3)]  # of one's own making
    changed = [*listed[:2], listed[0]]
    assert pipeline.identity(listed) != pipeline.identity(changed)


def test_checkpoints_without_a_place_are_an_error_before_training(
    tmp_path, monkeypatch
):
    data = training_run.sources()
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="checkpoints can't be written to"):
        training_run.run(tmp_path, data=data)
    (tmp_path / "checkpoints").unlink()
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="has 1e-06 GB free; 3 more checkpoints of"):
        training_run.run(tmp_path, data=data)
    assert all(len(source.read) <= 3 for source in data)  # what tells them apart
    assert not (tmp_path / "log.jsonl").exists()


def test_how_a_step_is_computed_may_change(tmp_path, monkeypatch):
    config = dataclasses.replace(training_run.CONFIG, steps=20)
    stopped(tmp_path, 12, monkeypatch, config=config)
    other = dataclasses.replace(config, tasks_at_once=2, micro_batches=2)
    expected = training_run.run(config=other)
    taus = training_run.run(tmp_path, config=other)
    for tau, other in zip(
        jax.tree.leaves(taus), jax.tree.leaves(expected), strict=True
    ):
        # AdamW divides by roots of sums of squares, which magnifies rounding.
        np.testing.assert_allclose(tau, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_names_step_task_and_leaf(where, tmp_path, monkeypatch):
    loss_fn = training_run.loss_fn

    def breaking(outputs, batch, scale):
        loss = loss_fn(outputs, batch, scale)
        broken = (batch["image"] == 7).any()  # in a sample of task b
        if where == "loss":
            return loss + jax.numpy.where(broken, jax.numpy.inf, 0)
        # The root has an infinite derivative at 0, where it is finite itself.
        return loss + jax.numpy.sqrt(jax.numpy.where(broken, 0 * outputs[0, 0], 1.0))

    data, first = training_run.sources(), 2
    batches = train.task_batches(data, training_run.CONFIG, seeds=[0, 1])
    [image] = [
        r["image"]
        for r in data[1]
        if (r["image"] == batches[first]["image"][1, 0]).all()
    ]
    image[:] = 7  # of a sample that is read first at this step
    monkeypatch.setattr(training_run, "loss_fn", breaking)
    message = {
        "loss": f"the loss of task b is inf.* at step {first}",
        "gradient": "the gradient of task b is not finite in 3 of 3 leaves, the first "
        f"in/bias, at step {first}",
    }[where]
    with pytest.raises(FloatingPointError, match=message):
        training_run.run(tmp_path, data=data, save_every=1)
    assert steps_done(tmp_path) == first == len(losses(tmp_path))


def test_a_signal_that_nobody_was_told_of_acts_at_the_end():
    with pytest.raises(KeyboardInterrupt):
        with interrupts.noted() as came:
            assert came() is None
            signal.raise_signal(signal.SIGINT)
            ended = True
    assert ended


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_every_signal_is_noted(number):
    with interrupts.noted() as came:
        signal.raise_signal(number)
        assert came() == number


def test_a_second_signal_is_not_noted():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.noted() as came:
        assert came() is None
        signal.raise_signal(signal.SIGINT)
        assert came() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_without_checkpoints_ctrl_c_acts_as_ever():
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    data = training_run.sources()
    config = dataclasses.replace(training_run.CONFIG, steps=3, warmup_steps=1)
    batches = list(train.task_batches(data, config, seeds=[0, 1]))
    with pytest.raises(KeyboardInterrupt):
        train.fine_tune(
            lambda params, x: jax.debug.callback(interrupted) or x,
            training_run.params_0(),
            lambda *_: interrupted(),
            batches,
            config,
            names=training_run.NAMES,
        )
