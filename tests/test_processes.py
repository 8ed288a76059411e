"""Two processes with two devices each: the same run as that of one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import training_run
from checks import assert_close

from jaxarith import evaluate, hub, tau_jp, train

pytestmark = pytest.mark.devices
ROOT = Path(training_run.__file__).parents[1]
SAMPLES = len(training_run.NAMES) * (8 + 4)  # of a step: those of the penalty are 4

# What each process runs: it trains with SGD, and measures the trained model.
SCRIPT = """
import json, sys
import jax, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from jaxarith import evaluate, hub, sharding, tau_jp, train
from tests import training_run
folder, mesh, seconds, save_every = sys.argv[1:]
assert sharding.initialize()
assert jax.device_count() == 4 and jax.local_device_count() == 2
sharding.mesh.SMALLEST_SHARDED = 8
train.step.optimizer = lambda config: optax.sgd(0.01)
mesh = sharding.make_mesh(mesh)
data = training_run.sources(float(seconds))
train.task_batches(data, training_run.CONFIG, seeds=[0, 1], mesh=mesh)[3]
read = [list(source.read) for source in data]
for source in data:
    source.read.clear()
print("begins", flush=True)
taus = training_run.run(folder, mesh=mesh, data=data, save_every=int(save_every))
count = sum(len(source.read) for source in data)
for name, tau in zip(training_run.NAMES, sharding.to_host(taus)):
    hub.save_tree(f"{folder}/{name}_{jax.process_index()}.safetensors", tau, {})
image = np.stack([data[0][i]["image"] for i in range(7)])
batches = [{"image": image, "mask": np.ones(7, bool)}]
model = training_run.apply_fn, training_run.params_0(), taus
outputs = [
    evaluate.forward(*model, batches, mesh=mesh)([1.0, 0.5]),
    evaluate.tangent(*model, batches, mesh=mesh)([1.0, 0.5]),
    evaluate.sweep(*model, batches, [[0.0, 0.0], [1.0, 0.5]], mesh=mesh)[1],
    tau_jp.matrix(*model, [batches], mesh=mesh),
]
outputs = [found.tolist() for found in outputs]
print(json.dumps({"read": read, "count": count, "outputs": outputs}))
"""


def start(folder, mesh, seconds="0", save_every="50"):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    folder.mkdir(exist_ok=True)
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), mesh, seconds, save_every],
            cwd=ROOT,
            env={**os.environ, **variables, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def end(processes, status=0):
    try:
        found = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that waits for another, which has failed
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == status, errors
    return found


def check_what_was_read(reports):
    """Each has read its part of every batch: of 8 samples and 4 of the penalty."""
    whole = training_run.sources()
    train.task_batches(whole, training_run.CONFIG, seeds=[0, 1])[3]
    for task, source in enumerate(whole):
        parts = [report["read"][task] for report in reports]
        assert sorted(parts[0] + parts[1]) == sorted(source.read)
    for report in reports:
        assert sum(map(len, report["read"])) == SAMPLES / 2


def reported(found):
    return [json.loads(output.splitlines()[-1]) for output, _ in found]


def test_two_processes_with_a_task_each_are_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train.step, "optimizer", lambda config: optax.sgd(0.01))
    data = training_run.sources()
    expected = training_run.run(data=data)
    reports = reported(end(start(tmp_path / "run", "task=2,data=2")))
    for process in range(2):
        for name, tau in zip(training_run.NAMES, expected, strict=True):
            file = tmp_path / "run" / f"{name}_{process}.safetensors"
            assert_same_vector(hub.load_tree(file)[0], tau)
    check_what_was_read(reports)
    told_apart = 3 * len(data)  # samples that tell these data from others
    trained_on = training_run.CONFIG.steps * SAMPLES / 2
    assert {report["count"] for report in reports} == {trained_on + told_apart}
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == training_run.CONFIG.steps
    # What is measured on four devices of two processes is what one device finds.
    assert reports[0]["outputs"] == reports[1]["outputs"]
    image = np.stack([data[0][i]["image"] for i in range(7)])
    batches = [{"image": image, "mask": np.ones(7, bool)}]
    model = training_run.apply_fn, training_run.params_0(), expected
    ordinary = evaluate.forward(*model, batches)([1.0, 0.5])
    linear = evaluate.tangent(*model, batches)([1.0, 0.5])
    matrix = tau_jp.matrix(*model, [batches])
    assert np.abs(ordinary - linear).max() > 0.01 and matrix.min() > 0.01
    for found, value in zip(
        reports[0]["outputs"], (ordinary, linear, ordinary, matrix), strict=True
    ):
        # Of task vectors that are 1e-6 apart.
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def assert_same_vector(tau, expected):
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01
    assert_close(tau, expected, rtol=0, atol=1e-6)


def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, monkeypatch):
    mesh = "data=2,fsdp=2"  # both have a part of every batch
    monkeypatch.setattr(train.step, "optimizer", lambda config: optax.sgd(0.01))
    processes = start(tmp_path, mesh, seconds="0.02", save_every="5")
    while not list(tmp_path.glob("checkpoints/step_*/manifest.json")):
        time.sleep(0.01)
        assert all(process.poll() is None for process in processes)
    processes[1].send_signal(signal.SIGTERM)
    found = end(processes, 128 + signal.SIGTERM)
    step = int(re.search(r"SIGTERM: saved after step (\d+)", found[0][1])[1])
    assert 5 <= step < training_run.CONFIG.steps
    newest = max(path.name for path in tmp_path.glob("checkpoints/step_*"))
    assert newest == f"step_{step:08d}"
    check_what_was_read(reported(end(start(tmp_path, mesh))))
    expected = training_run.run()
    for name, tau in zip(training_run.NAMES, expected, strict=True):
        assert_same_vector(hub.load_tree(tmp_path / f"{name}_0.safetensors")[0], tau)
