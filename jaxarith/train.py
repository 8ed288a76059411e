r"""Fine-tuning of one or several tasks, ordinary or in the tangent space.

The state of a task is its task vector, not the parameters: nothing is lost to rounding
in :math:`\theta_0 + \tau`. Weight decay pulls :math:`\theta_0 + \tau`, not
:math:`\tau`, towards zero, as AdamW on the parameters does.

Tasks train side by side along a leading task axis, with one compilation. The recipe is
that of Ilharco et al. (2023) and Ortiz-Jimenez et al. (2023): AdamW, warm-up and
cosine, gradients clipped to norm 1.
"""

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxarith import tangent, task_vectors, tau_jp, tree
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
        for name in sizes:
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
):
    """What training minimises, `(tau, params_0, batch, constants) -> (total, metrics)`.

    `batch` holds the fields named by `inputs`, what `loss_fn` reads and, with a
    penalty, `"penalty"`: a dict of the same input fields for samples of other tasks,
    and of `penalty_mask`, which `fine_tune` explains.
    """

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


def make_step(objective_fn, config: TrainConfig):
    """One optimizer step of all tasks, jitted.

    Returns:
      `step(state, params_0, batch, constants) -> (state, metrics)`. `state` is
      `(taus, opt_state)`; it, `batch` and `constants` have a leading task axis, and so
      have the metrics. The state that is passed in is given up: its buffers are
      reused.
    """
    update = optimizer(config).update

    def task_step(params_0, state, batch, constants):
        tau, opt_state = state
        gradient = jax.grad(objective_fn, has_aux=True)
        grads, metrics = gradient(tau, params_0, batch, constants)
        start = tree.restrict(params_0, tree.flatten(tau))
        params = jax.tree.map(jnp.add, start, tau)
        updates, opt_state = update(grads, opt_state, params)
        return (optax.apply_updates(tau, updates), opt_state), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params_0, batch, constants):
        return jax.lax.map(
            lambda task: task_step(params_0, *task),
            (state, batch, constants),
            # `map` of one at a time is a loop; in batches of one it would be a `vmap`.
            batch_size=config.tasks_at_once if config.tasks_at_once > 1 else None,
        )

    return step


def init_state(params_0: tree.Tree, config: TrainConfig, tasks: int):
    """Zero task vectors and fresh optimizer states, with a leading task axis."""
    trained = tree.select(tree.floating(params_0), config.trained)
    taus = jax.tree.map(
        lambda leaf: jnp.zeros((tasks, *leaf.shape), jnp.float32), trained
    )
    return taus, jax.vmap(optimizer(config).init)(taus)


def task_batches(
    sources: Sequence,
    config: TrainConfig,
    *,
    others: Sequence[Sequence] | None = None,
    inputs: Sequence[str] = ("image",),
) -> Iterator[dict]:
    """The batches of a run: every task's own samples and, if asked, penalty samples.

    A batch is a function of its step and the seed alone.

    Args:
      sources: the training source of each of T tasks.
      config: steps, sizes, penalty mode and seed.
      others: for each task, the sources that its task vector must not disturb
        (T_orth); by default the other tasks' training sources. Labels are not read.
      inputs: the fields of a penalty sample: those of the model, and the penalty's
        mask where that is not among them.

    Yields:
      `config.steps` dicts of arrays `[T, config.batch_size, ...]`; with a penalty also
      `"penalty"`, a dict of input fields `[T, P, ...]`.

    Raises:
      ValueError: no task, an empty source, or no other task for the penalty.
    """
    if not sources:
        raise ValueError("no task to train on: the list of sources is empty.")
    if others is None:
        tasks = range(len(sources))
        others = [[sources[j] for j in tasks if j != i] for i in tasks]
    seeds = itertools.count(10_000 * config.seed)
    own = [pipeline.shuffled(source, next(seeds)) for source in sources]
    foreign = [[pipeline.shuffled(s, next(seeds)) for s in group] for group in others]

    def samples(view, positions):
        return pipeline.collate([view[int(i)] for i in positions])

    def penalty_samples(task, step):
        views, size = foreign[task], config.penalty_batch_size
        drawn = tau_jp.draw(config.penalty, step, len(views), size, config.seed + task)
        records = [views[t][step * size + i % size] for i, t in enumerate(drawn)]
        return pipeline.collate([{name: r[name] for name in inputs} for r in records])

    def make_batch(step):
        positions = step * config.batch_size + np.arange(config.batch_size)
        batches = [samples(view, positions) for view in own]
        if config.penalty:
            for task, batch in enumerate(batches):
                batch["penalty"] = penalty_samples(task, step)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    return pipeline.prefetch(make_batch, config.steps)


def fine_tune(
    apply_fn: tangent.ApplyFn,
    params_0: tree.Tree,
    loss_fn: LossFn,
    batches: Iterable[dict],
    config: TrainConfig,
    *,
    names: Sequence[str],
    constants: tree.Tree = None,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    log: Path | None = None,
) -> list[tree.Tree]:
    """Trains one task vector for each task.

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
        second, and loss (and penalty) by task.

    Returns:
      T task vectors in float32, with the leaves that `config.trained` matches.

    Raises:
      FloatingPointError: a loss is not finite; the message names the step and the task.
      ValueError: `batches` is not `config.steps` long, or `trained` matches no leaf.
    """
    params_0 = jax.device_put(params_0)  # once, not with every step
    objective_fn = objective(apply_fn, loss_fn, config, inputs, penalty_mask)
    step = make_step(objective_fn, config)
    state = init_state(params_0, config, len(names))
    learning_rate = schedule(config)
    with (
        tqdm(total=config.steps, desc=_title(config), unit="step") as bar,
        open(log or os.devnull, "w") as file,
    ):

        def report(number, metrics):
            metrics = {k: np.asarray(v).tolist() for k, v in metrics.items()}
            _check_finite(metrics, number, names)
            samples = (number + 1) * config.batch_size * len(names)
            rate = samples / (time.time() - start)
            loss = f"{np.mean(metrics['loss']):.3f}"
            bar.set_postfix(loss=loss, samples_s=int(rate), refresh=False)
            bar.update()
            line = {
                "step": number,
                "learning_rate": float(learning_rate(number)),
                "samples_per_second": round(rate, 1),
            }
            line |= {k: dict(zip(names, v, strict=True)) for k, v in metrics.items()}
            file.write(json.dumps(line) + "\n")

        start, number, pending = time.time(), -1, None
        for number, batch in enumerate(batches):
            if number == config.steps:
                raise ValueError(f"more than {config.steps} batches for as many steps.")
            state, metrics = step(state, params_0, batch, constants)
            if pending:  # read the step before while the device computes this one
                report(*pending)
            pending = (number, metrics)
        if number + 1 < config.steps:
            raise ValueError(f"{number + 1} batches for {config.steps} steps.")
        report(*pending)
    return tree.unstack(state[0])


def _title(config):
    kind = "linearised" if config.linearized else "ordinary"
    return f"{kind} + {config.penalty} τJp" if config.penalty else kind


def _check_finite(metrics, number, names):
    for metric, values in metrics.items():
        for name, value in zip(names, values, strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"the {metric} of task {name} is {value} at step {number}. Lower "
                    "the learning rate, or look for bad samples around that step."
                )
