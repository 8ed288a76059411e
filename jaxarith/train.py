"""Fine-tuning of one or several tasks, ordinary or in the tangent space.

`recipe` says what is trained, `train_step` is one step of it, and here is the run:
batches, progress, checkpoints. A run with checkpoints stops at a signal and goes on
where it stopped, to the same bits.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxarith import (
    checkpoint,
    fingerprint,
    interrupts,
    processes,
    report,
    sharding,
    tangent,
    tau_jp,
    tree,
)
from jaxarith.data import pipeline
from jaxarith.recipe import TrainConfig as TrainConfig
from jaxarith.recipe import schedule
from jaxarith.train_step import LossFn, init_state, make_step, objective


def task_batches(
    sources: Sequence,
    config: TrainConfig,
    *,
    others: Sequence[Sequence] | None = None,
    inputs: Sequence[str] = ("image",),
    augment: pipeline.Augment | None = None,
    mesh: Mesh | None = None,
    seeds: Sequence[int] | None = None,
) -> Sequence[dict]:
    """The batches of a run: every task's own samples and, if asked, penalty samples.

    A batch is a function of its step and the seed alone, and is made when it is asked
    for. Of several processes each reads what its own devices compute, and nothing else.

    Args:
      sources: the training source of each of T tasks.
      config: steps, sizes, penalty mode and seed.
      others: for each task, the sources that its task vector must not disturb
        (T_orth); by default the other tasks' training sources. Labels are not read.
      inputs: the fields of a penalty sample: those of the model, and the penalty's
        mask where that is not among them.
      augment: from a sample of a source and a `numpy.random.Generator` to what is
        trained on, of penalty samples too; by default samples are taken as they are.
      mesh: the devices, see `sharding`; by default one.
      seeds: of each task, so that its samples do not depend on the tasks that are
        trained beside it; by default they follow from `config.seed` and its position.

    Returns:
      `config.steps` dicts of arrays `[T, config.batch_size, ...]`; with a penalty also
      `"penalty"`, a dict of input fields `[T, P, ...]`. In one of several processes
      the `sharding.local_rows` of both axes.

    Raises:
      ValueError: no task, an empty source, no other task for the penalty, or tasks or
        samples that the mesh cannot share equally.
    """
    if not sources:
        raise ValueError("no task to train on: the list of sources is empty.")
    if others is None:
        tasks = range(len(sources))
        others = [[sources[j] for j in tasks if j != i] for i in tasks]
    mesh = mesh or sharding.one_device()
    if seeds is None:
        count = itertools.count(10_000 * config.seed)
        own_seeds = [next(count) for _ in sources]
        other_seeds = [[next(count) for _ in group] for group in others]
        draw_seeds = [config.seed + task for task in range(len(sources))]
    else:
        own_seeds = draw_seeds = list(seeds)
        other_seeds = [
            [seed + 1 + j for j in range(len(group))]
            for seed, group in zip(seeds, others, strict=True)
        ]

    def shuffled(sources, seeds):
        pairs = zip(sources, seeds, strict=True)
        return [pipeline.shuffled(source, seed, augment) for source, seed in pairs]

    own = shuffled(sources, own_seeds)
    foreign = [shuffled(*pair) for pair in zip(others, other_seeds, strict=True)]
    local_tasks = sharding.local_rows(len(sources), mesh, "task")

    def drawn(task, step):
        views, size = len(foreign[task]), config.penalty_batch_size
        return tau_jp.draw(config.penalty, step, views, size, draw_seeds[task])

    rows = _local_samples(config.batch_size, config, mesh)
    if config.penalty:
        penalty_rows = [
            _local_samples(len(drawn(task, 0)), config, mesh)
            for task in range(len(sources))
        ]

    def penalty_samples(task, step):
        views, tasks = foreign[task], drawn(task, step)
        first = step * config.penalty_batch_size
        records = [
            views[tasks[i]][first + int(i) % config.penalty_batch_size]
            for i in penalty_rows[task]
        ]
        return pipeline.collate([{name: r[name] for name in inputs} for r in records])

    def make_batch(step):
        batches = []
        for task in local_tasks:
            positions = step * config.batch_size + rows
            batch = pipeline.collate([own[task][int(i)] for i in positions])
            if config.penalty:
                batch["penalty"] = penalty_samples(task, step)
            batches.append(batch)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    return pipeline.lazy(make_batch, config.steps)


def joint_batches(
    sources: Sequence,
    config: TrainConfig,
    *,
    augment: pipeline.Augment | None = None,
    mesh: Mesh | None = None,
) -> Sequence[dict]:
    """The batches of one run on all tasks at once: multi-task learning.

    Args:
      sources: the training source of each of T tasks.
      config: steps and seed; `batch_size` samples of every task make a batch.
      augment, mesh: as for `task_batches`.

    Returns:
      `config.steps` dicts of arrays `[1, T * config.batch_size, ...]`, with the number
      of each sample's task as the field "task", `i32`.

    Raises:
      ValueError: as for `task_batches`; the devices cannot train different tasks, for
        there is one.
    """
    if not sources:
        raise ValueError("no task to train on: the list of sources is empty.")
    mesh = mesh or sharding.one_device()
    seeds = itertools.count(10_000 * config.seed)
    views = [pipeline.shuffled(source, next(seeds), augment) for source in sources]
    sharding.local_rows(1, mesh, "task")  # an error where there are several
    rows = _local_samples(len(views) * config.batch_size, config, mesh)

    def make_batch(step):
        first = step * config.batch_size
        pairs = [divmod(int(row), len(views)) for row in rows]
        batch = pipeline.collate([views[task][first + i] for i, task in pairs])
        batch["task"] = np.array([task for _, task in pairs], np.int32)
        return {name: field[None] for name, field in batch.items()}

    return pipeline.lazy(make_batch, config.steps)


def _local_samples(count, config, mesh):
    """Which samples of a step this process reads."""
    parts = sharding.batch_shards(mesh) * config.micro_batches
    if count % parts:
        raise ValueError(
            f"{count} samples of a step cannot be cut into equal parts for "
            f"{sharding.batch_shards(mesh)} devices and {config.micro_batches} "
            f"micro-batches; give a multiple of {parts}, or another mesh."
        )
    return sharding.local_rows(count, mesh, sharding.BATCH)


def fine_tune(
    apply_fn: tangent.ApplyFn,
    params_0: tree.Tree,
    loss_fn: LossFn,
    batches: Sequence[dict],
    config: TrainConfig,
    *,
    names: Sequence[str],
    constants: tree.Tree = None,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    log: Path | None = None,
    mesh: Mesh | None = None,
    checkpoints: Path | None = None,
    save_every: int = 200,
    keep: int = 2,
    start: Sequence[tree.Tree] | None = None,
    observe: Callable[[int, list[tree.Tree]], None] | None = None,
    observe_every: int | Collection[int] = 100,
    workers: int = 0,
) -> list[tree.Tree]:
    """Trains one task vector for each task.

    With a folder for checkpoints the run can be stopped at any moment: called again, it
    goes on from the last checkpoint and ends with the same bits as without a stop, on
    the same devices. On SIGTERM and Ctrl-C it saves first.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params_0: the pre-trained parameters; they are only read.
      loss_fn: `loss(outputs, batch, constants) -> scalar` of one task.
      batches: `config.steps` batches with a leading task axis, from `task_batches`.
      config: the recipe.
      names: the T tasks, for the progress bar, the log and errors.
      constants: a tree of arrays `[T, ...]` that `loss_fn` gets a row of.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      penalty_mask: for outputs by token, `[B, S, ...]`: the field of the penalty
        samples, `[B, S]`, that is 0 where a token is padding, such as
        "attention_mask". The penalty is the mean over the other tokens; without it,
        over all.
      log: a file that gets one JSON line per step: step, learning rate, samples per
        second, and loss (and penalty) and norm of the gradient by task.
      mesh: the devices, see `sharding`; by default one.
      checkpoints: the folder for checkpoints; several processes share it. By default
        nothing is saved.
      save_every: steps from one checkpoint to the next. There is one at the end too.
      keep: how many checkpoints, the last ones, are kept.
      start: a task vector of every task to start from, with a fresh optimizer; by
        default zero.
      observe: is called with the number of steps done and the task vectors, every
        `observe_every` steps, or after each of these numbers of steps. A run that goes
        on from a checkpoint may do so for the steps since it once more.
      workers: how many processes make the batches; 0 for threads, see
        `data.pipeline.prefetch`, and mind that a script must not start anew in them.

    Returns:
      T task vectors in float32, with the leaves that `config.trained` matches.

    Raises:
      FloatingPointError: a loss or gradient is not finite; the message names the step,
        the task and the leaf. Checkpoints from before are kept.
      OSError: the checkpoints do not fit on the disk, or cannot be written.
      SystemExit: a signal came, and the state is saved; of status 128 + its number.
        Of several processes only SIGTERM is noted.
      ValueError: `batches` is not `config.steps` long, `trained` matches no leaf, the
        mesh cannot share tasks or samples equally, or the checkpoints are of another
        run.
    """
    if checkpoints is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}; at least 1 is needed.")
    if isinstance(observe_every, int):
        if observe_every < 1:
            raise ValueError(f"observe_every is {observe_every}; at least 1 is needed.")
        observe_every = range(observe_every, config.steps + 1, observe_every)
    if len(batches) != config.steps:
        raise ValueError(f"{len(batches)} batches for {config.steps} steps.")
    mesh = mesh or sharding.one_device()
    params_0 = sharding.shard(params_0, mesh)  # once, not with every step
    constants = sharding.put(constants, NamedSharding(mesh, P("task")))
    state = init_state(params_0, config, len(names), mesh, start)
    objective_fn = objective(apply_fn, loss_fn, config, inputs, penalty_mask, mesh)
    step, one_by_one = make_step(objective_fn, config, mesh), _one_by_one(mesh)
    leaves = list(tree.flatten(state[0]))
    learning_rate = schedule(config)
    first, saved, signalled = 0, None, lambda: None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            signalled = stack.enter_context(interrupts.noted())
            identity = _identity(config, names, params_0, constants)
            identity |= {"inputs": list(inputs), "penalty_mask": penalty_mask}
            if start is not None:
                identity["start"] = fingerprint.combined(list(start))
            saved = stack.enter_context(
                checkpoint.Checkpoints(checkpoints, identity, keep=keep)
            )
            processes.on_first(lambda: saved.reserve(state))
            if restored := saved.restore(state):
                first, state = restored
        is_first = jax.process_index() == 0
        if log is not None:  # an error of the first process must stop the others too
            processes.on_first(lambda: _keep_lines(log, first))
        file = stack.enter_context(open(log if log and is_first else os.devnull, "a"))
        bar = stack.enter_context(
            tqdm(
                total=config.steps,
                initial=first,
                desc=_title(config),
                unit="step",
                disable=not is_first,
            )
        )

        def record(number, metrics):
            metrics = {k: np.asarray(v) for k, v in metrics.items()}
            norms = metrics.pop("gradient_norms")
            _check_finite(metrics, norms, number, names, leaves)
            metrics["gradient_norm"] = np.linalg.norm(norms, axis=1)
            samples = (number + 1 - first) * config.batch_size * len(names)
            rate = samples / (time.time() - since)
            loss = f"{np.mean(metrics['loss']):.3f}"
            bar.set_postfix(loss=loss, samples_s=int(rate), refresh=False)
            bar.update()
            line = {
                "step": number,
                "learning_rate": float(learning_rate(number)),
                "samples_per_second": round(rate, 1),
            }
            for name, values in metrics.items():
                line[name] = dict(zip(names, values.tolist(), strict=True))
            file.write(json.dumps(line) + "\n")

        since, pending = time.time(), None
        made = pipeline.prefetch(batches, first, workers)
        for number, batch in enumerate(made, first):
            batch = sharding.from_local_rows(batch, mesh)
            state, metrics = step(state, params_0, batch, constants)
            if pending:  # read the step before while the device computes this one
                record(*pending)
            pending, done = (number, metrics), number + 1
            if observe and done in observe_every:
                record(*pending)  # what is not finite is not shown
                pending = None
                observe(done, one_by_one(state[0]))
            came = signalled()
            if saved and (came or done % save_every == 0 or done == config.steps):
                if pending:
                    record(*pending)  # what is not finite is not saved
                pending = None
                file.flush()
                saved.save(done, state)
            if came:
                saved.wait()
                if is_first:
                    bar.write(
                        f"{came.name}: saved after step {done} of {config.steps} in "
                        f"{checkpoints}. Run the same again to go on.",
                        file=sys.stderr,
                    )
                raise SystemExit(128 + came)
        if pending:
            record(*pending)
    return one_by_one(state[0])


def _identity(config, names, params_0, constants):
    """What must be the same where a run goes on."""
    options = dataclasses.asdict(config)
    # How a step is computed, not what: other devices may want it otherwise.
    del options["tasks_at_once"], options["micro_batches"]
    return {
        "train": options,
        "tasks": list(names),
        "params_0": fingerprint.combined(params_0),
        "constants": fingerprint.combined(constants),
    }


def _keep_lines(log, steps):
    """Keeps the first lines of the log, one for each of the steps that are done."""
    log = Path(log)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    report.write_text(log, "".join(lines[:steps]))


def _one_by_one(mesh):
    """From trees along a task axis to a list of them."""

    @jax.jit
    def unstack(taus):
        return [sharding.pin(tau, mesh) for tau in tree.unstack(taus)]

    return unstack


def _title(config):
    kind = "linearised" if config.linearized else "ordinary"
    return f"{kind} + {config.penalty} τJp" if config.penalty else kind


def _check_finite(metrics, norms, number, names, leaves):
    for task, name in enumerate(names):
        bad = [
            metric
            for metric, values in metrics.items()
            if not np.isfinite(values[task])
        ]
        broken = [
            leaf
            for leaf, ok in zip(leaves, np.isfinite(norms[task]), strict=True)
            if not ok
        ]
        if not bad and not broken:
            continue
        what = [
            f"the {metric} of task {name} is {metrics[metric][task]}" for metric in bad
        ]
        if broken:
            what.append(
                f"the gradient of task {name} is not finite in {len(broken)} of "
                f"{len(leaves)} leaves, the first {broken[0]},"
            )
        raise FloatingPointError(
            f"{' and '.join(what)} at step {number}. Lower the learning rate, or look "
            "for bad samples around that step."
        )
