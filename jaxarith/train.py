r"""Fine-tuning of one or several tasks, ordinary or in the tangent space.

The state of a task is its task vector, not the parameters: nothing is lost to rounding
in :math:`\theta_0 + \tau`. Weight decay pulls :math:`\theta_0 + \tau`, not
:math:`\tau`, towards zero, as AdamW on the parameters does.

Tasks train side by side along a leading task axis, with one compilation. The recipe is
that of Ilharco et al. (2023) and Ortiz-Jimenez et al. (2023): AdamW, warm-up and
cosine, gradients clipped to norm 1.

On a mesh of devices (`sharding`) they share every batch, hold parts of the state, or
train different tasks. A run with checkpoints stops at a signal and goes on where it
stopped, to the same bits.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxarith import (
    checkpoint,
    fingerprint,
    interrupts,
    report,
    sharding,
    tangent,
    task_vectors,
    tau_jp,
    tree,
)
from jaxarith.data import pipeline

# loss(outputs, batch, constants) -> scalar; constants are what a task keeps fixed,
# such as its head.
LossFn = Callable[[tree.Tree, dict, tree.Tree], jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How task vectors are trained; the defaults are the papers' for CLIP.

    Attributes:
      steps: optimizer steps.
      warmup_steps: steps of linear warm-up; a half cosine to zero follows.
      batch_size: samples per step and task.
      learning_rate: the largest.
      weight_decay: AdamW's, of all trained leaves, towards zero.
      clip_norm: the largest Euclidean norm of a task's gradient.
      linearized: train the tangent-space model instead of the network.
      penalty: add the τJp penalty, in one of `tau_jp.MODES`.
      penalty_coef: its weight λ (Yoshida et al. 2025: 0.1 with power 1).
      penalty_power: 1 (the code of Yoshida et al.) or 2 (as they print it).
      penalty_batch_size: penalty samples per step; in strict mode per other task.
      trained: pattern of the paths that are trained; the rest is frozen.
      product_dtype: what the operands of tangent products are rounded to, such as
        "bfloat16" on accelerators; None leaves them as they are.
      tasks_at_once: how many tasks a device computes at the same time. More fill a
        large accelerator; 1 needs the least memory and is the fastest on a CPU.
      micro_batches: into how many parts a batch is cut, which are computed one after
        another (gradient accumulation). The step is the same, in less memory, if the
        loss is a mean over samples; a mean over the tokens that count is taken of
        every part, and so weighs texts by those of their part.
      seed: of the order of samples and of penalty draws.
    """

    steps: int = 2000
    warmup_steps: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    linearized: bool = False
    penalty: str | None = None
    penalty_coef: float = 0.1
    penalty_power: int = 1
    penalty_batch_size: int = 16
    trained: str = ".*"
    product_dtype: str | None = None
    tasks_at_once: int = 1
    micro_batches: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.penalty is not None and self.penalty not in tau_jp.MODES:
            raise ValueError(
                f"unknown penalty mode {self.penalty!r}; the modes are "
                f"{', '.join(tau_jp.MODES)}."
            )
        if self.penalty is not None and not self.linearized:
            raise ValueError("the τJp penalty needs linearized=True.")
        if self.product_dtype is not None and not self.linearized:
            raise ValueError(
                "product_dtype rounds tangent products; it needs linearized=True."
            )
        if self.product_dtype not in (None, "bfloat16", "float16", "float32"):
            raise ValueError(
                f"product_dtype is {self.product_dtype!r}; it is bfloat16, float16, "
                "float32 or None."
            )
        sizes = ("steps", "batch_size", "penalty_batch_size", "tasks_at_once")
        for name in (*sizes, "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; at least 1 is needed."
                )
        if self.penalty_power not in (1, 2):
            raise ValueError(f"penalty_power is {self.penalty_power}; it is 1 or 2.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up steps of {self.steps} steps; the warm-up "
                "must be shorter than the training."
            )


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate of step s ≥ 0: warm-up `(s + 1) / W`, then a half cosine."""

    def learning_rate(step):
        warmup = (step + 1) / max(config.warmup_steps, 1)
        progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        factor = jnp.where(step < config.warmup_steps, warmup, cosine)
        return config.learning_rate * factor

    return learning_rate


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping and AdamW with PyTorch's defaults, as `config` states them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config), weight_decay=config.weight_decay),
    )


def objective(
    apply_fn: tangent.ApplyFn,
    loss_fn: LossFn,
    config: TrainConfig,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    mesh: Mesh | None = None,
):
    """What training minimises, `(tau, params_0, batch, constants) -> (total, metrics)`.

    `batch` holds the fields named by `inputs`, what `loss_fn` reads and, with a
    penalty, `"penalty"`: a dict of the same input fields for samples of other tasks,
    and of `penalty_mask`, which `fine_tune` explains. The devices of `mesh`, by default
    one, share the samples.
    """
    mesh = mesh or sharding.one_device()
    apply_fn = sharding.on_mesh(apply_fn, mesh)

    def total(tau, params_0, batch, constants):
        task_inputs = tuple(batch[name] for name in inputs)
        penalty = 0.0
        if config.penalty:
            others = batch["penalty"]
            if penalty_mask is not None and penalty_mask not in others:
                raise ValueError(
                    f"penalty_mask is {penalty_mask!r}; the penalty samples have "
                    f"{', '.join(others)}. Name it in the inputs of task_batches."
                )
            outputs, penalty = tau_jp.linearized_and_penalty(
                apply_fn,
                params_0,
                tau,
                task_inputs,
                tuple(others[name] for name in inputs),
                mask=None if penalty_mask is None else others[penalty_mask] != 0,
                power=config.penalty_power,
                product_dtype=config.product_dtype,
                shards=sharding.batch_shards(mesh),
            )
        elif config.linearized:
            f0, moved = tangent.jvp(
                apply_fn,
                params_0,
                tau,
                *task_inputs,
                product_dtype=config.product_dtype,
            )
            outputs = jax.tree.map(jnp.add, f0, moved)
        else:
            outputs = apply_fn(task_vectors.apply(params_0, tau), *task_inputs)
        loss = loss_fn(outputs, batch, constants)
        metrics = {"loss": loss}
        if config.penalty:
            metrics["penalty"] = penalty
        return loss + config.penalty_coef * penalty, metrics

    return total


def make_step(objective_fn, config: TrainConfig, mesh: Mesh | None = None):
    """One optimizer step of all tasks, jitted.

    Args:
      objective_fn: from `objective`, of the same mesh.
      config: the recipe.
      mesh: the devices, see `sharding`; by default one.

    Returns:
      `step(state, params_0, batch, constants) -> (state, metrics)`. `state` is
      `(taus, opt_state)`; it, `batch` and `constants` have a leading task axis, and so
      have the metrics: those of the objective, `[T]`, and `"gradient_norms"`, `[T, L]`,
      of the L trained leaves in the order of `tree.flatten`. The state that is passed
      in is given up: its buffers are reused.
    """
    mesh = mesh or sharding.one_device()
    update = optimizer(config).update

    def part(*args):
        grads, metrics = jax.grad(objective_fn, has_aux=True)(*args)
        return sharding.pin(grads, mesh), metrics

    def gradient(tau, params_0, batch, constants):
        if config.micro_batches == 1:
            return part(tau, params_0, batch, constants)
        parts = _micro_batches(batch, config.micro_batches, mesh)

        def add(total, batch):
            found = part(tau, params_0, batch, constants)
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(part, tau, params_0, first, constants)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / config.micro_batches, total)

    def task_step(params_0, state, batch, constants):
        tau, opt_state = state
        grads, metrics = gradient(tau, params_0, batch, constants)
        norms = [optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)]
        metrics["gradient_norms"] = jnp.stack(norms)
        start = tree.restrict(params_0, tree.flatten(tau))
        params = jax.tree.map(jnp.add, start, tau)
        updates, opt_state = update(grads, opt_state, params)
        return (optax.apply_updates(tau, updates), opt_state), metrics

    def own_tasks(state, params_0, batch, constants):
        return jax.lax.map(
            lambda task: task_step(params_0, *task),
            (state, batch, constants),
            # `map` of one at a time is a loop; in batches of one it would be a `vmap`.
            batch_size=config.tasks_at_once if config.tasks_at_once > 1 else None,
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params_0, batch, constants):
        all_tasks = own_tasks
        if mesh.shape["task"] > 1:
            all_tasks = jax.shard_map(
                own_tasks,
                mesh=mesh,
                in_specs=(P("task"), P(), P("task"), P("task")),
                out_specs=P("task"),
                axis_names={"task"},
                check_vma=False,
            )
        state, metrics = all_tasks(state, params_0, batch, constants)
        # Not pinned, the state might come out elsewhere, and every step be compiled.
        return sharding.pin(state, mesh, tasks=True), sharding.constrain(
            metrics, mesh, P()
        )

    return step


def _micro_batches(batch, count, mesh):
    """`[B, ...]` to `[count, B / count, ...]`, of every device its own samples."""
    shards = sharding.batch_shards(mesh)

    def cut(leaf):
        parts = leaf.reshape(shards, count, -1, *leaf.shape[1:])
        return jnp.swapaxes(parts, 0, 1).reshape(count, -1, *leaf.shape[1:])

    return jax.tree.map(cut, batch)


def init_state(
    params_0: tree.Tree, config: TrainConfig, tasks: int, mesh: Mesh | None = None
):
    """Zero task vectors and fresh optimizer states, with a leading task axis."""
    mesh = mesh or sharding.one_device()
    trained = tree.select(tree.floating(params_0), config.trained)

    def init():
        taus = jax.tree.map(
            lambda leaf: jnp.zeros((tasks, *jnp.shape(leaf)), jnp.float32), trained
        )
        return taus, jax.vmap(optimizer(config).init)(taus)

    places = sharding.shardings(jax.eval_shape(init), mesh, tasks=True)
    return jax.jit(init, out_shardings=places)()


def task_batches(
    sources: Sequence,
    config: TrainConfig,
    *,
    others: Sequence[Sequence] | None = None,
    inputs: Sequence[str] = ("image",),
    mesh: Mesh | None = None,
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
      mesh: the devices, see `sharding`; by default one.

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
    seeds = itertools.count(10_000 * config.seed)
    own = [pipeline.shuffled(source, next(seeds)) for source in sources]
    foreign = [[pipeline.shuffled(s, next(seeds)) for s in group] for group in others]
    local_tasks = sharding.local_rows(len(sources), mesh, "task")

    def local(count):
        parts = sharding.batch_shards(mesh) * config.micro_batches
        if count % parts:
            raise ValueError(
                f"{count} samples of a step cannot be cut into equal parts for "
                f"{sharding.batch_shards(mesh)} devices and {config.micro_batches} "
                f"micro-batches; give a multiple of {parts}, or another mesh."
            )
        return sharding.local_rows(count, mesh, sharding.BATCH)

    def drawn(task, step):
        views, size = len(foreign[task]), config.penalty_batch_size
        return tau_jp.draw(config.penalty, step, views, size, config.seed + task)

    rows = local(config.batch_size)
    if config.penalty:
        penalty_rows = [local(len(drawn(task, 0))) for task in range(len(sources))]

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

    Returns:
      T task vectors in float32, with the leaves that `config.trained` matches.

    Raises:
      FloatingPointError: a loss or gradient is not finite; the message names the step,
        the task and the leaf. Checkpoints from before are kept.
      OSError: the checkpoints do not fit on the disk, or cannot be written.
      SystemExit: a signal came, and the state is saved; of status 128 + its number.
      ValueError: `batches` is not `config.steps` long, `trained` matches no leaf, the
        mesh cannot share tasks or samples equally, or the checkpoints are of another
        run.
    """
    if len(batches) != config.steps:
        raise ValueError(f"{len(batches)} batches for {config.steps} steps.")
    mesh = mesh or sharding.one_device()
    params_0 = sharding.shard(params_0, mesh)  # once, not with every step
    constants = sharding.put(constants, NamedSharding(mesh, P("task")))
    state = init_state(params_0, config, len(names), mesh)
    objective_fn = objective(apply_fn, loss_fn, config, inputs, penalty_mask, mesh)
    step = make_step(objective_fn, config, mesh)
    leaves = list(tree.flatten(state[0]))
    learning_rate = schedule(config)
    first, saved, signalled = 0, None, lambda step: None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            identity = _identity(config, names, params_0, constants)
            saved = stack.enter_context(
                checkpoint.Checkpoints(checkpoints, identity, keep=keep)
            )
            saved.reserve(state)
            if restored := saved.restore(state):
                first, state = restored
            signalled = stack.enter_context(interrupts.noted())
        is_first = jax.process_index() == 0
        file = stack.enter_context(_opened(log if is_first else None, first))
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
            rate = samples / (time.time() - start)
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

        start, pending = time.time(), None
        for number, batch in enumerate(pipeline.prefetch(batches, first), first):
            batch = sharding.from_local_rows(batch, mesh)
            state, metrics = step(state, params_0, batch, constants)
            if pending:  # read the step before while the device computes this one
                record(*pending)
            pending, done = (number, metrics), number + 1
            came = signalled(done)
            if saved and (came or done % save_every == 0 or done == config.steps):
                record(*pending)  # what is not finite is not saved
                pending = None
                file.flush()
                saved.save(done, state)
            if came:
                saved.wait()
                bar.write(
                    f"{came.name}: saved after step {done} of {config.steps} in "
                    f"{checkpoints}. Run the same again to go on.",
                    file=sys.stderr,
                )
                raise SystemExit(128 + came)
        if pending:
            record(*pending)
    return _one_by_one(state[0], mesh)


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


def _opened(log, steps):
    """The log after its first lines, one for each of the steps that are done."""
    if log is None:
        return open(os.devnull, "w")
    log = Path(log)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    report.write_text(log, "".join(lines[:steps]))
    return open(log, "a")


def _one_by_one(taus, mesh):
    @jax.jit
    def unstack(taus):
        return [sharding.pin(tau, mesh) for tau in tree.unstack(taus)]

    return unstack(taus)


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
