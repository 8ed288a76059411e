r"""Places arrays on many devices, and finds the part of every process.

A mesh has three axes; each may have size 1:

- `task`: each device trains different tasks;
- `data`: each device computes a part of the batch and has all parameters;
- `fsdp`: each device computes a part of the batch too, and keeps a part of the
  parameters, of the task vectors and of the optimizer state (fully sharded data
  parallelism:
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

from jaxarith.tree import counted, gathered
from jaxarith.typing import ApplyFn, Tree

AXES = ("task", "data", "fsdp")
BATCH = ("data", "fsdp")  # the axes that share the samples of a batch
# Smaller leaves are whole on every device: a message would cost more than they do.
SMALLEST_SHARDED = 2**12


def make_mesh(sizes: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of all devices of all processes.

    Args:
      sizes: sizes of the axes, for example `"data=4,fsdp=2"`. A missing axis has size
        1, except `data`, which takes all remaining devices. So by default all devices
        share the batch.
      devices: the devices; the first ones are used. By default all devices. A run of
        several processes must use them all.

    Raises:
      ValueError: an axis is unknown, a size is not a number, or there are too many or
        too few devices.

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
            f"the mesh {sizes!r} asks for {counted(count, 'device')}; there are "
            f"{len(devices)}. The product of task, data and fsdp must be that number, "
            "or less in one process."
        )
    types = (AxisType.Auto,) * len(AXES)  # Linen layers need the compiler's choice
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:count])


def _parse(sizes):
    given = {}
    for part in filter(None, sizes.split(",")):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in given or not size.isdecimal() or not int(size):
            raise ValueError(
                f"{part!r} in the mesh {sizes!r} is not an axis with its size. Write "
                "for example data=4,fsdp=2, with each of task, data and fsdp at most "
                "once."
            )
        given[axis] = int(size)
    return given


def one_device() -> Mesh:
    """Returns the mesh of the one device that JAX uses by default."""
    return make_mesh(devices=list(jnp.zeros(()).devices()))


def mesh_of(tree: Tree) -> Mesh:
    """Returns the mesh that leaves of the tree are on, or `one_device` without one.

    Args:
      tree: a tree of arrays.
    """
    for leaf in jax.tree.leaves(tree):
        placed = leaf.sharding if isinstance(leaf, jax.Array) else None
        if not isinstance(placed, NamedSharding) or not isinstance(placed.mesh, Mesh):
            continue
        if placed.mesh.axis_names == AXES:
            return placed.mesh
    return one_device()


def for_tasks(mesh: Mesh, tasks: int) -> Mesh:
    """Returns a mesh whose axis `task` divides the number of tasks.

    The axis `task` keeps the largest size that divides both, and `data` gets the rest.
    For example, eight devices on `task` share the batches of multi-task training.

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
    """Returns the number of parts that a batch is cut into.

    Args:
      mesh: the result of `make_mesh`.
    """
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(shape: Sequence[int], mesh: Mesh | AbstractMesh, *, tasks: bool = False) -> P:
    """Returns the axes over which a leaf's dimensions are sharded.

    A leaf with at least `SMALLEST_SHARDED` entries is sharded over the axis `fsdp` in
    the largest dimension that this axis divides, or in the last of several such.

    Args:
      shape: shape of the leaf.
      mesh: the result of `make_mesh`.
      tasks: whether the first dimension is that of the tasks.

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
    while names and names[-1] is None:  # JAX writes none, and compares specs as written
        names.pop()
    return P(*names)


def shardings(tree: Tree, mesh: Mesh | AbstractMesh, *, tasks: bool = False) -> Tree:
    """Returns the `spec` of every leaf as a tree of `NamedSharding`s.

    Args:
      tree: a tree of anything with `shape`.
      mesh, tasks: as for `spec`.
    """
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(np.shape(leaf), mesh, tasks=tasks)), tree
    )


def shard(tree: Tree, mesh: Mesh, *, tasks: bool = False) -> Tree:
    """Puts a tree on the devices of the mesh, sharded by `spec`.

    Args:
      tree: arrays that every process holds in full, or that are on this mesh.
      mesh, tasks: as for `spec`.
    """
    return put(tree, shardings(tree, mesh, tasks=tasks))


def put(tree: Tree, sharding: Tree) -> Tree:
    """Puts a tree on devices as `jax.device_put`, also on devices of other processes.

    Args:
      tree: arrays that every process holds in full, or that are on these devices.
      sharding: one sharding for all leaves, or a tree with one for each.
    """
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)
    return jax.tree.map(_put, tree, sharding)


def spread(batch: Tree, mesh: Mesh) -> Tree:
    """Spreads a batch over the devices of the mesh; each gets its own samples.

    Args:
      batch: a tree of arrays `[B, ...]` that every process holds in full. B is filled
        up to a multiple of `batch_shards` with copies of the last sample.
      mesh: the result of `make_mesh`.
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
    """Returns the indices of the rows that this process's devices hold.

    Args:
      count: the number of rows, which all processes share along `axis`.
      mesh: the result of `make_mesh`.
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
            f"{counted(count, 'task' if axis == 'task' else 'sample')} cannot be "
            f"shared by {parts} devices ({' × '.join(axes)}). Give a multiple "
            f"of {parts}, or another mesh."
        )
    held = NamedSharding(mesh, P(axis)).addressable_devices_indices_map((count,))
    starts = sorted({index[0].indices(count)[:2] for index in held.values() if index})
    return np.concatenate([np.arange(start, stop) for start, stop in starts])


def from_local_rows(batch: Tree, mesh: Mesh) -> Tree:
    """Returns the batch of all processes, made from the part of each process.

    Args:
      batch: a tree of arrays `[T, B, ...]` with this process's `local_rows` of the
        tasks and of the samples.
      mesh: the result of `make_mesh`.

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
    """Returns a model that moves parameters to the samples, and never the samples.

    Without this, the compiler may move the samples to the parameters, although
    parameters are many times smaller than the activations of a large batch. A leaf that
    is sharded over `fsdp` is gathered where it is read. To differentiate in the
    parameters, use `of_samples` and `whole` instead.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`; inputs and outputs are trees of
        arrays `[B, ...]`, where B is a multiple of `batch_shards`.
      mesh: the result of `make_mesh`.
    """
    pinned = of_samples(apply_fn, mesh)
    if pinned is apply_fn:
        return apply_fn
    return lambda params, *inputs: pinned(whole(params, mesh), *inputs)


def of_samples(apply_fn: ApplyFn, mesh: Mesh) -> ApplyFn:
    """Returns a model that leaves samples in place, for parameters that are `whole`.

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
    """Gathers every leaf on every device, inside a `jit`.

    Gather parameters before a loss is differentiated, not inside the loss. Inside it,
    the gradient would be gathered too, and every device would sum the whole gradient
    with all others. Before it, the devices of `fsdp` sum and keep only their parts, and
    only the parts are summed over `data`.

    Args:
      tree: a tree of arrays.
      mesh: the result of `make_mesh`.
    """
    return tree if batch_shards(mesh) == 1 else constrain(tree, mesh, P())


def constrain(tree: Tree, mesh: Mesh, spec: P) -> Tree:
    """Tells the compiler where all leaves are, inside a `jit`.

    Args:
      tree: a tree of arrays.
      mesh: the result of `make_mesh`.
      spec: the axes over which every leaf is sharded.
    """
    sharding = NamedSharding(_context(mesh), spec)
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree
    )


def pin(tree: Tree, mesh: Mesh, *, tasks: bool = False) -> Tree:
    """Tells the compiler that leaves are where `shard` puts them, inside a `jit`.

    Args:
      tree: a tree of arrays.
      mesh, tasks: as for `spec`.
    """
    places = shardings(tree, _context(mesh), tasks=tasks)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)


def _context(mesh):
    # Inside a `shard_map` over tasks, the mesh lacks that axis.
    context = jax.sharding.get_abstract_mesh()
    return context if context.axis_names == mesh.axis_names else mesh


def to_host(tree: Tree) -> Tree:
    """Returns the tree as NumPy arrays in every process; every process must call it.

    Args:
      tree: a tree of arrays.
    """
    return jax.tree.map(np.asarray, gathered(tree))


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    pod: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Joins the processes of one run. Call it before JAX uses a device.

    Missing values come from the environment: from `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. If a launcher started several processes
    (SLURM's `srun`, Open MPI's `mpirun`), JAX finds the values itself. A single process
    stays single.

    Args:
      coordinator: address and port of the first process, for example `10.0.0.1:1234`.
      processes: the number of processes.
      process: the number of this process, from 0.
      pod: whether this is a host of a TPU pod, which JAX finds by asking the cloud.
      environment: the variables to read.

    Returns:
      Whether there are other processes.

    Raises:
      ValueError: only some of coordinator, processes and process are given.
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
            "coordinator's address, the number of processes and the number of this "
            "process. Under SLURM and Open MPI give none of them; on a TPU pod only "
            "`pod`."
        )
    if not pod and not _launched_together(environment):
        return False
    jax.distributed.initialize()
    return jax.process_count() > 1


def _launched_together(environment):
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(environment.get(name, 1)) > 1 for name in counts)
