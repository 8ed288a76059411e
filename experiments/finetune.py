"""Fine-tunes a CLIP on a task and adds the task vector to the bank.

    python -m experiments.finetune --model openai/clip-vit-base-patch32 --task dtd \\
        --method linear --data-dir DATA
    python -m experiments.finetune --task svhn --method tau_jp_continued \\
        --start bank/openai--clip-vit-base-patch32/linear/svhn.safetensors \\
        --others eurosat --data-dir DATA
    python -m experiments.finetune --task mnist --method nonlinear --smoke

The methods:

    nonlinear              all parameters of the image encoder. If its vectors are
                           evaluated in the tangent space, that is post-hoc
                           linearisation
    linear                 the tangent-space model (Ortiz-Jimenez et al. 2023)
    tau_jp_cyclic, _strict, _mixed
                           linear, with the τJp penalty on images of the other tasks
                           (τJp paper, Eq. 11 and Eq. 10; mixed is ours)
    tau_jp_incremental     cyclic, on the earlier tasks of --tasks only
    curvature, _nearest, _each, _shared, _diagonal
                           linear, with the curvature of the other tasks instead of
                           their images. The curvatures are merged by their mean, merged
                           to the nearest Kronecker product, or not merged; or one
                           curvature for all tasks is shared; or only the diagonal is
                           used (Porrello et al. 2026; the factors are ours)
    attention_curvature    nonlinear, only the weights of attention, with the curvature
                           of the other tasks (linear-layers paper with Porrello et al.)
    delta                  nonlinear, distilled from a linear model that trains beside
                           it, both with the curvature of the control (Sommariva et al.
                           2026)
    tau_jp_continued       cyclic, starting from an existing vector, --start
    linear_layers_1 … _4   only linear layers of the blocks (linear-layers paper):
                           1: weights of attention; 2: with biases; 3: weights of
                           attention and MLP; 4: with biases
    gradient_ascent        nonlinear, with the loss negated (editing paper)
    multi_task             one vector for all --tasks, trained together
    random                 Gaussian, with the norms of the nonlinear vector

The following trains nothing. The vector is the fine-tuned checkpoint minus --model, and
has the method `nonlinear`:

    python -m experiments.finetune --from tanganke/clip-vit-base-patch32_dtd --task dtd

The checkpoint may be in OpenCLIP's format or in that of transformers, also with the
image tower alone. All scripts use such a vector from the bank instead of training one,
and their tables name it.

This script prints the accuracies of the pre-trained and of the fine-tuned model on
validation and test data. The bank stores them beside the configuration.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.common import bank, external, runs, script
from experiments.common.vision import (
    image_encoders,
    options,
    raw_tasks,
    scores,
    setups,
    vectors,
)
from jaxarith import hub, report
from jaxarith.typing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    """Fine-tune a CLIP on a task."""

    out: Path = Path("runs/finetune")
    """Folder for checkpoints and logs, with a subfolder for every training; the vector
    is written to --bank."""
    task: str
    """The task to train on: one of --tasks, or NAME=FOLDER, which need not be in
    --tasks. multi_task trains on all --tasks."""
    method: Literal[vectors.Method, "tau_jp_continued"] = "nonlinear"
    """How to train: ordinary (nonlinear); in the tangent space (linear), also with the
    τJp penalty (tau_jp_…) or the curvature of the other tasks (curvature…); ordinary
    and distilled from a linear model (delta); only linear layers (linear_layers_1 to
    _4); with the loss negated (gradient_ascent); on all --tasks at once (multi_task);
    or not at all (random). See the top of this page."""
    others: tuple[str, ...] | None = None
    """The tasks that tau_jp_continued protects, each one of --tasks or NAME=FOLDER; by
    default the other --tasks and the control."""
    start: Path | None = None
    """The task vector that tau_jp_continued starts from."""
    checkpoint: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A checkpoint that others have fine-tuned on --task, instead of training: a
    folder, an id of the Hugging Face Hub, or a file of OpenCLIP."""


@script.full_precision
def main(config: Config) -> dict:
    """Fine-tunes; returns the accuracies."""
    if (config.start is None) == (config.method == "tau_jp_continued"):
        raise ValueError(
            "--start and --method tau_jp_continued need each other: give both or none."
        )
    if config.others is not None and config.start is None:
        raise ValueError("--others works only with --method tau_jp_continued.")
    if config.checkpoint is not None and config.method != image_encoders.METHOD:
        raise ValueError(
            f"--from adds a vector with --method {image_encoders.METHOD}, not "
            f"{config.method}. Leave --method out."
        )
    # Read first: if this vector cannot be read, nothing must be written.
    start = config.start and hub.load_tree(config.start)[0]
    config, control = needed(options.smoke(config))
    runs.start(config)
    setup = setups.load(config, config.model, control=control)
    by_name = {task.name: task for task in setup.tasks}
    task = by_name[raw_tasks.name_of(config.task)]
    if config.checkpoint is not None:
        tau = from_outside(setup, task, config.checkpoint)
    elif config.method == "tau_jp_continued":
        if config.others is None:
            others = vectors.others_of(setup, config.method, task)
        else:
            others = [by_name[raw_tasks.name_of(spec)] for spec in config.others]
        recipe = vectors.recipe_of(setup, config.method, task)
        wanted = vectors.wanted_of(
            setup, config.method, task, recipe, others, start=start
        )
        [tau] = vectors.trained(setup, config.method, [wanted])
    elif config.method == "multi_task":
        [tau] = vectors.vectors(setup, config.method)
    elif config.method == "random":
        [tau] = vectors.random_vectors(setup._replace(tasks=[task]))
    else:
        [tau] = vectors.of_tasks(setup, config.method, [task])
    linearized = vectors.is_linearized(config.method)
    accuracies = {
        f"{task.name}, {split}": dict(
            zip(
                ("pre-trained", "fine-tuned"),
                scores.accuracies(
                    setup, [tau], getattr(task, split), linearized, [[0.0], [1.0]]
                ).tolist(),
                strict=True,
            )
        )
        for task in (setup.tasks if config.method == "multi_task" else [task])
        for split in ("validation", "test")
    }
    name = "joint" if config.method == "multi_task" else task.name
    file = vectors.file_of(setup, config.method, name)
    if runs.is_first() and not config.plan:
        if config.method == "random":
            bank.write(file, tau, {"seed": config.seed, "like": "nonlinear"}, {})
        bank.add_metrics(file, {"accuracy": accuracies})
        rows = [[where, *found.values()] for where, found in accuracies.items()]
        header = ["accuracy", "pre-trained", "fine-tuned"]
        parts = [report.markdown_table(header, rows), runs.external(config.out), file]
        print("\n" + "\n\n".join(str(part) for part in parts if part))
    return accuracies


def from_outside(setup: setups.Setup, task: setups.Task, model: str) -> Tree:
    """Adds the task vector of a checkpoint that others have fine-tuned to the bank.

    Raises:
      ValueError: see `image_encoders.load`; or the bank has another vector with this
        name.
    """
    found = image_encoders.load(setup, task, model)
    file = vectors.file_of(setup, image_encoders.METHOD, task.name)
    external.check_place(file, found)
    runs.claim(setup.options)
    return external.add(file, found)


def needed(config: Config) -> tuple[Config, bool]:
    """Returns the options with the tasks that the method needs.

    Also returns whether the method needs a control task.

    Raises:
      ValueError: a task of --task or --others is not in --tasks, and has no folder.
    """
    known = {raw_tasks.name_of(spec): spec for spec in config.tasks}
    own = _spec("--task", config.task, known)
    if config.others is not None:
        wanted = [own, *(_spec("--others", other, known) for other in config.others)]
    elif config.method == "multi_task" or vectors.is_penalised(config.method):
        # Their order sets the samples of a penalty; the trained task comes last.
        wanted = list((known | {raw_tasks.name_of(own): own}).values())
    else:
        wanted = [own]
    how = config.method if config.checkpoint is None else bank.EXTERNAL
    place = "_".join([Path(config.model).name, how, raw_tasks.name_of(own)])
    control = vectors.is_penalised(config.method) and config.others is None
    options = {"tasks": tuple(wanted), "out": config.out / place}
    return dataclasses.replace(config, **options), control


def _spec(option: str, spec: str, known: dict[str, str]) -> str:
    """Returns the task that an option names, as NAME or NAME=FOLDER."""
    name = raw_tasks.name_of(spec)
    if name not in known and spec == name:
        raise ValueError(
            f"{option} {name} is not among --tasks {', '.join(known)}. Add it to "
            f"--tasks, or give its folder of images, {option} {name}=FOLDER."
        )
    found = known.get(name, spec)
    if spec not in (name, found):
        raise ValueError(
            f"{option} {spec} and --tasks {found} are two tasks with the same name; "
            "rename one."
        )
    return found


if __name__ == "__main__":
    script.run(Config, main)
