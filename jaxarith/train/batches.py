"""Makes the batches of a run: samples of every task, and penalty samples of others."""

import itertools
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxarith import sharding, tau_jp, tree
from jaxarith.batches import fields_of
from jaxarith.data import pipeline
from jaxarith.train import padding
from jaxarith.train.config import TrainConfig
from jaxarith.typing import Source


def seed_of(name: str, seed: int) -> int:
    """Returns the seed of a task's batches; it does not depend on other tasks.

    Args:
      name: the task's name.
      seed: the seed of the run, `config.seed`.

    Example:
      >>> seed_of("dtd", 1) - seed_of("dtd", 0)
      1
    """
    return zlib.crc32(name.encode()) + seed


def task_batches(
    sources: Sequence[Source],
    config: TrainConfig,
    *,
    names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    others: Sequence[Sequence[Source]] | None = None,
    inputs: Sequence[str] = ("image",),
    augment: pipeline.Augment | None = None,
    mesh: Mesh | None = None,
) -> Source:
    """Makes the batches of a run: samples of each task and, if penalised, of others.

    A batch depends only on its step and the seed, and is made when it is needed. With
    several processes, each reads only the samples of its own devices.

    Args:
      sources: the training source of each of T tasks. A source is a sequence of
        samples, which are dicts of arrays such as `{"image": x, "label": y}`, or one
        dict of arrays `[N, ...]`.
      config: steps, sizes and penalty mode.
      names: the names of the tasks. They determine the seeds (`seed_of`), so a task's
        samples do not depend on the tasks that are trained beside it. Without names and
        seeds, the names are "0", "1", …, and the samples depend on the order.
      seeds: the seed of each task, instead of names.
      others: for each task, the sources that its task vector must not disturb
        (T_orth); by default the other tasks' training sources. Labels are not read.
      inputs: the fields of a penalty sample: the inputs of the model, and the mask of
        the penalty if that is a separate field.
      augment: a function from a sample and a `numpy.random.Generator` to the sample to
        train on. It also applies to penalty samples. By default samples are not
        changed.
      mesh: the devices, see `sharding`; by default one.

    Returns:
      `config.steps` dicts of arrays `[T, config.batch_size, ...]`. With a penalty, they
      also have `"penalty"`, a dict of input fields `[T, P, ...]`. With
      `config.distill`, they have `"alpha"`, the step's coefficient of each task,
      `[T, B]`, which is the same for all samples of a task. With several processes,
      each gets the `sharding.local_rows` of both axes. If devices and micro-batches do
      not divide B or P, copies fill up the batch, and the field `train.padding.WEIGHT`
      marks them. The objectives of this package read it, so copies do not count.

    Raises:
      ValueError: there is no task; a source is empty; the penalty has no other task;
        the number of names or seeds is wrong, or both are given; the mesh cannot share
        the tasks equally; or there are more micro-batches than samples on a device.
        When a batch is made: a sample is not a dict, lacks a field, or has a field of
        another shape.
    """
    seeds = _seeds(sources, config, names, seeds)
    if others is None:
        tasks = range(len(sources))
        others = [[sources[j] for j in tasks if j != i] for i in tasks]
    mesh = mesh or sharding.one_device()
    other_seeds = [
        [seed + 1 + j for j in range(len(group))]
        for seed, group in zip(seeds, others, strict=True)
    ]

    def shuffled(sources, seeds):
        pairs = zip(sources, seeds, strict=True)
        return [pipeline.shuffled(source, seed, augment) for source, seed in pairs]

    own = shuffled(sources, seeds)
    foreign = [shuffled(*pair) for pair in zip(others, other_seeds, strict=True)]
    local_tasks = sharding.local_rows(len(sources), mesh, "task")

    size = config.batch_size
    total = padding.filled(size, mesh, config.micro_batches)
    rows = sharding.local_rows(total, mesh, sharding.BATCH)

    def drawn(task, step, mode):
        views, size = len(foreign[task]), config.penalty_batch_size
        return tau_jp.draw(mode, step, views, size, seeds[task])

    # Plain arrays: worker processes receive everything that makes a batch.
    penalty_rows = [
        _penalty_rows(len(drawn(task, 0, config.tau_jp_mode)), config, mesh)
        for task in range(len(sources) if config.tau_jp_mode else 0)
    ]

    def penalty_samples(task, step):
        views, tasks = foreign[task], drawn(task, step, config.tau_jp_mode)
        first, (rows, total) = step * config.penalty_batch_size, penalty_rows[task]
        records = [
            views[tasks[i]][first + int(i) % config.penalty_batch_size]
            for i in rows % len(tasks)
        ]
        samples = pipeline.collate(
            [
                dict(zip(inputs, fields_of(r, inputs, "penalty sample"), strict=True))
                for r in records
            ]
        )
        if step < config.penalty_start:  # they are read but do not count
            return samples | {padding.WEIGHT: np.zeros(len(rows), np.float32)}
        always = config.penalty_start > 0  # one program serves all steps
        return samples | padding.weights(rows, len(tasks), total, always=always)

    def make_batch(step):
        batches = []
        for task in local_tasks:
            positions = step * size + rows % size
            batch: dict = pipeline.collate([own[task][int(i)] for i in positions])
            batch |= padding.weights(rows, size, total)
            if config.distill:
                batch["alpha"] = _alphas(config.distill, seeds[task], step, len(rows))
            if config.tau_jp_mode:
                batch["penalty"] = penalty_samples(task, step)
            batches.append(batch)
        return _side_by_side(batches)

    penalised = [*itertools.chain.from_iterable(others)] if config.tau_jp_mode else []
    return pipeline.Batches(
        pipeline.lazy(make_batch, config.steps),
        lambda: _identities([*sources, *penalised]),
    )


def joint_batches(
    sources: Sequence[Source],
    config: TrainConfig,
    *,
    names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    augment: pipeline.Augment | None = None,
    mesh: Mesh | None = None,
) -> Source:
    """Makes the batches of one run on all tasks at once: multi-task learning.

    Args:
      sources: the training source of each of T tasks.
      config: the number of steps; `batch_size` samples of every task make a batch.
      names, seeds: as for `task_batches`, one for each source.
      augment, mesh: as for `task_batches`.

    Returns:
      `config.steps` dicts of arrays `[1, T * config.batch_size, ...]`. Their field
      "task", `i32`, holds the number of each sample's task. There may be copies, as in
      `task_batches`.

    Raises:
      ValueError: as for `task_batches`; or the mesh has several devices for different
        tasks, although all tasks train as one.
    """
    seeds = _seeds(sources, config, names, seeds)
    mesh = mesh or sharding.one_device()
    views = [
        pipeline.shuffled(source, seed, augment)
        for source, seed in zip(sources, seeds, strict=True)
    ]
    sharding.local_rows(1, mesh, "task")  # raises an error if there are several
    size = len(views) * config.batch_size
    total = padding.filled(size, mesh, config.micro_batches)
    rows = sharding.local_rows(total, mesh, sharding.BATCH)

    def make_batch(step):
        first = step * config.batch_size
        pairs = [divmod(int(row), len(views)) for row in rows % size]
        batch = pipeline.collate([views[task][first + i] for i, task in pairs])
        batch |= padding.weights(rows, size, total)
        batch["task"] = np.array([task for _, task in pairs], np.int32)
        if config.distill:
            batch["alpha"] = _alphas(config.distill, config.seed, step, len(rows))
        return {name: field[None] for name, field in batch.items()}

    return pipeline.Batches(
        pipeline.lazy(make_batch, config.steps), lambda: _identities(sources)
    )


def _penalty_rows(count, config, mesh):
    """Returns this process's penalty rows of a step, and the number of all rows."""
    total = padding.copied(count, mesh, config.micro_batches)
    return sharding.local_rows(total, mesh, sharding.BATCH), total


def _alphas(distill, seed, step, rows):
    """Returns a step's coefficient for every row; it depends only on seed and step."""
    rng = np.random.default_rng((seed, step))
    return np.full(rows, rng.uniform(distill.low, distill.high), np.float32)


def _identities(sources):
    """Returns the identities of the sources; reads a repeated source only once."""
    different = {id(source): source for source in sources}
    found = {key: pipeline.identity(source) for key, source in different.items()}
    return [found[id(source)] for source in sources]


def _seeds(sources, config, names, seeds):
    if isinstance(sources, Mapping):
        raise ValueError(
            f"sources is a dict of {', '.join(map(str, sources))}; expected a list "
            "with one source for each task. Write [source] for one task."
        )
    if not len(sources):
        raise ValueError("no task to train on: the list of sources is empty.")
    if names is not None and seeds is not None:
        raise ValueError("names and seeds are both given; give only one of them.")
    if seeds is None:
        names = range(len(sources)) if names is None else names
        seeds = [seed_of(str(name), config.seed) for name in names]
        what = "names"
    else:
        what = "seeds"
    if len(seeds) != len(sources):
        raise ValueError(
            f"{len(seeds)} {what} for {tree.counted(len(sources), 'task')}; give one "
            "for each task."
        )
    return seeds


def _side_by_side(batches):
    """Stacks the batches of all tasks on a leading task axis."""
    shapes = [jax.tree.map(np.shape, batch) for batch in batches]
    for task, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                "tasks that train side by side need samples with the same fields and "
                f"shapes. The batch of task 0 is {shapes[0]}, but the batch of task "
                f"{task} is {other}. Give them one shape, or train them one after "
                "another."
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
