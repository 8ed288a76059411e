"""Checkpoints across processes: killed ones, and two that work together."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from checkpoint_states import (
    CONFIG,
    Checkpoints,
    assert_restores,
    bits,
    folders,
    large_state,
)

from jaxarith.train import manifest

REPOSITORY = Path(__file__).parents[1]

SAVING = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
from checkpoint_states import CONFIG, Checkpoints, large_state
with Checkpoints({folder!r}, CONFIG) as checkpoints:
    restored = checkpoints.restore(large_state(0))
    for step in range(restored.step + 1 if restored else 1, 10_000):
        checkpoints.save(step, large_state(step))
"""


def python(script, **fields):
    script = script.format(
        repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"), **fields
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate()[0])


def test_killed_at_any_moment_a_complete_state_is_left(tmp_path):
    rng = np.random.default_rng(0)
    last, unfinished = 0, 0
    for delay in (0.0, 0.0, rng.uniform(0, 0.1)):
        process = python(SAVING, folder=str(tmp_path))
        next_folder = tmp_path / f"step_{last + 3:08d}"
        wait_for(next_folder.exists, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        unfinished += any(
            not (folder / manifest.NAME).exists() for folder in tmp_path.iterdir()
        )
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            restored = checkpoints.restore(large_state(0))
        assert restored.step >= last + 2
        assert bits(restored.state) == bits(large_state(restored.step))
        last = restored.step
    assert unfinished > 0


TWO_PROCESSES = """
import sys, warnings
from pathlib import Path
sys.path[:0] = [{repository!r}, {tests!r}]
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, {index})
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.experimental import multihost_utils
from jaxarith import fingerprint
from jaxarith.train import manifest
from checkpoint_states import CONFIG, Checkpoints, make_state, sharding, abstract
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
shardings = sharding(make_state(0), mesh)

def state(step):
    return jax.jit(lambda: host[step], out_shardings=shardings)()

host = {{step: make_state(step) for step in (0, 1, 2, 3)}}
like = abstract(host[0], shardings)
with Checkpoints({folder!r}, CONFIG) as checkpoints:
    assert checkpoints.restore(like) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    restored = checkpoints.restore(like)
assert restored.step == 3
assert fingerprint.of(restored.state) == fingerprint.of(host[3])
kernel = restored.state["taus"]["kernel"]
assert len(kernel.addressable_shards) == 2, kernel.sharding
assert kernel.addressable_shards[0].data.shape == (4, 24)
multihost_utils.sync_global_devices("restored")
if {index} == 0:
    Path({folder!r}, "step_00000003", manifest.NAME).write_text("damaged")
with Checkpoints({folder!r}, CONFIG) as checkpoints:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = checkpoints.restore(like)
    assert restored.step == 2 and "00000003 is damaged" in str(caught[-1].message)
    assert fingerprint.of(restored.state) == fingerprint.of(host[2])
    checkpoints.save(3, state(3))
try:
    Checkpoints({folder!r}, {{}})
except ValueError as error:
    print("refused:", "train/steps" in str(error))
print("done", {index})
"""


def test_two_processes_save_and_restore_one_state(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [
        python(TWO_PROCESSES, folder=str(tmp_path), port=port, index=index)
        for index in range(2)
    ]
    try:
        texts = [process.communicate(timeout=60)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for index, text in enumerate(texts):
        assert both[index].returncode == 0 and f"done {index}" in text, text
        assert "refused: True" in text
    assert folders(tmp_path) == ["step_00000002", "step_00000003"]
    assert len(list(tmp_path.glob("step_00000003/state/**/ocdbt.process_*"))) == 2
    assert_restores(tmp_path, 3)
