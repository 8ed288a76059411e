"""Takes task vectors from the bank; trains missing ones and adds them to the bank.

A script describes the vectors by `Wanted` and the model by `Network`. `check` finds
mistakes before anything is written, and `vectors` returns the task vectors.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import bank, runs
from jaxarith import sharding, train
from jaxarith.curvature import Curvature
from jaxarith.data import pipeline
from jaxarith.sharding import processes
from jaxarith.typing import ApplyFn, LossFn, Params, Tree


class Network(NamedTuple):
    """The model that task vectors are trained from.

    Attributes:
      title: name of the model and the method, for progress and for names of logs.
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params_0: the pre-trained parameters.
      loss: `loss(outputs, batch, constants) -> scalar` of one task.
      mesh: the devices.
      inputs: the fields of a batch that `apply_fn` takes.
      penalty_mask: the field of a penalty sample that is 0 where the penalty does not
        look, see `train.fine_tune`.
      augment: see `train.task_batches`.
      stacked: a function from the heads of tasks to the constants of the loss, with a
        leading task axis; None if the loss has no constants.
      workers: number of processes that make the batches.
    """

    title: str
    apply_fn: ApplyFn
    params_0: Params
    loss: LossFn
    mesh: Mesh
    inputs: Sequence[str] = ("image",)
    penalty_mask: str | None = None
    augment: pipeline.Augment | None = None
    stacked: Callable[[list], Tree] | None = None
    workers: int = 0


class Wanted(NamedTuple):
    """A task vector that a script needs.

    Attributes:
      name: the task; with the recipe's seed it determines the order of the samples.
      file: the place of the vector, from `bank.vector_file`.
      recipe: how it is trained.
      identity: everything else that it depends on, as plain data.
      source: the training samples.
      others: the samples that its penalty reads (T_orth), by name, in order.
      head: the head of the task, for the loss.
      start: a task vector to start from.
      kind: vectors train side by side if their recipes and kinds are equal; a kind may
        be the length of texts.
      observed: the numbers of steps after which `observe` is called.
      curvature: returns the curvature of what the task must not disturb, for a penalty
        of curvature. It is called only if the vector is trained. Vectors that train
        side by side with the same function share its result, which the devices then
        hold once.
    """

    name: str
    file: Path
    recipe: train.TrainConfig
    identity: dict[str, Any]
    source: Sequence
    others: Mapping[str, Sequence] = {}
    head: Any = None
    start: Tree | None = None
    kind: Any = None
    observed: Collection[int] = ()
    curvature: Callable[[], Curvature] | None = None


def recipe(options: Any, samples: int, **changes: Any) -> train.TrainConfig:
    """A recipe by epochs, without warm-up and weight decay.

    Args:
      options: with epochs, or steps in their place, batch_size, learning_rate, seed.
      samples: number of training samples.
      changes: other fields that differ from the defaults of `TrainConfig`.
    """
    epochs = options.epochs * math.ceil(samples / options.batch_size)
    return train.TrainConfig(
        steps=options.steps or epochs,
        warmup_steps=0,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        seed=options.seed,
        **changes,
    )


def vectors(
    options: runs.Options,
    network: Network,
    wanted: Sequence[Wanted],
    *,
    together: int | None = None,
    observe: Callable[[Wanted, int, Tree], None] | None = None,
) -> list[Tree]:
    """Returns task vectors from the bank, on the host; trains the missing ones.

    If the axis `task` of the mesh does not divide their number, its size is reduced to
    a common divisor, and the other devices share the batches.

    Args:
      options: the folder of checkpoints and logs, and how often to save.
      network: what the vectors are trained from.
      wanted: the vectors.
      together: the largest number of vectors that train side by side; by default all
        that can.
      observe: called with a vector's description, a number of steps from its
        `observed`, and the vector after them.

    Raises:
      ValueError: the bank holds a vector of another configuration.
    """
    found = [bank.read(one.file, identity(one)) for one in wanted]
    _note_external(options, wanted)
    missing = [one for one, tau in zip(wanted, found, strict=True) if tau is None]
    trained = {}
    for group in alike(missing, together):
        recipe, names = group[0].recipe, labels(group)

        def observed(done, taus, metrics, group=group):
            for one, tau in zip(group, taus, strict=True):
                if observe is not None and done in one.observed:
                    observe(one, done, tau)

        taus, metrics = _run(
            options,
            network,
            names,
            _batches(network, group),
            recipe,
            [one.head for one in group],
            curvature=_curvature(group),
            start=None if group[0].start is None else [one.start for one in group],
            observe=observed,
            observe_every=set().union(*(one.observed for one in group)),
        )
        for one, tau, own in zip(group, taus, metrics, strict=True):
            trained[one.file] = add(one.file, tau, identity(one), own)
        runs.remove_checkpoints(options, checkpoints(options, network, names))
    return [
        trained[one.file] if tau is None else tau
        for one, tau in zip(wanted, found, strict=True)
    ]


def _note_external(options: runs.Options, wanted: Sequence[Wanted]) -> None:
    """Notes the vectors from outside, which the tables of a run then name."""
    for one in wanted:
        if one.file.exists() and bank.is_external(one.file):
            heads = bank.record(one.file)["configuration"].get("heads")
            same = heads == one.identity.get("heads")
            runs.note_external(options, one.file, other_head=not same)


def joint_vector(
    options: runs.Options, network: Network, wanted: Wanted, members: Sequence[Wanted]
) -> Tree:
    """Returns the vector of joint training on several tasks, from the bank or trained.

    Args:
      options, network: as for `vectors`.
      wanted: the vector, with the recipe of the training; its `source` and `head` are
        not used.
      members: the tasks; only name, source and head are used.
    """
    seeds = [train.seed_of(one.name, wanted.recipe.seed) for one in members]
    configuration = identity(wanted) | {"seed of samples": seeds}
    found = bank.read(wanted.file, configuration)
    if found is not None:
        return found
    batches = train.joint_batches(
        [one.source for one in members],
        wanted.recipe,
        seeds=seeds,
        augment=network.augment,
        mesh=sharding.for_tasks(network.mesh, 1),
    )
    [tau], [metrics] = _run(
        options,
        network._replace(stacked=lambda heads: _one_row(network.stacked, heads)),
        [wanted.name],
        batches,
        wanted.recipe,
        [one.head for one in members],
    )
    tau = add(wanted.file, tau, configuration, metrics)
    folder = checkpoints(options, network, [wanted.name])
    runs.remove_checkpoints(options, folder)
    return tau


def check(network: Network, wanted: Iterable[Wanted], together: int | None = None):
    """Raises the ValueErrors of `vectors` that can be found before training.

    The bank may hold a vector of another configuration. Or mesh, batch size and number
    of micro-batches do not fit each other.
    """
    wanted = list(wanted)
    missing = [one for one in wanted if not bank.has(one.file, identity(one))]
    for group in alike(missing, together):
        _batches(network, group)


def alike(wanted: Iterable[Wanted], together: int | None = None) -> list[list[Wanted]]:
    """Groups vectors that can train side by side, at most `together` in a group."""
    groups: dict[Any, list[Wanted]] = {}
    for one in wanted:
        recipe = dataclasses.replace(one.recipe, seed=0)  # batches have their own
        key = (recipe, one.kind, one.start is None)
        groups.setdefault(key, []).append(one)
    return [
        group[first : first + (together or len(group))]
        for group in groups.values()
        for first in range(0, len(group), together or len(group))
    ]


def labels(group: Sequence[Wanted]) -> list[str]:
    """Names of vectors that train side by side, with their seeds if they differ."""
    if len({one.recipe.seed for one in group}) == 1:
        return [one.name for one in group]
    return [f"{one.name}, seed {one.recipe.seed}" for one in group]


def identity(wanted: Wanted) -> dict[str, Any]:
    """Everything that a vector depends on, as plain data: its configuration."""
    return {
        **wanted.identity,
        "recipe": bank.plain_recipe(wanted.recipe),
        "seed of samples": train.seed_of(wanted.name, wanted.recipe.seed),
        # The order determines which of them the penalty reads at which step.
        "order of others": list(wanted.others) if wanted.recipe.penalty else [],
    }


def add(file: Path, tau: Params, configuration: dict, metrics: dict) -> Tree:
    """Adds a vector to the bank; returns it on the host."""
    tau = sharding.to_host(tau)
    processes.on_first(lambda: bank.write(file, tau, configuration, metrics))
    return tau


def checkpoints(options: runs.Options, network: Network, names: Sequence[str]) -> Path:
    """The folder of a training's checkpoints, until its vectors are in the bank."""
    return runs.checkpoints(options) / f"{network.title}_{runs.joined(names)}"


def _curvature(group):
    """Curvature for `fine_tune`: None, one for all vectors, or one for each."""
    given = [one.curvature for one in group]
    if given[0] is None:
        return None
    return given[0]() if len(set(given)) == 1 else [measured() for measured in given]


def _batches(network, group):
    recipe, fields = group[0].recipe, list(network.inputs)
    if recipe.tau_jp_mode and network.penalty_mask not in (None, *fields):
        fields.append(network.penalty_mask)
    return train.task_batches(
        [one.source for one in group],
        recipe,
        seeds=[train.seed_of(one.name, one.recipe.seed) for one in group],
        others=[
            list(one.others.values()) if recipe.tau_jp_mode else [] for one in group
        ],
        inputs=fields,
        augment=network.augment,
        mesh=sharding.for_tasks(network.mesh, len(group)),
    )


def _run(
    options,
    network,
    names,
    batches,
    recipe,
    heads,
    *,
    curvature=None,
    start=None,
    observe=None,
    observe_every=(),
):
    """Trains; returns the vectors on the host, and plain metrics of every name."""
    folder = checkpoints(options, network, names)
    place = folder.relative_to(runs.checkpoints(options)).as_posix()
    log = options.out / f"train_{place.replace('/', '_')}.jsonl"
    mesh = sharding.for_tasks(network.mesh, len(names))
    shared = ""
    if mesh is not network.mesh:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        shared = f" (a mesh of {sizes}, for {len(names)} of them)"
    tqdm.write(f"{network.title}: {', '.join(names)}{shared}", file=sys.stderr)
    taus = train.fine_tune(
        network.apply_fn,
        network.params_0,
        network.loss,
        batches,
        recipe,
        names=names,
        constants=network.stacked and network.stacked(heads),
        inputs=network.inputs,
        penalty_mask=network.penalty_mask if recipe.tau_jp_mode else None,
        curvature=curvature,
        log=log,
        mesh=mesh,
        checkpoints=folder if options.save_every else None,
        save_every=options.save_every,
        workers=network.workers,
        start=start,
        observe=observe,
        observe_every=observe_every,
    )
    if recipe.distill:  # only the ordinary model is wanted
        taus = [tau["student"] for tau in taus]
    metrics = [{} for _ in names]
    if runs.is_first():  # it has written the log
        last = json.loads(log.read_text().splitlines()[-1])
        metrics = [
            {name: last[name][task] for name in ("loss", "penalty") if name in last}
            for task in names
        ]
    return sharding.to_host(taus), metrics


def _one_row(stacked, heads):
    return jax.tree.map(lambda leaf: leaf[None], stacked(heads))
