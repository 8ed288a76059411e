"""Loads a CLIP and the tasks, ready to train and to evaluate.

The zero-shot heads are made once and stored in the bank.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, planning
from experiments.common.vision import architectures, raw_tasks, sources
from experiments.common.vision.options import (
    TITLES,
    Models,
    Options,
    check_control,
    recipe_of,
    title_of,
)
from jaxarith import fingerprint, hub, metrics, sharding, train, tree
from jaxarith.data import images, pipeline
from jaxarith.models import clip, heads
from jaxarith.sharding import processes
from jaxarith.typing import Numbers


class Dataset(NamedTuple):
    """One split of one task: batches, labels, and the frozen head.

    Attributes:
      source: raw images.
      size: number of samples; in a plan that of the real split.
      batches: preprocessed images, made again in every pass.
      labels: labels, `i32[N]`.
      head: the frozen head, `[C, D]`.
    """

    source: Any
    size: int
    batches: pipeline.Stream
    labels: np.ndarray
    head: jax.Array

    def predict(self, features) -> np.ndarray:
        """Returns the predicted labels of features `[N, D]`."""
        return np.asarray(heads.logits(self.head, features)).argmax(-1)

    def accuracy(self, features) -> float:
        return metrics.accuracy(heads.logits(self.head, features), self.labels)


class Task(NamedTuple):
    """A task with its splits.

    Attributes:
      name: name of the task in the bank.
      title: name of the task in the papers.
      train: the source of training samples.
      identity: plain data that identify its training samples.
      validation, test: the other splits.
    """

    name: str
    title: str
    train: Any
    identity: dict
    validation: Dataset
    test: Dataset


class Setup(NamedTuple):
    """A CLIP and the tasks.

    Attributes:
      options: options of the script.
      model: the model, as given by the options; names its folder in the bank.
      apply_fn: `apply_fn(params, images) -> features[B, D]`.
      trained_fn: the same function for training, see `--remat`.
      params_0: parameters of the image encoder.
      identity: fingerprint of `params_0`.
      preprocess: preprocessing of images for evaluation.
      augment: augmentation of training samples.
      tasks: the tasks.
      control: the control task, if the script needs one.
      mesh: the devices.
      full: in a plan, the real model that this one replaces; otherwise None.
    """

    options: Options
    model: str
    apply_fn: Any
    trained_fn: Any
    params_0: dict
    identity: int
    preprocess: images.Preprocessing
    augment: pipeline.Augment
    tasks: list[Task]
    control: Task | None
    mesh: Mesh
    full: planning.Full | None = None

    @property
    def title(self) -> str:
        """The papers' name of the model."""
        return title_of(self.model)

    @property
    def required_control(self) -> Task:
        """The control task; raises a ValueError if there is none."""
        if self.control is None:
            check_control(self.options)
            raise ValueError(
                "this script has loaded no control task; call setups.load with "
                "control=True."
            )
        return self.control

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def by_task(self, accuracies: Numbers) -> dict[str, float]:
        """Returns accuracies `[T]` in percent, by the names of the tasks."""
        return {
            name: 100 * float(value)
            for name, value in zip(self.names, accuracies, strict=True)
        }

    @property
    def titles(self) -> list[str]:
        return [task.title for task in self.tasks]


def load(options: Options, model: str, *, control: bool = True) -> Setup:
    """Loads a CLIP and the tasks, and makes or reads the heads.

    New heads are written to the bank. The first training makes the output folder.

    Args:
      options: options of the script.
      model: a folder, or an id of the Hugging Face Hub.
      control: whether the script uses the control task. If not, or with `--control
        none`, the control of the setup is None.

    Raises:
      ValueError: tasks are missing or wrong, and the message says how to get each; or
        the recipe, the batch size and the mesh do not fit each other.
      FileNotFoundError: the model does not exist.
    """
    mesh = sharding.make_mesh(options.mesh)
    found = raw_tasks.of_options(options, control)
    for task in found[: len(options.tasks)]:
        check_recipe(options, task, penalty=control, mesh=mesh)
    model = str(clip.TINY_CLIP) if options.smoke else model
    checkpoint = checkpoint_of(options, model)
    preprocess = images.Preprocessing.from_folder(checkpoint.folder)
    params_0 = tree.select(checkpoint.params, clip.IMAGE_ENCODER)
    head_files = [bank.vector_file(options.bank, model, "heads", t.name) for t in found]
    tasks = [
        prepared(task, head_of(task, checkpoint, file), preprocess, options)
        for task, file in zip(found, head_files, strict=True)
    ]
    full = full_of(options, model) if options.plan else None
    return Setup(
        options=options,
        model=model,
        apply_fn=clip.image_encoder(checkpoint.config),
        trained_fn=clip.image_encoder(checkpoint.config, remat=options.remat),
        params_0=sharding.shard(params_0, mesh),
        identity=fingerprint.combined(params_0),
        preprocess=preprocess,
        augment=sources.Augmented(
            images.Augmentation(preprocess.size, preprocess.mean, preprocess.std)
        ),
        tasks=tasks[: len(options.tasks)],
        control=tasks[-1] if len(tasks) > len(options.tasks) else None,
        mesh=mesh,
        full=full,
    )


def checkpoint_of(options: Options, model: str) -> clip.CLIP:
    """Loads a CLIP; in a plan the tiny one."""
    return clip.load(clip.TINY_CLIP if options.plan else model)


def full_of(options: Options, model: str) -> planning.Full:
    """Returns the model that a plan counts, from its sizes alone."""
    config = architectures.config_of(model)
    layout = tree.select(clip.layout(config), clip.IMAGE_ENCODER)
    size = config.vision.image_size
    image = jax.ShapeDtypeStruct((size, size, config.vision.num_channels), np.float32)
    return planning.Full(
        TITLES.get(model, Path(model).name),
        clip.image_encoder(config),
        clip.image_encoder(config, remat=options.remat),
        layout,
        {"image": image, "label": jax.ShapeDtypeStruct((), np.int32)},
    )


def check_recipe(options: Options, task: images.ImageTask, *, penalty: bool, mesh):
    """Checks that training on a task is possible, before models are downloaded.

    Raises:
      ValueError: the recipe, the data and the mesh do not fit each other.
    """
    config = dataclasses.replace(
        recipe_of(options, task.name, len(task.train)),
        linearized=penalty,
        penalty="cyclic" if penalty else None,
    )
    # As many tasks as the task axis has; `training.check` checks the real groups.
    count = mesh.shape["task"]
    own, others = [task.train] * count, [[task.train]] * count
    train.task_batches(own, config, seeds=[0] * count, others=others, mesh=mesh)


def each(
    options: Options, models: Sequence[str], *, control: bool = True
) -> Iterator[Setup]:
    """Yields the setup of each model in turn; a smoke run uses only the first."""
    if not models:
        raise ValueError("--models is empty; name at least one CLIP.")
    first, *others = models[:1] if options.smoke else models
    setup = load(options, first, control=control)
    for model in others:
        if not options.plan:
            hub.find(model)  # report a missing one before hours of training
    yield setup
    for model in others:
        yield load(options, model, control=control)


def rows(
    options: Models, rows_of: Callable[[Setup], list[dict]], *, control: bool = True
) -> list[dict]:
    """Returns the rows of all models in turn."""
    found = each(options, options.models, control=control)
    return [row for setup in found for row in rows_of(setup)]


def prepared(task: images.ImageTask, head, preprocess, options) -> Task:
    """Returns a task that is ready for training and evaluation."""

    return Task(
        task.name,
        raw_tasks.title_of(task.name),
        task.train,
        raw_tasks.identity_of(task),
        dataset(task.validation, head, preprocess, options),
        dataset(task.test, head, preprocess, options),
    )


def dataset(source, head, preprocess, options: Options) -> Dataset:
    """Returns a split that is ready for evaluation."""
    batches = pipeline.evaluation_stream(
        source,
        options.evaluation_batch,
        preprocess=sources.Preprocessed(preprocess),
        # Starting processes takes longer than reading a few images.
        workers=options.workers if len(source) > 1000 else 0,
    )
    size = sources.stands_for(source)
    return Dataset(source, size, batches, sources.labels(source), head)


def drawn(setup: Setup, split: Dataset, samples: int) -> Dataset:
    """Returns `samples` samples of a split, drawn with a fixed seed."""
    source = sources.limited(split.source, samples)
    return dataset(source, split.head, setup.preprocess, setup.options)


def head_of(task: images.ImageTask, checkpoint: clip.CLIP, file: Path) -> jax.Array:
    """Returns the zero-shot head of a task; reads it from the bank if it has it."""
    if planning.recorder():
        shape = (len(task.classes), checkpoint.config.projection_dim)
        return jax.random.normal(jax.random.key(0), shape)
    identity = {
        "prompts": json.dumps([list(task.classes), list(task.templates)]),
        "model": str(fingerprint.combined(checkpoint.params)),
    }
    saved, metadata = hub.load_tree(file) if file.exists() else ({}, {})
    # All processes must agree: one may look before another has saved the file.
    if not processes.anywhere(not identity.items() <= metadata.items()):
        return jax.numpy.asarray(saved["head"])
    head = clip.zero_shot_head(checkpoint, task.classes, task.templates)

    def save():
        file.parent.mkdir(parents=True, exist_ok=True)
        hub.save_tree(file, {"head": np.asarray(head)}, identity)

    processes.on_first(save)
    return head
