"""Estimates the cost of a run: `--plan`.

To plan a script on images, the script itself runs on stand-ins: a tiny model, a few
made-up images for every split, and random vectors in place of trained ones. Instead of
training or evaluating, it reports to the `Recorder`. A script on texts reports
everything at once. The recorder knows the sizes of the real model. XLA counts the FLOPs
of one optimizer step and of one forward pass. For memory, XLA compiles the step for as
many virtual CPU devices as the run will have.
"""

import contextlib
import contextvars
import dataclasses
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxarith import report, sharding, train, tree
from jaxarith.typing import ApplyFn, LossFn, Tree


class Chip(NamedTuple):
    """An accelerator, with the figures of its maker.

    Attributes:
      name: the name.
      flops: floating-point operations per second of float32 products.
      note: how the products are computed.
    """

    name: str
    flops: float
    note: str


CHIPS = (
    Chip("A100", 19.5e12, "float32"),
    Chip("H100", 67e12, "float32"),
    Chip("TPU v5e", 197e12 / 6, "float32 of six products in bfloat16"),
)
# An assumption: the part of the published rate that training reaches.
UTILISATION = 0.4


class Full(NamedTuple):
    """The real model, which a stand-in replaces.

    Attributes:
      title: name of the model in the papers.
      apply_fn, trained_fn: the model for evaluation, and the model for training.
      params_0: `jax.ShapeDtypeStruct`s of its parameters.
      sample: a sample of a batch, as `jax.ShapeDtypeStruct`s.
      inputs: the fields of a sample that the model reads.
      penalty_mask: as for `train.fine_tune`.
    """

    title: str
    apply_fn: ApplyFn
    trained_fn: ApplyFn
    params_0: Tree
    sample: dict
    inputs: tuple[str, ...] = ("image",)
    penalty_mask: str | None = None


class Training(NamedTuple):
    """Vectors that would train side by side.

    Attributes:
      full: the model.
      method: the training method.
      names: names of the tasks.
      recipe: the recipe.
      loss, constants: as for `train.fine_tune`, with the sizes of the real model.
      others: number of other tasks that a strict penalty reads.
      joint: number of tasks that one vector learns.
    """

    full: Full
    method: str
    names: tuple[str, ...]
    recipe: train.TrainConfig
    loss: LossFn
    constants: Tree
    others: int = 1
    joint: int = 1

    @property
    def batches(self) -> train.TrainConfig:
        """The recipe, with the number of samples of a whole step."""
        size = self.recipe.batch_size * self.joint
        form = {"penalty": None} if self.recipe.form else {}
        return dataclasses.replace(self.recipe, batch_size=size, **form)


class Recorder:
    """Records what a script would train and evaluate."""

    def __init__(self, devices: int, mesh: str):
        self.devices, self.mesh = devices, mesh
        self.trainings: list[Training] = []
        self.found: dict[tuple[str, str], int] = {}
        self.passes: dict[str, float] = {}
        self.models: dict[str, Full] = {}
        self.disk = 0.0
        self.notes: list[str] = []
        self.made: dict[Path, Tree] = {}
        self._planned: set[Path] = set()

    def missing(self, full: Full, method: str, files: Sequence[Path]) -> list[bool]:
        """Returns for each file whether it is new; all are planned from now on.

        A file is new if it is neither in the bank nor planned before.
        """
        new = [not file.exists() and file not in self._planned for file in files]
        there = sum(file.exists() and file not in self._planned for file in files)
        key = (full.title, method)
        self.found[key] = self.found.get(key, 0) + there
        self._planned |= set(files)
        return new

    def train(self, training: Training):
        """Records a training."""
        self.trainings.append(training)
        self.models[training.full.title] = training.full
        trained = tree.select(training.full.params_0, training.recipe.trained)
        self.disk += 4 * tree.size(trained) * len(training.names)

    def vector(self, file: Path, params_0: Tree, trained: str) -> Tree:
        """Returns a random vector instead of this file's, always the same."""
        if file not in self.made:
            part = tree.select(tree.floating(params_0), trained)
            rng = np.random.default_rng(list(os.fsencode(file)))
            self.made[file] = jax.tree.map(
                lambda leaf: rng.normal(0, 1e-3, leaf.shape).astype(np.float32), part
            )
        return self.made[file]

    def evaluate(self, full: Full, passes: float):
        """Records forward passes of one sample each."""
        self.models[full.title] = full
        self.passes[full.title] = self.passes.get(full.title, 0) + passes

    def note(self, sentence: str):
        """Records a note for the reader of the plan; repeated notes count once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


_RECORDER: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def recorder() -> Recorder | None:
    """Returns the recorder of a plan, or None in a real run."""
    return _RECORDER.get()


def run(main: Callable[[Any], Any], config: Any) -> dict:
    """Plans a script and prints its cost.

    Args:
      main: the script.
      config: its options, with `plan` devices; `plan_memory=0` skips memory.

    Returns:
      The plan as plain data.

    Raises:
      ValueError: a step needs more than `plan_memory`; the plan is printed before.
    """
    _make_devices(config.plan)
    found = Recorder(config.plan, config.mesh)
    tqdm.write("running on stand-ins, then planning every step", file=sys.stderr)
    token = _RECORDER.set(found)
    try:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            nowhere = {"out": Path(folder), "mesh": "data=1"}
            nowhere |= {"workers": 0} if hasattr(config, "workers") else {}
            main(dataclasses.replace(config, **nowhere))
    finally:
        _RECORDER.reset(token)
    rows = [
        _row(found, group, memory=config.plan_memory > 0)
        for group in tqdm(_alike(found), desc="steps", leave=False)
    ]
    results = {"devices": config.plan, "mesh": config.mesh or f"data={config.plan}"}
    results |= {"rows": rows, **totals(found, rows)}
    print(shown(results, found))
    check_memory(rows, config)
    return results


def _make_devices(count):
    """Makes `count` virtual CPU devices, for which steps are compiled."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has already started, as in tests
    if len(jax.devices()) < count or jax.default_backend() != "cpu":
        raise ValueError(
            f"--plan {count} needs {count} virtual CPU devices, but JAX has started "
            f"with {len(jax.devices())} {jax.default_backend()} devices. Start a new "
            "process without XLA_FLAGS=--xla_force_host_platform_device_count."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what a script prints about its stand-ins."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _alike(found: Recorder) -> list[list[Training]]:
    """Groups trainings by model and method; each group is one row."""
    groups: dict[tuple[str, str], list[Training]] = {}
    for training in found.trainings:
        groups.setdefault((training.full.title, training.method), []).append(training)
    return list(groups.values())


def _row(found: Recorder, group: list[Training], *, memory: bool) -> dict:
    largest = max(group, key=lambda one: (len(one.names), one.joint, one.recipe.steps))
    flops = _step_flops(largest)
    vectors = sum(len(one.names) for one in group)
    steps = sum(len(one.names) * one.recipe.steps for one in group)
    row = {
        "model": largest.full.title,
        "method": largest.method,
        "together": len(largest.names),
        "to train": vectors,
        "in the bank": found.found.get((largest.full.title, largest.method), 0),
        "steps": steps,
        "TFLOP a step": flops / 1e12,
        "EFLOP": flops * steps / 1e18,
    }
    return row | ({"GB a device": _gigabytes(found, largest)} if memory else {})


def _gigabytes(found: Recorder, training: Training) -> float:
    """Returns the GB that a device holds in a step; compiles the step."""
    mesh = sharding.make_mesh(found.mesh, jax.devices()[: found.devices])
    mesh = sharding.for_tasks(mesh, len(training.names))
    lowered = _lowered(training, training.batches, len(training.names), mesh)
    return train.device_bytes(lowered.compile()) / 1e9


def _step_flops(training: Training) -> float:
    """Returns the FLOPs of one step of one vector, without micro-batches."""
    config = dataclasses.replace(training.batches, micro_batches=1, tasks_at_once=1)
    [device, *_] = jax.devices()
    lowered = _lowered(training, config, 1, sharding.make_mesh(devices=[device]))
    return float(lowered.cost_analysis()["flops"])  # type: ignore[index]


def _lowered(training, config, tasks, mesh):
    full = training.full
    constants = jax.tree.map(
        lambda x: np.broadcast_to(x[:1], (tasks, *x.shape[1:])), training.constants
    )
    return train.lowered_step(
        full.trained_fn,
        full.params_0,
        training.loss,
        full.sample | ({"task": np.int32(0)} if training.joint > 1 else {}),
        config,
        tasks=tasks,
        others=training.others,
        constants=constants,
        inputs=full.inputs,
        penalty_mask=full.penalty_mask,
        mesh=mesh,
    )


def pass_flops(full: Full) -> float:
    """Returns the FLOPs of a forward pass of one sample."""
    inputs = (full.sample[name] for name in full.inputs)
    one = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in inputs]
    lowered = jax.jit(full.apply_fn).lower(full.params_0, *one)
    return float(lowered.cost_analysis()["flops"])  # type: ignore[index]


def totals(found: Recorder, rows: Sequence[dict]) -> dict:
    """Returns the FLOPs, hours and bytes of the whole run."""
    evaluation = {
        title: passes * pass_flops(found.models[title])
        for title, passes in found.passes.items()
    }
    training = sum(row["EFLOP"] for row in rows) * 1e18
    every = training + sum(evaluation.values())
    states = [
        12
        * tree.size(tree.select(one.full.params_0, one.recipe.trained))
        * len(one.names)
        for one in found.trainings
    ]
    return {
        "forward passes": found.passes,
        "EFLOP of training": training / 1e18,
        "EFLOP of evaluation": sum(evaluation.values()) / 1e18,
        "device hours": {
            chip.name: every / (chip.flops * UTILISATION) / 3600 for chip in CHIPS
        },
        "GB of vectors": found.disk / 1e9,
        "GB of checkpoints": 3 * max(states, default=0) / 1e9,
    }


def shown(results: dict, found: Recorder) -> str:
    """Returns the plan as Markdown."""
    count = results["devices"]
    parts = [f"Plan for {count} devices, mesh {results['mesh']}."]
    if rows := results["rows"]:
        cells = [
            [f"{x:.3g}" if isinstance(x, float) else x for x in row.values()]
            for row in rows
        ]
        parts.append(report.markdown_table(list(rows[0]), cells))
    told = "Steps and FLOPs cover all vectors of a row"
    told += (
        "; GB a device is for the largest group that trains together."
        if all("GB a device" in row for row in rows)
        else ". With --plan-memory 0 the memory of a device is not planned."
    )
    if sum(found.found.values()):
        told += (
            " The plan does not compare the configuration of vectors in the bank; "
            "the run does."
        )
    if any(one.recipe.form for one in found.trainings):
        told += " Curvature is not counted: its measurement, penalty and memory."
    parts.append(" ".join([told, *found.notes]))
    header = ["", *(chip.name for chip in CHIPS)]
    hours = list(results["device hours"].values())
    table = [
        ["device hours", *(f"{x:.3g}" for x in hours)],
        [f"hours on {count}", *(f"{x / count:.3g}" for x in hours)],
    ]
    parts.append(report.markdown_table(header, table))
    rates = ", ".join(
        f"{chip.name} {chip.flops / 1e12:.3g} TFLOP/s ({chip.note})" for chip in CHIPS
    )
    parts.append(f"At {UTILISATION:.0%} of the published rates: {rates}.")
    passes = ", ".join(f"{t} {n:.3g}" for t, n in results["forward passes"].items())
    parts.append(
        f"Forward passes of one sample: {passes or 'none'}. FLOPs: training "
        f"{results['EFLOP of training']:.3g} EFLOP, evaluation "
        f"{results['EFLOP of evaluation']:.3g} EFLOP. Disk: vectors "
        f"{results['GB of vectors']:.3g} GB, checkpoints while training "
        f"{results['GB of checkpoints']:.3g} GB."
    )
    return "\n\n".join(parts)


def check_memory(rows: Sequence[dict], config: Any):
    """Raises a ValueError if a row needs more memory than a device has."""
    limit = config.plan_memory
    large = [row for row in rows if row.get("GB a device", 0) > limit]
    if not large:
        return
    worst = max(large, key=lambda row: row["GB a device"])
    raise ValueError(
        f"{worst['method']} of {worst['model']} needs {worst['GB a device']:.1f} GB on "
        f"a device, more than --plan-memory {limit:g}. What helps: "
        f"{', '.join(_what_helps(config, large))}."
    )


def _what_helps(config, large) -> list[str]:
    """Returns the options of this script that reduce the memory of a step."""
    given = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    helps = []
    if not given.get("remat", True):
        helps.append("--remat")
    if "micro_batches" in given:
        helps.append(f"--micro-batches {2 * given['micro_batches']}")
    if "fsdp" not in config.mesh:
        count = max(config.plan, 2)
        more = "" if config.plan > 1 else f" on {count} devices"
        helps.append(f"--mesh fsdp={count}{more}")
    together = given.get("tasks_together")
    if any(row["together"] > 1 for row in large) and together:
        one = "--no-tasks-together" if together is True else "--tasks-together 1"
        helps.append(one)
    return helps
