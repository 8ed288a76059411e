"""Sets up devices, processes and the output folder of a script.

A run has one folder, and `config.json` in it records the options. A script that is
started again with the same options continues the run. Other options are refused.
"""

import dataclasses
import json
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from jaxarith import files, report, sharding
from jaxarith.sharding import processes
from jaxarith.train import manifest

# Options of many scripts: sizes above 0, counts from 0, and lists that are not empty.
_SIZES = ("batch_size", "epochs", "evaluation_batch", "max_length")
_SIZES += ("learning_rate", "micro_batches", "penalty_batch_size", "samples", "steps")
_SIZES += ("curvature_samples", "seeds")
_COUNTS = ("curvature_coef", "curvature_rank", "delta_coef")
_COUNTS += ("diagonal_coef", "distill_coef", "penalty_coef", "penalty_start", "plan")
_COUNTS += ("plan_memory", "save_every")
_COUNTS += ("workers",)
_LISTS = ("alphas", "coefs", "models", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options that all scripts with a folder of their own have."""

    out: Path = Path("runs/<paper>/<script>")
    """Folder for all output."""
    mesh: str = ""
    """Sizes of the device axes, such as data=4,fsdp=2. Devices of `data` share every
    batch; those of `fsdp` also share parameters and optimizer state; those of `task`
    train different tasks. By default all devices share every batch."""
    resume: bool = True
    """Continue a run with the same options in --out; --no-resume starts anew there."""
    save_every: int = 100
    """Steps from one checkpoint to the next; 0 saves none."""
    coordinator: str | None = None
    """Address and port of the first of several processes. Under SLURM and Open MPI, JAX
    finds this and the next two options. $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES
    and $JAX_PROCESS_ID can replace them."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """The number of this process, from 0."""
    pod: bool = False
    """This machine is a host of a TPU pod; JAX finds the other hosts."""
    smoke: bool = False
    """Run the whole script in seconds, with tiny models, little or made-up data and few
    steps; the results mean nothing."""

    def __post_init__(self):
        if self.out == Options.out:  # replaced by the script's own folder
            folders = script_name(self).split(".")[1:]
            object.__setattr__(self, "out", Path("runs", *folders))
        for name in _SIZES:
            value = getattr(self, name, None)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: expected more than 0.")
        for name in _COUNTS:
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < math.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: expected 0 or more.")
        for name in _LISTS:
            if getattr(self, name, None) == ():
                raise ValueError(f"--{name} is empty; give at least one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Banked(Options):
    """The options of scripts that take task vectors from the bank."""

    bank: Path = Path("bank")
    """Folder of task vectors that all scripts share. A vector in it is not trained
    again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(Options):
    """The options of scripts that can print their cost, see `planning`."""

    plan: int = 0
    """Print the cost of the run on this number of devices, and stop: steps, FLOPs,
    memory per device, hours, disk. This needs no weights and no data. 0 runs the
    script."""
    plan_memory: float = 80.0
    """Memory of a device in GB. A plan that needs more is refused, with advice. 0 skips
    the plan of memory, which compiles every step."""


# These options determine where and how a run computes, not its results.
_WHERE = {field.name for field in dataclasses.fields(Options)} - {"smoke"} | {
    *("bank", "data_dir", "micro_batches", "remat", "tasks_together", "workers"),
    *("evaluation_batch", "plan", "plan_memory", "save_merged", "tasks_file"),
}


C = TypeVar("C", bound=Options)


def smaller(options: C, **small: Any) -> C:
    """Returns the options, changed for a smoke run.

    A smoke run takes `small`, has no checkpoints, and uses one device unless --mesh is
    given.
    """
    if not options.smoke:
        return options
    place = {"mesh": options.mesh or "data=1", "save_every": 0}
    return dataclasses.replace(options, **place | small)


# For each folder, the options of the script that was started.
_STARTED: dict[Path, Options] = {}


def start(options: Options) -> Mesh:
    """Joins the other processes and checks the folder; writes nothing.

    Returns:
      The mesh of all devices.

    Raises:
      ValueError: the mesh is wrong, or the folder holds a run with other options.
    """
    for place in (options.out, *options.out.parents):
        if place.is_file():
            raise ValueError(f"--out {options.out}: {place} is a file; name a folder.")
    sharding.initialize(
        options.coordinator, options.processes, options.process, pod=options.pod
    )
    there = options.out / "config.json"
    ours = (checkpoints(options), vectors(options))
    if not there.exists() and (found := [f for f in ours if f.exists()]):
        raise ValueError(
            f"{found[0]} exists, but there is no config.json that says which options "
            "it has. Name another folder, or remove it."
        )
    if options.resume and there.exists():
        different = manifest.differences(
            _what(files.read_json(there)), _what(plain(options))
        )
        if different:
            raise ValueError(
                f"{options.out} holds a run with other options: "
                f"{'; '.join(different)}. Name another folder, or overwrite the run "
                "with --no-resume."
            )
    mesh = sharding.make_mesh(options.mesh)
    _STARTED[options.out] = options
    return mesh


def claim(options: Options):
    """Claims the folder for this run; --no-resume removes the state of an earlier run.

    A script may train with other options in the same folder; config.json records the
    options that the script was started with.
    """
    options = _STARTED.get(options.out, options)

    def write():
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            for folder in (checkpoints(options), vectors(options)):
                shutil.rmtree(folder, ignore_errors=True)
        report.write_json(options.out / "config.json", plain(options))

    processes.on_first(write)


def checkpoints(options: Options) -> Path:
    """Returns the folder of checkpoints; it exists only during training."""
    return options.out / "checkpoints"


def joined(names: Sequence[str]) -> str:
    """Joins names of tasks into a part of a path; a long one ends in a checksum.

    Example:
      >>> joined(["MR", "a/b"]), joined(["task"] * 40)[90:]
      ('MR-a-b', 'task-task--6ea964f4')
    """
    whole = "-".join(names).replace("/", "-")
    if len(whole) <= 110:
        return whole
    return f"{whole[:100]}-{zlib.crc32(whole.encode()):08x}"


# For each folder, the external vectors that a script took from the bank, and whether
# their tasks had another head when they were added.
_EXTERNAL: dict[Path, dict[Path, bool]] = {}


def note_external(options: Options, file: Path, *, other_head: bool) -> None:
    """Records a task vector from the bank that was not trained here."""
    _EXTERNAL.setdefault(options.out, {})[file] = other_head


def external(out: Path) -> str:
    """Returns a line on the task vectors of a run that were not trained here, or "".

    Example:
      >>> options = Options(out=Path("out"))
      >>> for task in ("mnist", "svhn"):
      ...     note_external(options, Path(f"b/clip/nonlinear/{task}"), other_head=False)
      >>> external(Path("out"))
      'From outside, not trained here: mnist, svhn (clip, nonlinear).'
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for file, other_head in _EXTERNAL.get(out, {}).items():
        task = f"{file.stem} (with another head then)" if other_head else file.stem
        groups.setdefault(file.parts[-3:-1], []).append(task)
    found = [f"{', '.join(tasks)} ({', '.join(of)})" for of, tasks in groups.items()]
    return f"From outside, not trained here: {'; '.join(found)}." if found else ""


def remove_checkpoints(options: Options, folder: Path):
    """Removes a folder of checkpoints, and `checkpoints` after the last one."""

    def remove():
        shutil.rmtree(folder, ignore_errors=True)
        for parent in folder.parents:
            if parent == options.out or not parent.exists() or any(parent.iterdir()):
                break
            parent.rmdir()

    processes.on_first(remove)


def vectors(options: Options) -> Path:
    """Returns the folder of trained task vectors."""
    return options.out / "task_vectors"


def is_first() -> bool:
    """Whether this is the process that writes the results."""
    return jax.process_index() == 0


def script_name(options: Options) -> str:
    """Returns the module of the script to which the options belong."""
    module = type(options).__module__
    spec = sys.modules[module].__spec__ if module == "__main__" else None
    return spec.name if spec else module


def plain(options: Options) -> dict:
    """Returns the script and its options as plain data, with only the ends of paths."""
    values = {"script": script_name(options)} | dataclasses.asdict(options)
    values = {k: v.name if isinstance(v, Path) else v for k, v in values.items()}
    return json.loads(json.dumps(values))


def _what(values):
    return {name: value for name, value in values.items() if name not in _WHERE}
