"""Scripts on eight devices, with the batches of the papers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import clip_checkpoint
import numpy as np
import pytest

from experiments import finetune
from experiments.common import bank
from experiments.tau_jp import table3_glue
from jaxarith import hub

pytestmark = pytest.mark.devices


def test_glue_shares_16_samples_and_4_of_the_penalty(tmp_path):
    pytest.importorskip("transformers")
    config = table3_glue.Config(
        smoke=True, mesh="data=8", out=tmp_path / "out", bank=tmp_path / "bank"
    )
    assert (config.batch_size, config.penalty_batch_size) == (16, 4)
    table3_glue.main(config)
    assert json.loads((tmp_path / "out" / "report.json").read_text())


JOINT = {"source": "small", "tasks": ("mnist", "uci_digits"), "steps": 2}
JOINT |= {"samples": 150, "workers": 0, "learning_rate": 1e-3, "save_every": 0}
JOINT |= {"task": "mnist", "method": "multi_task"}


def joint_kernel(folder, model):
    file = bank.vector_file(folder, model, "multi_task", "joint")
    return hub.load_tree(file)[0]["visual_projection"]["kernel"]


def test_multi_task_training_is_the_same_wherever_it_runs(tmp_path, capfd):
    """It has one vector, whatever the axis `task`: its devices share the batches."""
    model = str(tmp_path / "tiny_clip")
    clip_checkpoint.shallow(model)
    options = JOINT | {"model": model}
    for mesh in ("data=1", "task=8"):
        folder = tmp_path / mesh
        config = finetune.Config(**options, mesh=mesh, out=folder / "out", bank=folder)
        assert config.batch_size == 128
        finetune.main(config)
    assert "a mesh of task=1,data=8,fsdp=1" in capfd.readouterr().err
    expected = joint_kernel(tmp_path / "data=1", model)
    np.testing.assert_allclose(
        joint_kernel(tmp_path / "task=8", model), expected, atol=2e-5
    )
    assert np.abs(expected).max() > 1e-3

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    variables = {"XLA_FLAGS": flags}
    variables |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    flags = [
        word
        for name, value in options.items()
        for word in (
            f"--{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else (value,)),
        )
    ]
    flags += ["--mesh", "task=4", "--out", str(tmp_path / "two" / "out")]
    flags += ["--bank", str(tmp_path / "two")]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.finetune", *flags],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **variables, "JAX_PROCESS_ID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors[0][-2000:]
    np.testing.assert_allclose(
        joint_kernel(tmp_path / "two", model), expected, atol=2e-5
    )
