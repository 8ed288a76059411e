r"""Where arrays lie on many devices, and how every process finds its own part.

A mesh has three axes, any of which may be 1:

- `task`: each of its devices trains other tasks;
- `data`: each computes a part of the batch and has all parameters;
- `fsdp`: each computes a part of the batch too, and keeps a part of the parameters, of
  the task vectors and of the optimizer state (fully sharded data parallelism:
  Rajbhandari et al. ZeRO. SC 2020. arXiv:1910.02054; Zhao et al. PyTorch FSDP. VLDB
  2023. arXiv:2304.11277).

The compiler partitions the program (`jax.jit` of sharded arguments); `on_mesh` tells it
to gather parameters where a model reads them and to leave samples where they are.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith.tree import gathered
from jaxarith.typing import ApplyFn, Tree

AXES = ("task", "data", "fsdp")
BATCH = ("data", "fsdp")  # the axes that share the samples of a batch
# Smaller leaves lie whole on every device: a message costs more than they do.
SMALLEST_SHARDED = 2**12


def make_mesh(sizes: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, of all processes.

    Args:
      sizes: sizes of the axes, such as `"data=4,fsdp=2"`. An axis that is left out has
        size 1, but `data` takes all devices that the others leave: by default all
        devices share the batch.
      devices: the devices, of which the first are used; by default all. A run of
        several processes must use them all.

    Raises:
      ValueError: an unknown axis, no number, or too many or too few devices.

    Example:
      >>> print(dict(make_mesh("fsdp=1", jax.devices()[:1]).shape))
      {'task': 1, 'data': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    given = _parse(sizes)
    others = given.get("task", 1) * given.get("fsdp", 1)
    given.setdefault("data", max(len(devices) // others, 1))
    shape = tuple(given.get(axis, 1) for axis in AXES)
    count = int(np.prod(shape))
    together = len({device.process_index for device in devices}) > 1
    if count > len(devices) or (together and count < len(devices)):
        raise ValueError(
            f"the mesh {sizes!r} asks for {count} devices; there are {len(devices)}. "
            "The product of task, data and fsdp must be that, or less in one process."
        )
    types = (AxisType.Auto,) * len(AXES)  # Linen layers need the compiler's choice
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:count])


def _parse(sizes):
    given = {}
    for part in filter(None, sizes.split(",")):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in given or not size.isdecimal() or not int(size):
            raise ValueError(
                f"{part!r} in the mesh {sizes!r} is no axis and its size; write "
                "data=4,fsdp=2, of the axes task, data and fsdp, each once."
            )
        given[axis] = int(size)
    return given


def one_device() -> Mesh:
    """The mesh of the device that JAX uses by default."""
    return make_mesh(devices=list(jnp.zeros(()).devices()))


def mesh_of(tree: Tree) -> Mesh:
    """The mesh that leaves of the tree are on, or `one_device` if there is none."""
    for leaf in jax.tree.leaves(tree):
        placed = leaf.sharding if isinstance(leaf, jax.Array) else None
        if not isinstance(placed, NamedSharding) or not isinstance(placed.mesh, Mesh):
            continue
        if placed.mesh.axis_names == AXES:
            return placed.mesh
    return one_device()


def for_tasks(mesh: Mesh, tasks: int) -> Mesh:
    """The mesh, or one that shares batches where it cannot share so many tasks.

    The axis `task` keeps the largest size that divides both, and `data` takes the rest:
    eight devices for tasks of their own share the batches of multi-task training.

    Args:
      mesh: from `make_mesh`.
      tasks: the number of tasks that train side by side.

    Example:
      >>> mesh = make_mesh("task=1", jax.devices()[:1])
      >>> for_tasks(mesh, 3) is mesh
      True
    """
    own, data, fsdp = mesh.devices.shape
    size = math.gcd(own, tasks)
    if size == own:
        return mesh
    devices = mesh.devices.reshape(size, own * data // size, fsdp)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(shape: Sequence[int], mesh: Mesh | AbstractMesh, *, tasks: bool = False) -> P:
    """The axes that a leaf's dimensions are sharded over.

    Of a leaf with at least `SMALLEST_SHARDED` entries the largest dimension that the
    axis `fsdp` divides is sharded over it, the last of equals.

    Args:
      shape: shape of the leaf.
      mesh: from `make_mesh`.
      tasks: the first dimension is that of the tasks.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((1, 1, 4), AXES)
      >>> spec((768, 3072), mesh) == P(None, "fsdp"), spec((768,), mesh) == P()
      (True, True)
    """
    names: list[str | None] = [None] * len(shape)
    own = shape[1:] if tasks else shape
    if tasks and mesh.shape["task"] > 1:
        names[0] = "task"
    divisible = [
        (size, axis)
        for axis, size in enumerate(own, start=int(tasks))
        if size % mesh.shape["fsdp"] == 0
    ]
    if mesh.shape["fsdp"] > 1 and divisible and np.prod(own) >= SMALLEST_SHARDED:
        names[max(divisible)[1]] = "fsdp"
    while names and names[-1] is None:  # as JAX writes it, which compares as written
        names.pop()
    return P(*names)


def shardings(tree: Tree, mesh: Mesh | AbstractMesh, *, tasks: bool = False) -> Tree:
    """`spec` of every leaf, as `NamedSharding`s."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(np.shape(leaf), mesh, tasks=tasks)), tree
    )


def shard(tree: Tree, mesh: Mesh, *, tasks: bool = False) -> Tree:
    """The tree on the devices of the mesh.

    Args:
      tree: arrays that every process holds in full, or that lie on this mesh.
      mesh, tasks: as for `spec`.
    """
    return put(tree, shardings(tree, mesh, tasks=tasks))


def put(tree: Tree, sharding: Tree) -> Tree:
    """`jax.device_put`, also to devices of other processes.

    Args:
      tree: arrays that every process holds in full, or that lie on these devices.
      sharding: one sharding for all leaves, or a tree with one for each.
    """
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)
    return jax.tree.map(_put, tree, sharding)


def spread(batch: Tree, mesh: Mesh) -> Tree:
    """A batch on the devices of the mesh, each of which gets its samples.

    Args:
      batch: a tree of arrays `[B, ...]` that every process holds in full. B is filled
        up to a multiple of `batch_shards` with copies of the last sample.
      mesh: from `make_mesh`.
    """

    def filled(leaf):
        padding = -len(leaf) % batch_shards(mesh)
        if not padding:
            return leaf
        return np.concatenate([leaf, np.repeat(leaf[-1:], padding, axis=0)])

    return put(jax.tree.map(filled, batch), NamedSharding(mesh, P(BATCH)))


def _put(leaf, sharding):
    if sharding.is_fully_addressable or (
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ):
        return jax.device_put(leaf, sharding)
    # `device_put` would first compare the leaf between all processes.
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)


def local_rows(count: int, mesh: Mesh, axis: str | tuple[str, ...]) -> np.ndarray:
    """Which of `count` rows that are shared by `axis` the devices of a process hold.

    Args:
      count: the number of rows of all processes.
      mesh: from `make_mesh`.
      axis: `"task"` or `BATCH`.

    Raises:
      ValueError: the rows cannot be shared equally.

    Example:
      >>> local_rows(4, one_device(), BATCH)
      array([0, 1, 2, 3])
    """
    axes = (axis,) if isinstance(axis, str) else axis
    parts = int(np.prod([mesh.shape[name] for name in axes]))
    if count % parts:
        raise ValueError(
            f"{count} {'tasks' if axis == 'task' else 'samples'} cannot be shared by "
            f"{parts} devices ({' × '.join(axes)}); give a multiple of {parts}, or "
            "another mesh."
        )
    held = NamedSharding(mesh, P(axis)).addressable_devices_indices_map((count,))
    starts = sorted({index[0].indices(count)[:2] for index in held.values() if index})
    return np.concatenate([np.arange(start, stop) for start, stop in starts])


def from_local_rows(batch: Tree, mesh: Mesh) -> Tree:
    """The batch of all processes from what each has made.

    Args:
      batch: a tree of arrays `[T, B, ...]`: of T tasks and B samples the `local_rows`.
      mesh: from `make_mesh`.

    Raises:
      ValueError: tasks or samples cannot be shared equally by the devices.
    """
    sharding = NamedSharding(mesh, P("task", BATCH))
    if sharding.is_fully_addressable:
        for leaf in jax.tree.leaves(batch):
            local_rows(leaf.shape[0], mesh, "task")
            local_rows(leaf.shape[1], mesh, BATCH)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch
    )


def on_mesh(apply_fn: ApplyFn, mesh: Mesh) -> ApplyFn:
    """The model with its samples left where they are, and parameters brought to them.

    Without it the compiler may prefer to move the samples to the parameters, which are
    many times smaller than the activations of a large batch. A leaf that is sharded
    over `fsdp` is gathered where it is read. What is differentiated in its parameters
    takes `of_samples` and `whole` instead.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`; inputs and outputs are trees of
        arrays `[B, ...]`, B a multiple of `batch_shards`.
      mesh: from `make_mesh`.
    """
    pinned = of_samples(apply_fn, mesh)
    if pinned is apply_fn:
        return apply_fn
    return lambda params, *inputs: pinned(whole(params, mesh), *inputs)


def of_samples(apply_fn: ApplyFn, mesh: Mesh) -> ApplyFn:
    """The model with its samples left where they are, of parameters that are `whole`.

    Args:
      apply_fn, mesh: as for `on_mesh`.
    """
    if batch_shards(mesh) == 1:
        return apply_fn

    def pinned(params, *inputs):
        outputs = apply_fn(params, *constrain(inputs, mesh, P(BATCH)))
        return constrain(outputs, mesh, P(BATCH))

    return pinned


def whole(tree: Tree, mesh: Mesh) -> Tree:
    """The tree with every leaf gathered on every device, inside a `jit`.

    Parameters are gathered before a loss of theirs is differentiated, not within it.
    The gradient of a gathering is a gathered gradient: within it, every device would
    sum all of it with all others. Before it, the devices of `fsdp` sum and keep parts,
    and only those are summed over `data`.
    """
    return tree if batch_shards(mesh) == 1 else constrain(tree, mesh, P())


def constrain(tree: Tree, mesh: Mesh, spec: P) -> Tree:
    """Tells the compiler where all leaves lie, inside a `jit`."""
    sharding = NamedSharding(_context(mesh), spec)
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree
    )


def pin(tree: Tree, mesh: Mesh, *, tasks: bool = False) -> Tree:
    """Tells the compiler that leaves lie as `shard` puts them, inside a `jit`."""
    places = shardings(tree, _context(mesh), tasks=tasks)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)


def _context(mesh):
    # Inside a `shard_map` over tasks the mesh is another: without that axis.
    context = jax.sharding.get_abstract_mesh()
    return context if context.axis_names == mesh.axis_names else mesh


def to_host(tree: Tree) -> Tree:
    """The tree as NumPy arrays, in every process; all must ask for it."""
    return jax.tree.map(np.asarray, gathered(tree))


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    pod: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Joins the processes of one run, before anything else asks JAX for a device.

    What is not given comes from the environment: from `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or, where a launcher started several
    processes (SLURM's `srun`, Open MPI's `mpirun`), from what JAX finds. A process that
    is alone stays alone.

    Args:
      coordinator: address and port of the first process, such as `10.0.0.1:1234`.
      processes: how many there are.
      process: the number of this one, from 0.
      pod: this is a host of a TPU pod, which JAX finds by asking the cloud.
      environment: the variables to look at.

    Returns:
      Whether there are others.

    Raises:
      ValueError: a part of coordinator, processes and process is given.
    """
    given = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": processes,
        "JAX_PROCESS_ID": process,
    }
    found = {
        name: environment.get(name) if value is None else value
        for name, value in given.items()
    }
    address, count, number = found.values()
    if address is not None and count is not None and number is not None:
        jax.distributed.initialize(str(address), int(count), int(number))
        return int(count) > 1
    missing = [name for name, value in found.items() if value is None]
    if len(missing) < len(found):
        raise ValueError(
            f"{', '.join(missing)} is not set. A run of several processes needs the "
            "coordinator's address, the number of processes and that of this one; "
            "under SLURM and Open MPI none of them, on a TPU pod `pod` alone."
        )
    if not pod and not _launched_together(environment):
        return False
    jax.distributed.initialize()
    return jax.process_count() > 1


def _launched_together(environment):
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(environment.get(name, 1)) > 1 for name in counts)
