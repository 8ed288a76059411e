"""What the scripts of the vision papers share: options, tasks, and a loaded CLIP.

The tasks are those of `jaxarith.data.vision`, with the splits and prompts of the
papers, or plain image folders. A smoke run takes the tiny CLIP and three tasks of the
quickstart.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, curvatures, runs, script
from experiments.common.vision import small_tasks, sources
from jaxarith import fingerprint, hub, metrics, sharding, train, tree
from jaxarith.data import images, pipeline, vision
from jaxarith.models import clip, heads
from jaxarith.sharding import processes
from jaxarith.typing import Numbers

B32 = "openai/clip-vit-base-patch32"
B16 = "openai/clip-vit-base-patch16"
L14 = "openai/clip-vit-large-patch14"
TITLES = {B32: "ViT-B-32", B16: "ViT-B-16", L14: "ViT-L-14"}
MODELS = tuple(TITLES)
# What --control says for no control task.
NO_CONTROL = "none"
# Of a smoke run; the last is its control task.
SMOKE = ("mnist", "mnist_rotated", "uci_digits", "inverted_digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(curvatures.Options, runs.Banked):
    """The options that all scripts on CLIP have."""

    tasks: tuple[str, ...] = vision.EIGHT
    """The tasks, in order: names of jaxarith data check, or NAME=FOLDER with images in
    FOLDER/<split>/<class>/."""
    control: str = "imagenet"
    """The control task, which the penalty keeps as it was besides the other tasks: a
    name or NAME=FOLDER, as for --tasks; none for no control."""
    data_dir: Path | None = None
    """Folder of prepared TFDS data sets and of plain image folders."""
    source: Literal["tfds", "hub", "folder", "small"] | None = None
    """Where the tasks come from; the first that is found by default. `small` are the
    small tasks of the quickstart, which need no data; they have names of their own, as
    in --tasks mnist uci_digits --control small_letters."""
    protocol: Literal["paper", "code"] = "paper"
    """The recipe as the papers print it (2000 steps, squared τJp) or as their public
    code has it (epochs, longer warm-up, τJp not squared)."""
    steps: int | None = None
    """Optimizer steps; those of the protocol by default."""
    batch_size: int = 128
    learning_rate: float = 1e-5
    penalty_coef: float = 0.1
    """Weight λ of the τJp penalty."""
    penalty_power: Literal[1, 2] | None = None
    """Of the τJp norm; that of the protocol by default."""
    diagonal_coef: float = 1.0
    """Weight of the penalty of the diagonal of curvature alone."""
    delta_coef: float = 0.05
    """Weight of the penalty of curvature of DELTA."""
    distill_coef: float = 0.01
    """Weight of the distillation of DELTA. The 1 of the authors' code, whose features
    have norm 1, is 1 / n here, of features of squared norm n."""
    micro_batches: int = 1
    """Parts of a batch that are computed one after another, where memory is short."""
    tasks_together: bool = True
    """Train all tasks of one recipe side by side, for each of which the devices hold
    three times the parameters of the encoder: of eight tasks of ViT-L-14 29 GB.
    --no-tasks-together needs the memory of one, with the same result. The code protocol
    has another number of steps for every task, and so trains one by one anyway."""
    samples: int | None = None
    """The largest number of samples of a split, drawn at random; all by default."""
    evaluation_batch: int = 128
    workers: int = 8
    """Processes that read and augment images; 0 for threads."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(Options):
    """The options of scripts on one CLIP."""

    model: str = B32
    """A CLIP: a folder, or an id of the Hugging Face Hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeModel(OneModel):
    """The options of scripts on one CLIP, by default the largest."""

    model: str = L14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Options):
    """The options of scripts on several CLIPs."""

    models: tuple[str, ...] = MODELS
    """CLIPs: folders, or ids of the Hugging Face Hub."""


C = TypeVar("C", bound=Options)


def smoke(options: C, **small: Any) -> C:
    """The options; in a smoke run those of all scripts on CLIP, and `small`."""
    common: dict[str, Any] = {"tasks": SMOKE[:-1], "control": SMOKE[-1], "steps": 3}
    common |= {"protocol": "paper", "learning_rate": 1e-3, "batch_size": 8}
    common |= {"samples": 32, "evaluation_batch": 32, "workers": 0}
    common |= {"curvature_samples": 8, "curvature_rank": 2}
    return runs.smaller(options, **common | small)


def started(options: C, **small: Any) -> C:
    """The options as of `smoke`; joins processes, checks the folder."""
    options = smoke(options, **small)
    runs.start(options)
    return options


class Dataset(NamedTuple):
    """One split of one task: batches, labels, and the frozen head.

    Attributes:
      source: of raw images.
      batches: of preprocessed images, made anew in every pass.
      labels: `i32[N]`.
      head: `[C, D]`.
    """

    source: Any
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
      options: of the script.
      model: its name in the bank.
      apply_fn: `apply_fn(params, images) -> features[B, D]`, what is linearised.
      params_0: of the image encoder.
      identity: a fingerprint of them.
      preprocess: of images that are evaluated.
      augment: of training samples.
      tasks: the tasks.
      control: the control task, if the script needs one.
      mesh: the devices.
    """

    options: Options
    model: str
    apply_fn: Any
    params_0: dict
    identity: int
    preprocess: images.Preprocessing
    augment: pipeline.Augment
    tasks: list[Task]
    control: Task | None
    mesh: Mesh

    @property
    def title(self) -> str:
        """What the papers call the model."""
        name = Path(self.model).name  # a folder may hold one of the papers' too
        known = {Path(model).name: title for model, title in TITLES.items()}
        return known.get(name, name)

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


def check_control(options: Options) -> None:
    """Raises a ValueError without a control task, for a script that measures it."""
    if options.control == NO_CONTROL:
        raise ValueError(
            f"--control {NO_CONTROL}: this needs the accuracy or the curvature of a "
            "control task. Name one, such as imagenet or NAME=FOLDER."
        )


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
    found = image_tasks(options, control)
    for task in found[: len(options.tasks)]:
        check_recipe(options, task, penalty=control, mesh=mesh)
    model = str(clip.TINY_CLIP) if options.smoke else model
    checkpoint = clip.load(model)
    preprocess = images.Preprocessing.from_folder(checkpoint.folder)
    params_0 = tree.select(checkpoint.params, clip.IMAGE_ENCODER)
    head_files = [bank.vector_file(options.bank, model, "heads", t.name) for t in found]
    tasks = [
        prepared(task, head_of(task, checkpoint, file), preprocess, options)
        for task, file in zip(found, head_files, strict=True)
    ]
    return Setup(
        options=options,
        model=model,
        apply_fn=clip.image_encoder(checkpoint.config),
        params_0=sharding.shard(params_0, mesh),
        identity=fingerprint.combined(params_0),
        preprocess=preprocess,
        augment=sources.Augmented(
            images.Augmentation(preprocess.size, preprocess.mean, preprocess.std)
        ),
        tasks=tasks[: len(options.tasks)],
        control=tasks[-1] if len(tasks) > len(options.tasks) else None,
        mesh=mesh,
    )


def image_tasks(options: Options, control: bool) -> list[images.ImageTask]:
    """The tasks as raw images, the control last; all problems are one error."""
    control = control and options.control != NO_CONTROL
    specs = [*options.tasks, *([options.control] if control else [])]
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"every task, control included, once; got {specs}.")
    errors = (FileNotFoundError, ValueError)

    def read(spec):
        try:
            return image_task(spec, options)
        except errors as error:
            if not control or spec != options.control:
                raise
            raise ValueError(
                f"{error}\nIt is the control task: --control names another one, and "
                f"--control {NO_CONTROL} does without."
            ) from error

    return script.collected(specs, read, errors=errors)


def check_recipe(options: Options, task: images.ImageTask, *, penalty: bool, mesh):
    """Raises the ValueErrors of training on a task, before models are downloaded."""
    config = dataclasses.replace(
        recipe_of(options, task),
        linearized=penalty,
        penalty="cyclic" if penalty else None,
    )
    # As many as a task axis asks for; `training.check` sees which train side by side.
    count = mesh.shape["task"]
    own, others = [task.train] * count, [[task.train]] * count
    train.task_batches(own, config, seeds=[0] * count, others=others, mesh=mesh)


def setups(
    options: Options, models: Sequence[str], *, control: bool = True
) -> Iterator[Setup]:
    """The setup of each model in turn; of a smoke run the first."""
    if not models:
        raise ValueError("no --models; name at least one CLIP.")
    first, *others = models[:1] if options.smoke else models
    setup = load(options, first, control=control)
    for model in others:
        hub.find(model)  # before hours of training of the first
    yield setup
    for model in others:
        yield load(options, model, control=control)


def rows(
    options: Models, rows_of: Callable[[Setup], list[dict]], *, control: bool = True
) -> list[dict]:
    """The rows of all models in turn."""
    found = setups(options, options.models, control=control)
    return [row for setup in found for row in rows_of(setup)]


def image_task(spec: str, options: Options) -> images.ImageTask:
    """A task of raw images by its name, or by `NAME=FOLDER`."""
    name, equals, folder = spec.partition("=")
    if options.smoke:
        task = small_tasks.load(name, np.asarray)
    elif equals:
        task = vision.load_folder(name, Path(folder))
    elif options.source == "small":
        task = small_tasks.load(name, np.asarray)
    else:
        task = vision.load(name, options.data_dir, source=options.source)
    if options.samples is None:
        return task
    splits = {
        split: sources.limited(getattr(task, split), options.samples)
        for split in ("train", "validation", "test")
    }
    return dataclasses.replace(task, **splits)


def prepared(task: images.ImageTask, head, preprocess, options) -> Task:
    """A task that is ready to be trained and evaluated."""

    return Task(
        task.name,
        vision.TASKS[task.name].title if task.name in vision.TASKS else task.name,
        task.train,
        identity_of(task),
        dataset(task.validation, head, preprocess, options),
        dataset(task.test, head, preprocess, options),
    )


def identity_of(task: images.ImageTask) -> dict:
    """The number and origin of a task's training samples, a checksum of their labels.

    TFDS reads whole samples to find their labels, and has one set of each name.
    """
    identity = {"samples": len(task.train), "source": task.origin}
    if task.origin != "tfds":
        identity["labels"] = zlib.crc32(sources.labels(task.train).tobytes())
    return identity


def dataset(source, head, preprocess, options: Options) -> Dataset:
    """A split that is ready to be evaluated."""
    batches = pipeline.evaluation_stream(
        source,
        options.evaluation_batch,
        preprocess=sources.Preprocessed(preprocess),
        # Starting processes takes longer than to read a few images.
        workers=options.workers if len(source) > 1000 else 0,
    )
    return Dataset(source, batches, sources.labels(source), head)


def drawn(setup: Setup, split: Dataset, samples: int) -> Dataset:
    """So many samples of a split, drawn with a fixed seed."""
    source = sources.limited(split.source, samples)
    return dataset(source, split.head, setup.preprocess, setup.options)


def head_of(task: images.ImageTask, checkpoint: clip.CLIP, file: Path) -> jax.Array:
    """The zero-shot head of a task, from the bank if it is there."""
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


def recipe_of(options: Options, task: Task | images.ImageTask) -> train.TrainConfig:
    """The recipe of the protocol for a task, with what the options change."""
    config = train.paper()
    if options.protocol == "code":
        epochs = vision.TASKS[task.name].epochs if task.name in vision.TASKS else None
        if epochs is None:
            raise ValueError(
                f"the code protocol states no epochs for {task.name}; use --protocol "
                "paper."
            )
        config = train.code(len(task.train), epochs, options.batch_size)
    steps = options.steps or config.steps
    return dataclasses.replace(
        config,
        steps=steps,
        warmup_steps=config.warmup * steps // config.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        penalty_coef=options.penalty_coef,
        penalty_power=options.penalty_power or config.penalty_power,
        penalty_batch_size=max(options.batch_size // 8, 1),
        micro_batches=options.micro_batches,
        seed=options.seed,
    )


def means(values: Numbers) -> float:
    """The mean in percent, as the papers print it."""
    return 100 * float(np.mean(values))
