"""Options of the scripts on CLIP, and the training recipe that follows from them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiments.common import curvatures, runs
from jaxarith import train
from jaxarith.data import vision

B32 = "openai/clip-vit-base-patch32"
B16 = "openai/clip-vit-base-patch16"
L14 = "openai/clip-vit-large-patch14"
TITLES = {B32: "ViT-B-32", B16: "ViT-B-16", L14: "ViT-L-14"}
MODELS = tuple(TITLES)


def title_of(model: str) -> str:
    """Returns the papers' name of a model, which may be a folder; else its own name."""
    name = Path(model).name
    known = {Path(model).name: title for model, title in TITLES.items()}
    return known.get(name, name)


# The value of --control for no control task.
NO_CONTROL = "none"
# Tasks of a smoke run; the last is its control task.
SMOKE = ("mnist", "mnist_rotated", "uci_digits", "inverted_digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(curvatures.Options, runs.Banked, runs.Planned):
    """Options of all scripts on CLIP."""

    tasks: tuple[str, ...] = vision.EIGHT
    """The tasks, in order: names of jaxarith data check, or NAME=FOLDER with images in
    FOLDER/<split>/<class>/."""
    tasks_file: Path | None = None
    """A text file with one task per line, instead of --tasks; # begins a comment."""
    control: str = "imagenet"
    """The control task: a name or NAME=FOLDER, as for --tasks; none for no control. The
    penalty protects its outputs and those of the other tasks."""
    data_dir: Path | None = None
    """Folder of prepared TFDS data sets and of plain image folders."""
    source: Literal["tfds", "hub", "folder", "small"] | None = None
    """Source of the tasks; by default the first one that is found. `small` selects the
    small tasks of the quickstart, which need no data and have names of their own: for
    example --tasks mnist uci_digits --control small_letters."""
    protocol: Literal["paper", "code"] = "paper"
    """The recipe of the papers (2000 steps, squared τJp) or that of their public code
    (epochs, longer warm-up, τJp not squared)."""
    steps: int | None = None
    """Optimizer steps; by default those of the protocol."""
    batch_size: int = 128
    learning_rate: float = 1e-5
    penalty_coef: float | None = None
    """Weight λ of the τJp penalty. By default 0.1 for the norm, as in the paper's code,
    and 0.01 for its square; experiments.curvature.choose_coef chooses a better one."""
    penalty_power: Literal[1, 2] | None = None
    """Power of the τJp norm; by default that of the protocol."""
    diagonal_coef: float = 1.0
    """Weight of the penalty that uses only the diagonal of the curvature."""
    delta_coef: float = 0.05
    """Weight of DELTA's curvature penalty."""
    distill_coef: float = 0.01
    """Weight of DELTA's distillation. The authors' code uses 1 for features of norm 1;
    for features of squared norm n that is 1 / n here."""
    micro_batches: int = 1
    """Number of parts of a batch that are computed one after another. More parts need
    less memory."""
    remat: bool = False
    """Compute every block of the model again in backward passes. A step needs less
    memory, and up to a fifth more time in the tangent space, a third more for the
    network."""
    product_dtype: train.ProductDtype | None = None
    """Round the operands of tangent products, to bfloat16 on accelerators, which is
    faster. Only for training in the tangent space. The bank treats vectors with another
    dtype as different vectors."""
    tasks_together: bool = True
    """Train all tasks with one recipe side by side. For each task the devices then hold
    three times the parameters of the encoder: 29 GB for eight tasks of ViT-L-14.
    --no-tasks-together needs the memory of one task, with the same result. The code
    protocol has another number of steps for every task, so it always trains them one by
    one."""
    samples: int | None = None
    """Largest number of samples of a split, drawn at random; by default all."""
    evaluation_batch: int = 128
    """Number of images in a batch of an evaluation."""
    workers: int = 8
    """Number of processes that read and augment images; 0 for threads."""
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.tasks_file is None:
            return
        if self.tasks != type(self).tasks:
            raise ValueError("--tasks and --tasks-file are both given; give only one.")
        object.__setattr__(self, "tasks", tasks_in(self.tasks_file))
        object.__setattr__(self, "tasks_file", None)  # copies may have other tasks


def tasks_in(file: Path) -> tuple[str, ...]:
    """Reads tasks from a text file, one a line; skips comments and empty lines.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file has no task.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    tasks = tuple(filter(None, (line.partition("#")[0].strip() for line in lines)))
    if not tasks:
        raise ValueError(
            f"{file} has no task; write one per line, a name or NAME=FOLDER."
        )
    return tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(Options):
    """Options of scripts on one CLIP."""

    model: str = B32
    """A CLIP: a folder, or an id of the Hugging Face Hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeModel(OneModel):
    """Options of scripts on one CLIP, by default the largest."""

    model: str = L14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Options):
    """Options of scripts on several CLIPs."""

    models: tuple[str, ...] = MODELS
    """CLIPs: folders, or ids of the Hugging Face Hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded(Models):
    """Options of tables that support several seeds."""

    seeds: int = 1
    """Number of seeds that train side by side, starting at --seed; the table has the
    mean of every number and its sample standard deviation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Seeded):
    """Options of tables that add task vectors."""

    save_merged: bool = False
    """Write the best of all merged networks to --out, with the heads of the tasks.
    transformers loads the folder (0.6 GB for ViT-B-32, 1.7 GB for ViT-L-14)."""

    def __post_init__(self):
        super().__post_init__()
        if self.save_merged and self.seeds > 1:
            raise ValueError(
                f"--save-merged writes the model of one seed, and --seeds is "
                f"{self.seeds}. Run it again with --seeds 1: the bank then has the "
                "vectors of the first seed."
            )


C = TypeVar("C", bound=Options)


def smoke(options: C, **small: Any) -> C:
    """Returns the options; in a smoke run with small values, and those of `small`."""
    common: dict[str, Any] = {"tasks": SMOKE[:-1], "control": SMOKE[-1], "steps": 3}
    common |= {"protocol": "paper", "learning_rate": 1e-3, "batch_size": 8}
    common |= {"samples": 32, "evaluation_batch": 32, "workers": 0}
    common |= {"curvature_samples": 8, "curvature_rank": 2}
    return runs.smaller(options, **common | small)


def started(options: C, **small: Any) -> C:
    """Returns `smoke(options, ...)`; joins the processes and checks the folder."""
    options = smoke(options, **small)
    runs.start(options)
    return options


def check_control(options: Options) -> None:
    """Raises a ValueError if there is no control task, for scripts that need one."""
    if options.control == NO_CONTROL:
        raise ValueError(
            f"--control {NO_CONTROL}: this script needs the accuracy or the curvature "
            "of a control task. Name one, for example imagenet or NAME=FOLDER."
        )


def tau_jp_coef(options: Options) -> float:
    """Returns the weight λ of τJp: the given one, or the default for its power.

    The paper tries 0.001, 0.01 and 0.1. For the square 0.1 is too large: with it the
    sum of three tasks of the tiny CLIP had an accuracy of 0.683 after 80 steps, with
    0.01 0.752 and with 0.001 0.762 (normalised 0.959, 0.956 and 0.935).
    """
    if options.penalty_coef is not None:
        return options.penalty_coef
    power = options.penalty_power or (1 if options.protocol == "code" else 2)
    return 0.1 if power == 1 else 0.01


def recipe_of(options: Options, name: str, samples: int) -> train.TrainConfig:
    """Returns the recipe of the protocol for a task, changed by the options.

    Args:
      options: options of the script.
      name: name of the task.
      samples: number of its training samples.

    Raises:
      ValueError: the code protocol states no epochs for this task.
    """
    config = train.paper()
    if options.protocol == "code":
        epochs = vision.TASKS[name].epochs if name in vision.TASKS else None
        if epochs is None:
            raise ValueError(
                f"the code protocol states no epochs for {name}; use --protocol paper."
            )
        config = train.code(samples, epochs, options.batch_size)
    steps = options.steps or config.steps
    return dataclasses.replace(
        config,
        steps=steps,
        warmup_steps=config.warmup * steps // config.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        penalty_coef=tau_jp_coef(options),
        penalty_power=options.penalty_power or config.penalty_power,
        penalty_batch_size=max(options.batch_size // 8, 1),
        micro_batches=options.micro_batches,
        seed=options.seed,
    )
