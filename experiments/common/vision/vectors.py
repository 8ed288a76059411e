"""The ways to train a task vector that the vision papers compare.

`vectors` takes them from the bank and trains what is missing.
"""

import dataclasses
import json
import sys
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common import bank, runs
from experiments.common.vision import options as vision
from jaxarith import (
    fingerprint,
    losses,
    sharding,
    task_vectors,
    tau_jp,
    train,
)
from jaxarith.models import clip, heads
from jaxarith.sharding import processes
from jaxarith.typing import Tree

Method = Literal[
    "nonlinear",
    "linear",
    "tau_jp_cyclic",
    "tau_jp_strict",
    "tau_jp_mixed",
    "tau_jp_incremental",
    "tau_jp_incremental_no_control",
    "linear_layers_1",
    "linear_layers_2",
    "linear_layers_3",
    "linear_layers_4",
    "gradient_ascent",
    "multi_task",
    "random",
]

# Jin et al. (2025), section 3: paradigms 1 to 4. "All linear layers in the attention
# module" is read as the residual block, for otherwise 3 would be 1 and 4 would be 2.
LINEAR_LAYERS = {
    "linear_layers_1": clip.ATTENTION_WEIGHTS,
    "linear_layers_2": r"vision_model/encoder/layers/\d+/self_attn/\w+_proj/.*",
    "linear_layers_3": clip.BLOCK_LINEAR_WEIGHTS,
    "linear_layers_4": r"vision_model/encoder/layers/\d+/(self_attn|mlp)/.*",
}


def is_linearized(method: str) -> bool:
    """Whether the vectors of a method belong to the tangent-space model."""
    return method in ("linear", "multi_task_linear") or method.startswith("tau_jp")


def recipe_of(setup: vision.Setup, method: str, task: vision.Task):
    """How a method trains on a task: a `TrainConfig`."""
    mode = None
    if method.startswith("tau_jp"):
        mode = method.removeprefix("tau_jp_")
        mode = mode if mode in tau_jp.MODES else "cyclic"
    return dataclasses.replace(
        vision.recipe_of(setup.options, task),
        linearized=is_linearized(method),
        penalty=mode,
        trained=LINEAR_LAYERS.get(method, ".*"),
    )


def others_of(setup: vision.Setup, method: str, task: vision.Task) -> list[vision.Task]:
    """T_orth: the tasks that the τJp penalty keeps as they were, the control last.

    The incremental variants know of the tasks that come before.
    """
    index = setup.names.index(task.name)
    before, after = setup.tasks[:index], setup.tasks[index + 1 :]
    incremental = method.startswith("tau_jp_incremental")
    known = before + ([] if incremental else after)
    has_control = setup.control is not None and not method.endswith("no_control")
    return known + ([setup.control] if has_control else [])


def vectors(setup: vision.Setup, method: Method) -> list[Tree]:
    """The task vectors of a method, in the order of the tasks; of multi-task learning
    one.

    Raises:
      ValueError: the bank holds a vector of another configuration.
    """
    if method == "multi_task":
        return [joint_vector(setup)]
    if method == "random":
        return random_vectors(setup)
    return of_tasks(setup, method, setup.tasks)


def of_tasks(
    setup: vision.Setup, method: str, tasks: Sequence[vision.Task]
) -> list[Tree]:
    """The vectors of some of the tasks."""
    others = [
        others_of(setup, method, task) if method.startswith("tau_jp") else []
        for task in tasks
    ]
    recipes = [
        recipe_of(setup, method, task)
        if theirs
        # The first task of an increment without a control has nothing to keep.
        else dataclasses.replace(recipe_of(setup, method, task), penalty=None)
        for task, theirs in zip(tasks, others, strict=True)
    ]
    return trained(setup, method, tasks, recipes, others)


def trained(
    setup: vision.Setup,
    method: str,
    tasks: Sequence[vision.Task],
    recipes: Sequence[train.TrainConfig],
    others: Sequence[Sequence[vision.Task]],
    *,
    start: Sequence[Tree] | None = None,
    snapshots: int | Sequence[Collection[int]] | None = None,
) -> list[Tree]:
    """Task vectors from the bank, on the host; those that are missing are trained.

    Args:
      setup: the model.
      method: the folder in the bank; "gradient_ascent" negates the loss.
      tasks: what is trained on.
      recipes: of every task.
      others: T_orth of every task.
      start: vectors to continue from, of every task.
      snapshots: every so many steps the vectors are also added to the bank, as the
        method `<method>/step_<number>`; or, of every task, after which steps.
    """
    files = [file_of(setup, method, task.name) for task in tasks]
    configurations = [
        configuration(setup, method, [task], config, theirs, start and start[i])
        for i, (task, config, theirs) in enumerate(
            zip(tasks, recipes, others, strict=True)
        )
    ]
    found = [bank.read(*pair) for pair in zip(files, configurations, strict=True)]
    missing = [i for i, tau in enumerate(found) if tau is None]
    for group in groups(missing, recipes, setup.options.tasks_together):

        def snapshot(done, taus, group=group):
            for i, tau in zip(group, taus, strict=True):
                if not isinstance(snapshots, int) and done not in snapshots[i]:
                    continue
                name = f"{method}/step_{done:04d}"
                add(setup, name, tasks[i].name, tau, configurations[i], {"steps": done})

        members = [tasks[i] for i in group]
        taus, metrics = run(
            setup,
            method,
            [task.name for task in members],
            train.task_batches(
                [task.train for task in members],
                recipes[group[0]],
                others=[[other.train for other in others[i]] for i in group],
                augment=setup.augment,
                mesh=setup.mesh,
                seeds=[seed_of(setup.options, task) for task in members],
            ),
            recipes[group[0]],
            heads.pad([task.test.head for task in members]),
            start=start and [start[i] for i in group],
            observe=snapshots and snapshot,
            observe_every=(
                set().union(*(snapshots[i] for i in group))
                if isinstance(snapshots, Sequence)
                else snapshots or 1
            ),
        )
        for i, tau, own in zip(group, taus, metrics, strict=True):
            found[i] = add(setup, method, tasks[i].name, tau, configurations[i], own)
        names = [task.name for task in members]
        runs.remove_checkpoints(setup.options, checkpoints(setup, method, names))
    return found


def seed_of(options: vision.Options, task: vision.Task) -> int:
    """The seed of a task's samples, whichever tasks are trained beside it."""
    return train.seed_of(task.name, options.seed)


def groups(missing, recipes, together):
    """Tasks that can train side by side: those of one recipe."""
    if not together:
        return [[i] for i in missing]
    found: dict = {}
    for i in missing:
        found.setdefault(recipes[i], []).append(i)
    return list(found.values())


def joint_vector(setup: vision.Setup) -> Tree:
    """The vector of multi-task learning: one encoder, all tasks, their own heads.

    A step takes a batch of every task, as the code of Yoshida et al. (2025) does with
    32 samples four times over. Its learning rate is as good as constant after the
    warm-up, for its schedule is that of 1000 epochs; so is ours with `--protocol code`.
    """
    config = joint_recipe(setup)
    if setup.options.protocol == "code":
        config = dataclasses.replace(config, decay="constant")
    return trained_jointly(setup, "multi_task", "joint", setup.tasks, config)


def cluster_vector(
    setup: vision.Setup, tasks: Sequence[vision.Task], *, linearized: bool = False
) -> Tree:
    """The vector of joint training on a cluster of tasks; of one task its own vector.

    Zeng et al. (2025), C.5: the hyperparameters are those of a single task, and the
    epochs are the sum of the members', so that "the total training time spent on all
    data points" is that of training apart. A step takes a batch of every member here,
    and there are as many steps as for one task in the paper's protocol: every sample is
    seen as often as where its task is trained alone by it.

    Args:
      setup: the model.
      tasks: the members, in the order of the setup.
      linearized: train the tangent-space model.
    """
    if len(tasks) == 1:
        return of_tasks(setup, "linear" if linearized else "nonlinear", tasks)[0]
    config = dataclasses.replace(joint_recipe(setup), linearized=linearized)
    method = "multi_task_linear" if linearized else "multi_task"
    name = "-".join(task.name for task in tasks)
    return trained_jointly(setup, method, name, tasks, config)


def joint_recipe(setup: vision.Setup) -> train.TrainConfig:
    """The recipe of training on several tasks at once.

    The number of steps is that of the papers with all protocols, for the epochs of the
    code protocol are those of one task.
    """
    options = dataclasses.replace(setup.options, protocol="paper")
    config = vision.recipe_of(options, setup.tasks[0])
    if setup.options.protocol == "code":  # 500 of 2000
        config = dataclasses.replace(config, warmup_steps=config.steps // 4)
    return config


def trained_jointly(
    setup: vision.Setup,
    method: str,
    name: str,
    tasks: Sequence[vision.Task],
    config: train.TrainConfig,
) -> Tree:
    """One vector of several tasks from the bank; it is trained where it is missing."""
    file = file_of(setup, method, name)
    identity = configuration(setup, method, tasks, config, [])
    found = bank.read(file, identity)
    if found is None:
        padded = heads.pad([task.test.head for task in tasks])
        [tau], [metrics] = run(
            setup,
            method,
            [name],
            train.joint_batches(
                [task.train for task in tasks],
                config,
                seeds=[seed_of(setup.options, task) for task in tasks],
                augment=setup.augment,
                mesh=setup.mesh,
            ),
            config,
            {key: leaf[None] for key, leaf in padded.items()},
        )
        found = add(setup, method, name, tau, identity, metrics)
        folder = checkpoints(setup, method, [name])
        runs.remove_checkpoints(setup.options, folder)
    return found


def random_vectors(setup: vision.Setup) -> list[Tree]:
    """Gaussian directions with the norms of the ordinary vectors in every leaf."""
    key = jax.random.key(setup.options.seed)
    return [
        task_vectors.random_like(
            jax.random.fold_in(key, zlib.crc32(task.name.encode())), tau
        )
        for task, tau in zip(setup.tasks, vectors(setup, "nonlinear"), strict=True)
    ]


def run(
    setup,
    method,
    names,
    batches,
    config,
    constants,
    start=None,
    observe=None,
    observe_every=1,
):
    """Trains; returns vectors on the host, and plain metrics of every name."""
    folder = checkpoints(setup, method, names)
    place = folder.relative_to(runs.checkpoints(setup.options)).as_posix()
    log = setup.options.out / f"train_{place.replace('/', '_')}.jsonl"
    tqdm.write(f"{setup.model}, {method}: {', '.join(names)}", file=sys.stderr)
    taus = train.fine_tune(
        setup.apply_fn,
        setup.params_0,
        LOSSES.get(method, loss),
        batches,
        config,
        names=names,
        constants=constants,
        log=log,
        mesh=setup.mesh,
        checkpoints=folder if setup.options.save_every else None,
        save_every=setup.options.save_every,
        workers=setup.options.workers,
        start=start,
        observe=observe,
        observe_every=observe_every,
    )
    metrics = [{}] * len(names)
    if runs.is_first():  # which has written the log
        last = json.loads(log.read_text().splitlines()[-1])
        metrics = [
            {name: last[name][task] for name in ("loss", "penalty") if name in last}
            for task in names
        ]
    return sharding.to_host(taus), metrics


def checkpoints(setup, method, names):
    """Where a training keeps its checkpoints, until its vectors are in the bank."""
    place = f"{setup.title}_{method}_{runs.joined(names)}"
    return runs.checkpoints(setup.options) / place


def loss(features, batch, constants) -> jax.Array:
    """Cross-entropy below the frozen head."""
    scores = heads.logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def ascent(features, batch, constants) -> jax.Array:
    """Ilharco et al. (2023), App. B.2: the same training, away from the optimum."""
    return -loss(features, batch, constants)


def joint(features, batch, constants) -> jax.Array:
    """The mean over the samples of all tasks, each below the head of its own."""
    of_heads = jax.vmap(lambda head, valid: heads.logits(head, features, valid))
    scores = of_heads(constants["head"], constants["valid"])  # [T, B, C]
    own = scores[batch["task"], jnp.arange(len(features))]
    return losses.cross_entropy(own, batch["label"])


LOSSES: dict[str, Callable] = {
    "gradient_ascent": ascent,
    "multi_task": joint,
    "multi_task_linear": joint,
}


def configuration(setup, method, tasks, config, others, start=None) -> dict:
    """What a vector depends on, as plain data."""
    return {
        "method": method,
        "recipe": bank.plain_recipe(config),
        "tasks": {task.name: task.identity for task in tasks},
        "others": {task.name: task.identity for task in others},
        "heads": [fingerprint.combined(np.asarray(task.test.head)) for task in tasks],
        "params_0": setup.identity,
        **({} if start is None else {"start": fingerprint.combined(start)}),
    }


def file_of(setup, method, task):
    return bank.vector_file(setup.options.bank, setup.model, method, task)


def add(setup, method, task, tau, identity, metrics):
    tau = sharding.to_host(tau)
    file = file_of(setup, method, task)
    processes.on_first(lambda: bank.write(file, tau, identity, metrics))
    return tau
