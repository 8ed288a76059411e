"""A loaded CLIP and the tasks, ready to train and to evaluate.

The heads are zero-shot, made once and kept in the bank.
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
      size: number of samples; in a plan that of the split, of which a few are here.
      batches: preprocessed images, made anew in every pass.
      labels: `i32[N]`.
      head: `[C, D]`.
    """

    source: Any
    size: int
    batches: pipeline.Stream
    labels: np.ndarray
    head: jax.Array

    def predict(self, features) -> np.ndarray:
        """The predicted labels of features `[N, D]`."""
        return np.asarray(heads.logits(self.head, features)).argmax(-1)

    def accuracy(self, features) -> float:
        return metrics.accuracy(heads.logits(self.head, features), self.labels)


class Task(NamedTuple):
    """A task.

    Attributes:
      name: in the bank.
      title: what the papers call it.
      train: the source of training samples.
      identity: what tells its training samples from others, as plain data.
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
      model: its name in the bank.
      apply_fn: `apply_fn(params, images) -> features[B, D]`, what is linearised.
      trained_fn: the same as training computes it, see `--remat`.
      params_0: parameters of the image encoder.
      identity: a fingerprint of them.
      preprocess: preprocessing of images that are evaluated.
      augment: augmentation of training samples.
      tasks: the tasks.
      control: the control task, if the script needs one.
      mesh: the devices.
      full: in a plan the model that this one stands for; None where it is that itself.
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
        """What the papers call the model."""
        return title_of(self.model)

    @property
    def required_control(self) -> Task:
        """The control task of a script that measures it, see `check_control`."""
        if self.control is None:
            check_control(self.options)
            raise ValueError("this script has loaded no control task.")
        return self.control

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def by_task(self, accuracies: Numbers) -> dict[str, float]:
        """Accuracies `[T]` in percent by the names of the tasks."""
        return {
            name: 100 * float(value)
            for name, value in zip(self.names, accuracies, strict=True)
        }

    @property
    def titles(self) -> list[str]:
        return [task.title for task in self.tasks]


def load(options: Options, model: str, *, control: bool = True) -> Setup:
    """Loads a CLIP and the tasks, and makes or reads the heads.

    The heads go to the bank; the output folder is made by the first training.

    Args:
      options: the script's options.
      model: a folder, or an id of the Hugging Face Hub.
      control: whether the script has a use for the control task; without it, and with
        `--control none`, the setup's is None.

    Raises:
      ValueError: tasks are missing or wrong, and the message says of each how to get
        it; or the recipe, the batch and the mesh do not go together.
      FileNotFoundError: there is no such model.
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
    """A CLIP; in a plan the tiny one."""
    return clip.load(clip.TINY_CLIP if options.plan else model)


def full_of(options: Options, model: str) -> planning.Full:
    """What a plan counts, from the sizes of a model alone."""
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
    """Raises the ValueErrors of training on a task, before models are downloaded."""
    config = dataclasses.replace(
        recipe_of(options, task.name, len(task.train)),
        linearized=penalty,
        penalty="cyclic" if penalty else None,
    )
    # As many as a task axis asks for; `training.check` sees which train side by side.
    count = mesh.shape["task"]
    own, others = [task.train] * count, [[task.train]] * count
    train.task_batches(own, config, seeds=[0] * count, others=others, mesh=mesh)


def each(
    options: Options, models: Sequence[str], *, control: bool = True
) -> Iterator[Setup]:
    """The setup of each model in turn; of a smoke run the first."""
    if not models:
        raise ValueError("no --models; name at least one CLIP.")
    first, *others = models[:1] if options.smoke else models
    setup = load(options, first, control=control)
    for model in others:
        if not options.plan:
            hub.find(model)  # before hours of training of the first
    yield setup
    for model in others:
        yield load(options, model, control=control)


def rows(
    options: Models, rows_of: Callable[[Setup], list[dict]], *, control: bool = True
) -> list[dict]:
    """The rows of all models in turn."""
    found = each(options, options.models, control=control)
    return [row for setup in found for row in rows_of(setup)]


def prepared(task: images.ImageTask, head, preprocess, options) -> Task:
    """A task that is ready to be trained and evaluated."""

    return Task(
        task.name,
        raw_tasks.title_of(task.name),
        task.train,
        raw_tasks.identity_of(task),
        dataset(task.validation, head, preprocess, options),
        dataset(task.test, head, preprocess, options),
    )


def dataset(source, head, preprocess, options: Options) -> Dataset:
    """A split that is ready to be evaluated."""
    batches = pipeline.evaluation_stream(
        source,
        options.evaluation_batch,
        preprocess=sources.Preprocessed(preprocess),
        # Starting processes takes longer than to read a few images.
        workers=options.workers if len(source) > 1000 else 0,
    )
    size = sources.stands_for(source)
    return Dataset(source, size, batches, sources.labels(source), head)


def drawn(setup: Setup, split: Dataset, samples: int) -> Dataset:
    """So many samples of a split, drawn with a fixed seed."""
    source = sources.limited(split.source, samples)
    return dataset(source, split.head, setup.preprocess, setup.options)


def head_of(task: images.ImageTask, checkpoint: clip.CLIP, file: Path) -> jax.Array:
    """The zero-shot head of a task, from the bank if it is there."""
    if planning.recorder():
        shape = (len(task.classes), checkpoint.config.projection_dim)
        return jax.random.normal(jax.random.key(0), shape)
    identity = {
        "prompts": json.dumps([list(task.classes), list(task.templates)]),
        "model": str(fingerprint.combined(checkpoint.params)),
    }
    saved, metadata = hub.load_tree(file) if file.exists() else ({}, {})
    # Unanimous: one process may have looked before another has saved.
    if not processes.anywhere(not identity.items() <= metadata.items()):
        return jax.numpy.asarray(saved["head"])
    head = clip.zero_shot_head(checkpoint, task.classes, task.templates)

    def save():
        file.parent.mkdir(parents=True, exist_ok=True)
        hub.save_tree(file, {"head": np.asarray(head)}, identity)

    processes.on_first(save)
    return head
