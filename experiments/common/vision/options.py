"""The options of the scripts of the vision papers, and the recipe that they make."""

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
    """What the papers call a model, also where it is in a folder; else its name."""
    name = Path(model).name
    known = {Path(model).name: title for model, title in TITLES.items()}
    return known.get(name, name)


# What --control says for no control task.
NO_CONTROL = "none"
# Of a smoke run; the last is its control task.
SMOKE = ("mnist", "mnist_rotated", "uci_digits", "inverted_digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(curvatures.Options, runs.Banked, runs.Planned):
    """The options that all scripts on CLIP have."""

    tasks: tuple[str, ...] = vision.EIGHT
    """The tasks, in order: names of jaxarith data check, or NAME=FOLDER with images in
    FOLDER/<split>/<class>/."""
    tasks_file: Path | None = None
    """A text file in place of --tasks, with one task a line; # begins a comment."""
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
    penalty_coef: float | None = None
    """Weight λ of the τJp penalty. By default 0.1 of the norm, as in the paper's code,
    and 0.01 of its square; experiments.curvature.choose_coef chooses it."""
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
    remat: bool = False
    """Compute every block of the model anew in backward passes: less memory, and of a
    step up to a fifth more time in the tangent space, a third more of the network."""
    product_dtype: train.ProductDtype | None = None
    """Round the operands of tangent products, to bfloat16 on accelerators: faster, and
    part of what tells vectors apart. Of training in the tangent space alone."""
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

    def __post_init__(self):
        super().__post_init__()
        if self.tasks_file is None:
            return
        if self.tasks != type(self).tasks:
            raise ValueError("--tasks and --tasks-file: give one of them.")
        object.__setattr__(self, "tasks", tasks_in(self.tasks_file))
        object.__setattr__(self, "tasks_file", None)  # copies may have other tasks


def tasks_in(file: Path) -> tuple[str, ...]:
    """The tasks of a text file, one a line, without comments and empty lines.

    Raises:
      OSError: it cannot be read.
      ValueError: it has no task.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    tasks = tuple(filter(None, (line.partition("#")[0].strip() for line in lines)))
    if not tasks:
        raise ValueError(
            f"{file} has no task; write one a line, a name or NAME=FOLDER."
        )
    return tasks


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded(Models):
    """The options of tables that several seeds can make."""

    seeds: int = 1
    """How many seeds, from --seed on, train side by side; the table has the mean of
    every number and its sample standard deviation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Seeded):
    """The options of tables that add task vectors."""

    save_merged: bool = False
    """Write the best of all merged networks to --out, as a folder that transformers
    loads (0.6 GB of ViT-B-32, 1.7 GB of ViT-L-14), with the heads of the tasks."""

    def __post_init__(self):
        super().__post_init__()
        if self.save_merged and self.seeds > 1:
            raise ValueError(
                "--save-merged writes the model of one seed: run it with --seeds 1. "
                "The bank then has the vectors of the first."
            )


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


def check_control(options: Options) -> None:
    """Raises a ValueError without a control task, for a script that measures it."""
    if options.control == NO_CONTROL:
        raise ValueError(
            f"--control {NO_CONTROL}: this needs the accuracy or the curvature of a "
            "control task. Name one, such as imagenet or NAME=FOLDER."
        )


def tau_jp_coef(options: Options) -> float:
    """The weight λ of τJp, as given or the default of its power.

    Of the weights 0.001, 0.01 and 0.1 of the paper, 0.1 is too much for the square:
    with it the sum of three tasks of the tiny CLIP had 0.683 after 80 steps, with 0.01
    0.752 and with 0.001 0.762 (normalised 0.959, 0.956 and 0.935).
    """
    if options.penalty_coef is not None:
        return options.penalty_coef
    power = options.penalty_power or (1 if options.protocol == "code" else 2)
    return 0.1 if power == 1 else 0.01


def recipe_of(options: Options, name: str, samples: int) -> train.TrainConfig:
    """The recipe of the protocol for a task, with what the options change.

    Args:
      options: options of the script.
      name: name of the task.
      samples: number of its training samples.
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
