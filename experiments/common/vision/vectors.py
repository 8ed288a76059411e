"""Trains task vectors by all methods that the vision papers compare.

`vectors` reads them from the bank, and trains those that are missing.
"""

import dataclasses
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.common import bank, planning, runs, training
from experiments.common.vision import (
    curved,
    objectives,
    options,
    planned,
    seeds,
    setups,
)
from jaxarith import fingerprint, task_vectors, tau_jp, train
from jaxarith.models import clip, heads
from jaxarith.typing import Tree

# The keys of `curved.KINDS`.
Curved = Literal[
    "curvature",
    "curvature_nearest",
    "curvature_each",
    "curvature_shared",
    "curvature_diagonal",
    "attention_curvature",
    "delta",
]
Method = Literal[
    "nonlinear",
    "linear",
    "tau_jp_cyclic",
    "tau_jp_strict",
    "tau_jp_mixed",
    "tau_jp_incremental",
    "tau_jp_incremental_no_control",
    Curved,
    "linear_layers_1",
    "linear_layers_2",
    "linear_layers_3",
    "linear_layers_4",
    "gradient_ascent",
    "multi_task",
    "random",
]

# Linear-layers paper, section 3: paradigms 1 to 4. "All linear layers in the attention
# module" must mean the residual block: otherwise 3 would equal 1, and 4 would equal 2.
LINEAR_LAYERS = {
    "linear_layers_1": clip.ATTENTION_WEIGHTS,
    "linear_layers_2": r"vision_model/encoder/layers/\d+/self_attn/\w+_proj/.*",
    "linear_layers_3": clip.BLOCK_LINEAR_WEIGHTS,
    "linear_layers_4": r"vision_model/encoder/layers/\d+/(self_attn|mlp)/.*",
}
# The parameters that a method trains, if it does not train all of them.
TRAINED = LINEAR_LAYERS | {"attention_curvature": clip.ATTENTION_WEIGHTS}


def is_linearized(method: str) -> bool:
    """Returns whether the vectors of a method belong to the tangent-space model."""
    if method in ("attention_curvature", "delta"):  # delta keeps the student
        return False
    return method in ("linear", "multi_task_linear") or is_penalised(method)


def is_penalised(method: str) -> bool:
    """Returns whether a method uses other tasks, by samples or by curvature."""
    return method.startswith("tau_jp") or method in curved.KINDS


def coef_option(method: str) -> str:
    """Returns the name of the option for the weight λ of a method's penalty."""
    own = {"curvature_diagonal": "diagonal_coef", "delta": "delta_coef"}
    default = "curvature_coef" if method in curved.KINDS else "penalty_coef"
    return own.get(method, default)


def coef_of(config: options.Options, method: str) -> float:
    """Returns the weight λ of a method's penalty."""
    found = getattr(config, coef_option(method))
    return options.tau_jp_coef(config) if found is None else found


def recipe_of(setup: setups.Setup, method: str, task: setups.Task):
    """Returns the recipe of a method on a task, a `TrainConfig`."""
    distill = train.Distill(coef=setup.options.distill_coef)
    tangents = is_linearized(method) or method == "delta"
    penalty: dict[str, Any] = {"penalty": None}
    if method.startswith("tau_jp"):
        mode = method.removeprefix("tau_jp_")
        penalty["penalty"] = mode if mode in tau_jp.MODES else "cyclic"
        if mode == "strict" and setup.options.protocol == "paper":
            # Eq. 10 of the τJp paper sums over the other tasks; its code averages.
            count = len(others_of(setup, method, task))
            penalty["penalty_coef"] = count * coef_of(setup.options, method)
    elif kind := curved.KINDS.get(method):
        penalty = {
            "penalty": "kronecker" if kind.sharing else "diagonal",
            "penalty_coef": coef_of(setup.options, method),
            # Fixed values: these options of τJp do not change curvature vectors.
            "penalty_power": 1,
            "penalty_batch_size": 1,
        }
    return dataclasses.replace(
        options.recipe_of(setup.options, task.name, len(task.train)),
        linearized=is_linearized(method),
        distill=distill if method == "delta" else None,
        product_dtype=setup.options.product_dtype if tangents else None,
        trained=TRAINED.get(method, ".*"),
        **penalty,
    )


def others_of(setup: setups.Setup, method: str, task: setups.Task) -> list[setups.Task]:
    """Returns T_orth: the tasks that the penalty protects, the control last.

    The incremental variants protect only earlier tasks. A shared curvature covers all
    tasks; for DELTA it covers only the control.

    Raises:
      ValueError: the method needs other tasks, and this task has none.
    """
    index = setup.names.index(task.name)
    before, after = setup.tasks[:index], setup.tasks[index + 1 :]
    incremental = method.startswith("tau_jp_incremental")
    known = before + ([] if incremental else after)
    if kind := curved.KINDS.get(method):
        if kind.of == "control":
            return [setup.required_control]
        known = known if kind.of == "others" else list(setup.tasks)
    if setup.control is not None and not method.endswith("no_control"):
        known = [*known, setup.control]
    if not known and not incremental:
        raise ValueError(
            f"{method} protects other tasks, but {task.name} has no others. Name more "
            "--tasks, or a --control."
        )
    return known


def vectors(setup: setups.Setup, method: Method) -> list[Tree]:
    """Returns the vectors of a method in the order of the tasks; for multi-task one.

    Raises:
      ValueError: the bank has a vector with another configuration.
    """
    if method == "multi_task":
        return [joint_vector(setup)]
    if method == "random":
        return random_vectors(setup)
    return of_tasks(setup, method, setup.tasks)


def of_tasks(
    setup: setups.Setup,
    method: str,
    tasks: Sequence[setups.Task],
    *,
    folder: str | None = None,
    kind: curved.Kind | None = None,
) -> list[Tree]:
    """Returns the vectors of some of the tasks.

    Args:
      setup: the model. With several seeds, the vectors of all seeds train together, and
        those of the first seed are returned.
      method: the training method.
      tasks: the tasks.
      folder: folder in the bank; by default that of the method. For a method with a
        penalty it is the folder of the candidate with the same weight, if it exists.
      kind: how curvature is measured and merged, for a method with curvature.
    """
    given = (method, tasks, folder, kind or curved.KINDS.get(method))
    wanted = [one for own in seeds.setups(setup) for one in _wanted(own, *given)]
    return trained(setup, method, wanted)[: len(tasks)]


def _wanted(setup, method, tasks, folder, kind) -> list[training.Wanted]:
    penalised = is_penalised(method)
    known = [others_of(setup, method, task) if penalised else [] for task in tasks]
    given = curved.functions(setup, kind, known) if kind else [None] * len(tasks)
    wanted = []
    for task, others, curvature in zip(tasks, known, given, strict=True):
        recipe = recipe_of(setup, method, task)
        if not others:
            # Without a control, the first incremental task has nothing to protect.
            recipe = dataclasses.replace(recipe, penalty=None)
        one = wanted_of(
            setup, folder or folder_of(setup, method, task), task, recipe, others
        )
        if kind and others:
            measured = {"curvature": curved.identity(setup, kind)}
            one = one._replace(
                others={}, identity=one.identity | measured, curvature=curvature
            )
        wanted.append(one)
    return wanted


def candidate(method: str, coef: float) -> str:
    """Returns the folder in the bank for a method with a certain weight λ.

    Example:
      >>> candidate("tau_jp_cyclic", 0.01)
      'tau_jp_cyclic_coef_0.01'
    """
    return f"{method}_coef_{coef:g}"


def folder_of(setup: setups.Setup, method: str, task: setups.Task) -> str:
    """Returns the folder of a method's vectors; it may be a candidate's folder."""
    if is_penalised(method):
        own = candidate(method, coef_of(setup.options, method))
        if file_of(setup, own, task.name).exists():
            return own
    return method


def wanted_of(
    setup: setups.Setup,
    method: str,
    task: setups.Task,
    recipe: train.TrainConfig,
    others: Sequence[setups.Task] = (),
    *,
    start: Tree | None = None,
    observed: Collection[int] = (),
) -> training.Wanted:
    """Describes a task vector that is to be read or trained.

    Args:
      setup: the model.
      method: the folder in the bank.
      task: the task to train on.
      recipe: the recipe.
      others: the tasks that the penalty protects, T_orth.
      start: a vector to continue from.
      observed: numbers of steps after which the vector is also added to the bank, as
        the method `<method>/step_<number>`.
    """
    return training.Wanted(
        name=task.name,
        file=file_of(setup, method, task.name),
        recipe=recipe,
        identity=identity(setup, method, [task], others)
        | ({} if start is None else {"start": fingerprint.combined(start)}),
        source=task.train,
        others={other.name: other.train for other in others},
        head=task.test.head,
        start=start,
        observed=observed,
    )


def trained(
    setup: setups.Setup, method: str, wanted: Sequence[training.Wanted]
) -> list[Tree]:
    """Returns task vectors on the host; trains those that the bank lacks.

    Args:
      setup: the model.
      method: the folder in the bank; "gradient_ascent" negates the loss.
      wanted: descriptions from `wanted_of`.
    """

    if setup.full:
        return planned.vectors(setup, network(setup, method), method, wanted)

    def observe(one: training.Wanted, done: int, tau: Tree):
        file = snapshot_file(one, done)
        training.add(file, tau, training.identity(one), {"steps": done})

    own, together = network(setup, method), None
    if not setup.options.tasks_together:
        together = 1
    elif len({one.curvature for one in wanted}) > 1:
        together = curved.room(setup, curved.KINDS[method])
    training.check(own, wanted, together)
    runs.claim(setup.options)  # only now: a run with mistakes must write nothing
    return training.vectors(
        setup.options, own, wanted, together=together, observe=observe
    )


def snapshot_file(wanted: training.Wanted, steps: int) -> Path:
    """Returns the path in the bank of a vector after some of its steps."""
    folder = wanted.file.parent / f"step_{steps:04d}"
    return folder / wanted.file.name


def snapshot(wanted: training.Wanted, steps: int) -> Tree:
    """Reads a vector after some of its steps from the bank.

    Raises:
      ValueError: the vector was trained with other snapshots, or with another
        configuration.
    """
    if record := planning.recorder():
        return record.made[wanted.file]
    tau = bank.read(snapshot_file(wanted, steps), training.identity(wanted))
    if tau is None:
        raise ValueError(
            f"the bank has {wanted.file}, but no snapshot of it after {steps} steps: "
            "it was trained with other snapshots. Remove it to train it again."
        )
    return tau


def network(setup: setups.Setup, method: str) -> training.Network:
    """Returns the image encoder below frozen heads, with the loss of a method."""
    return training.Network(
        title=f"{setup.title}_{method}",
        apply_fn=setup.trained_fn,
        params_0=setup.params_0,
        loss=objectives.LOSSES.get(method, objectives.loss),
        mesh=setup.mesh,
        augment=setup.augment,
        stacked=heads.pad,
        workers=setup.options.workers,
    )


def joint_vector(setup: setups.Setup) -> Tree:
    """Returns the multi-task vector: one encoder for all tasks, each with its head.

    A step takes a batch of every task. The code of the τJp paper does the same, with 32
    samples four times over. Its learning rate is almost constant after the warm-up,
    because its schedule is made for 1000 epochs; ours is constant with `--protocol
    code`.
    """
    config = joint_recipe(setup)
    if setup.options.protocol == "code":
        config = dataclasses.replace(config, decay="constant")
    return trained_jointly(setup, "multi_task", "joint", setup.tasks, config)


def cluster_vector(
    setup: setups.Setup, tasks: Sequence[setups.Task], *, linearized: bool = False
) -> Tree:
    """Returns the vector of joint training on a cluster of tasks.

    For a single task it is the task's own vector. The hyperparameters are those of a
    single task. The epochs are the sum over the members, so that "the total training
    time spent on all data points" is that of separate training (bases paper, C.5). So
    there are as many steps as for all members separately. Each step takes one batch,
    with equally many samples of every member.

    Args:
      setup: the model.
      tasks: the members, in the order of the setup.
      linearized: train the tangent-space model.
    """
    if len(tasks) == 1:
        return of_tasks(setup, "linear" if linearized else "nonlinear", tasks)[0]
    config, count = joint_recipe(setup), len(tasks)
    config = dataclasses.replace(
        config,
        steps=count * config.steps,
        warmup_steps=count * config.warmup,
        batch_size=-(-config.batch_size // count),
        linearized=linearized,
        product_dtype=setup.options.product_dtype if linearized else None,
    )
    method = "multi_task_linear" if linearized else "multi_task"
    name = "-".join(task.name for task in tasks)
    return trained_jointly(setup, method, name, tasks, config)


def joint_recipe(setup: setups.Setup) -> train.TrainConfig:
    """Returns the recipe for joint training on several tasks.

    All protocols use the papers' number of steps: the code protocol states epochs for
    single tasks only.
    """
    config = dataclasses.replace(setup.options, protocol="paper")
    first = setup.tasks[0]
    config = options.recipe_of(config, first.name, len(first.train))
    if setup.options.protocol == "code":  # 500 of 2000
        config = dataclasses.replace(config, warmup_steps=config.steps // 4)
    return config


def trained_jointly(
    setup: setups.Setup,
    method: str,
    name: str,
    tasks: Sequence[setups.Task],
    recipe: train.TrainConfig,
) -> Tree:
    """Returns one vector for several tasks; trains it if the bank lacks it."""
    members = [wanted_of(setup, method, task, recipe) for task in tasks]
    wanted = members[0]._replace(
        name=name,
        file=file_of(setup, method, name),
        identity=identity(setup, method, tasks),
    )
    if setup.full:
        [tau] = planned.vectors(
            setup, network(setup, method), method, [wanted], joint=members
        )
        return tau
    runs.claim(setup.options)
    return training.joint_vector(setup.options, network(setup, method), wanted, members)


def random_vectors(setup: setups.Setup) -> list[Tree]:
    """Returns random vectors; each leaf has the norm of the ordinary vector's leaf."""
    key = jax.random.key(setup.options.seed)
    return [
        task_vectors.random_like(
            jax.random.fold_in(key, zlib.crc32(task.name.encode())), tau
        )
        for task, tau in zip(setup.tasks, vectors(setup, "nonlinear"), strict=True)
    ]


def identity(
    setup: setups.Setup,
    method: str,
    tasks: Sequence[setups.Task],
    others: Sequence[setups.Task] = (),
) -> dict[str, Any]:
    """Returns everything a vector depends on besides its recipe, as plain data."""
    return {
        "method": method,
        "tasks": {task.name: task.identity for task in tasks},
        "others": {task.name: task.identity for task in others},
        "heads": [fingerprint.combined(np.asarray(task.test.head)) for task in tasks],
        "params_0": setup.identity,
    }


def file_of(setup: setups.Setup, method: str, task: str) -> Path:
    """Returns the path in the bank for the vector of a task."""
    folder = method + seeds.suffix(setup.options.seed)
    return bank.vector_file(setup.options.bank, setup.model, folder, task)
