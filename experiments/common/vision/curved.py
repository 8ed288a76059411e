"""Curvature of the image tasks: measured once, stored in the bank, merged.

    BANK/<model>/factors_<how they are measured>/<task>.safetensors

Each file has the factors of one task; training on other tasks then needs none of its
images. A file has about P · (15 + 4 · rank) bytes for a model with P parameters. With
the default rank of 32 that is 13 GB for ViT-B-32 and 44 GB for ViT-L-14; without a
sketch (rank 0) it is 1.3 and 4.7 GB.

Factors are merged on the host, which holds those of all tasks. A device holds one
merged curvature for each task that it trains at a time (see `room`), or a single one if
the tasks share it.
"""

import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
from tqdm import tqdm

from experiments.common import bank, curvatures, runs
from experiments.common.vision import seeds, setups, sources
from jaxarith import curvature, sharding, tree
from jaxarith.sharding import processes
from jaxarith.train import manifest


@dataclasses.dataclass(frozen=True)
class Kind:
    """How curvature is measured and merged, and for which tasks.

    Attributes:
      how: the merge, see `curvature.merge`.
      sharing: see `curvature.collect`; None for the diagonal alone, without a sketch.
      probes: random probes for each image.
      of: the tasks that are merged. "others": for each task, all other tasks and the
        control. "all": all tasks and the control. "control": the control alone. The
        last two are the same for every task.
    """

    how: curvature.How = "mean"
    sharing: curvature.Sharing | None = "whole"
    probes: int = 1
    of: Literal["others", "all", "control"] = "others"


KINDS = {
    "curvature": Kind(),
    "curvature_nearest": Kind(how="nearest"),
    "curvature_each": Kind(how="each"),
    "curvature_shared": Kind(of="all"),
    "curvature_diagonal": Kind(sharing=None),
    "attention_curvature": Kind(),
    "delta": Kind(of="control"),
}


def identity(setup: setups.Setup, kind: Kind) -> dict[str, Any]:
    """Returns everything a merged curvature depends on besides the tasks."""
    return _measured(setup, kind) | {"how": kind.how}


def functions(
    setup: setups.Setup, kind: Kind, groups: Sequence[Sequence[setups.Task]]
) -> list[Callable[[], curvature.Factors]]:
    """Returns, for each group of tasks, a function that returns their curvature.

    Equal groups share one function. The factors of a task are read or measured when
    they are first needed. They stay on the host as long as the functions exist.
    """
    tasks = {task.name: task for group in groups for task in group}
    factors = functools.cache(lambda name: factors_of(setup, kind, tasks[name]))

    @functools.cache
    def of_names(names):
        return lambda: merged([factors(name) for name in names], kind)

    return [of_names(tuple(task.name for task in group)) for group in groups]


def room(setup: setups.Setup, kind: Kind) -> int | None:
    """Returns how many tasks may train side by side with a curvature of their own.

    Returns None (no limit) if the mesh has a task axis, or if a device does not report
    its memory. Otherwise their curvature may fill a quarter of the memory, because
    curvature is held twice while it is copied to the device.
    """
    stats = setup.mesh.local_devices[0].memory_stats() or {}
    if setup.mesh.shape["task"] > 1 or "bytes_limit" not in stats:
        return None
    own = tree.size(setup.params_0) * (15 + 4 * _measured(setup, kind)["rank"])
    if kind.how == "each":
        own *= len(setup.tasks)
    return max(stats["bytes_limit"] // (4 * own), 1)


def merged(factors: Sequence[curvature.Factors], kind: Kind) -> curvature.Factors:
    """Merges the curvature of several tasks on the host; calibrates any sketch."""
    with jax.default_device(_host()):
        found = curvature.merge(factors, kind.how)
        if found.sketch:
            found = curvature.calibrate(found)
        return cast(curvature.Factors, jax.device_get(found))


def _host():
    """Returns the host's device: the factors of all tasks may not fit on another.

    Returns None, the default device, if JAX_PLATFORMS excludes the host.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def factors_of(setup: setups.Setup, kind: Kind, task: setups.Task) -> curvature.Factors:
    """Returns the factors of one task on the host; measures them if the bank has none.

    Raises:
      ValueError: the bank has factors for other data or for another model.
    """
    file = file_of(setup, kind, task)
    wanted = _measured(setup, kind) | {"task": task.identity, "model": setup.identity}
    # All processes must agree: one may look before another has saved the file.
    if processes.anywhere(not file.exists()):
        return _collected(setup, kind, task, file, wanted)
    found, metadata = curvature.load(file, setup.params_0)
    different = manifest.differences(
        json.loads(metadata.get("identity", "{}")), json.loads(json.dumps(wanted))
    )
    if different:
        lines = "\n  ".join(different)
        raise ValueError(
            f"{file} was measured with another configuration:\n  {lines}\nName another "
            "--bank, or remove the file to measure it again."
        )
    return cast(curvature.Factors, found)


def file_of(setup: setups.Setup, kind: Kind, task: setups.Task) -> Path:
    """Returns the path of a task's factors in the bank."""
    measured = _measured(setup, kind)
    folder = "factors_{sharing}_samples_{samples}_probes_{probes}_rank_{rank}"
    return bank.vector_file(
        setup.options.bank,
        setup.model,
        folder.format(**measured) + seeds.suffix(measured["seed"]),
        task.name,
    )


def _measured(setup, kind):
    config = setup.options
    return {
        "sharing": kind.sharing or "diagonal",
        "samples": config.curvature_samples,
        "probes": kind.probes,
        "rank": config.curvature_rank if kind.sharing else 0,
        "seed": config.seed,
    }


def _collected(setup, kind, task, file, wanted):
    if runs.is_first():
        tqdm.write(f"{setup.title}: curvature of {task.name}", file=sys.stderr)
    count, seed = wanted["samples"], wanted["seed"]
    prepare = sources.Preprocessed(setup.preprocess)
    found = curvatures.collected(
        setup.apply_fn,
        setup.params_0,
        [prepare(sample) for sample in curvatures.drawn(task.train, count, seed)],
        inputs=("image",),
        key=jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.name.encode())),
        mesh=setup.mesh,
        rank=wanted["rank"],
        sharing=kind.sharing,
        probes=kind.probes,
    )
    found = sharding.to_host(found)

    def save():
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"task": task.name, "identity": json.dumps(wanted)}
        curvature.save(file, found, metadata)

    processes.on_first(save)
    return found
