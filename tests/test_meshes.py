"""Meshes and their sizes, and processes that are launched together."""

import jax
import pytest

from jaxarith import sharding

pytestmark = pytest.mark.devices


def test_meshes_are_what_they_are_asked_to_be():
    assert dict(sharding.make_mesh().shape) == {"task": 1, "data": 8, "fsdp": 1}
    mesh = sharding.make_mesh("task=2, fsdp=2")
    assert dict(mesh.shape) == {"task": 2, "data": 2, "fsdp": 2}
    assert sharding.make_mesh("data=3").size == 3
    assert sharding.one_device().size == 1
    assert len({axis for axis in mesh.axis_types}) == 1


@pytest.mark.parametrize("sizes", ["model=2", "data", "data=0", "data=2,data=4", "-1"])
def test_a_wrong_axis_is_refused(sizes):
    with pytest.raises(ValueError, match="is not an axis with its size"):
        sharding.make_mesh(sizes)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match="asks for 16 devices; there are 8"):
        sharding.make_mesh("data=16")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # allocated, but not by srun
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone_stays_alone(environment):
    assert not sharding.initialize(environment=environment)


def test_processes_that_are_launched_together_ask_jax_who_they_are(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: called.append(a))
    for environment in ({"SLURM_STEP_NUM_TASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}):
        sharding.initialize(environment=environment)
    sharding.initialize(environment={}, pod=True)
    assert called == [()] * 3
    by_hand = {
        "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    assert sharding.initialize(environment=by_hand)
    assert sharding.initialize("10.0.0.2:5", 3, environment={"JAX_PROCESS_ID": "0"})
    assert called[3:] == [("10.0.0.1:1234", 2, 1), ("10.0.0.2:5", 3, 0)]


def test_a_coordinator_without_the_rest_is_refused():
    with pytest.raises(
        ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID is not set"
    ):
        sharding.initialize("10.0.0.1:1234", environment={})
