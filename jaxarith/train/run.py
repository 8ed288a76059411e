"""Fine-tuning of one or several tasks, ordinary or in the tangent space.

`config` has the recipe and `step` is one step; this module has the loop with batches,
progress and checkpoints. A run with checkpoints stops at a signal and continues there
later, with the same result to the last bit.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxarith import fingerprint, report, sharding, tree
from jaxarith.batches import fields_of
from jaxarith.curvature import Curvature, EigenFactors, check_base
from jaxarith.data import pipeline
from jaxarith.sharding import processes
from jaxarith.train import checkpoint, interrupts
from jaxarith.train.config import TrainConfig, identity_of, schedule
from jaxarith.train.step import init_state, make_step, objective
from jaxarith.typing import ApplyFn, LossFn, Params, Source, Tree

# A function of steps done, task vectors and metrics; True ends the training.
Observe = Callable[[int, list[Tree], dict[str, Any]], Any]


def fine_tune(
    apply_fn: ApplyFn,
    params_0: Params,
    loss_fn: LossFn,
    batches: Source,
    config: TrainConfig,
    *,
    names: Sequence[str],
    constants: Tree = None,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    curvature: Curvature | Sequence[Curvature] | None = None,
    log: Path | None = None,
    mesh: Mesh | None = None,
    checkpoints: Path | None = None,
    save_every: int = 200,
    keep: int = 2,
    start: Sequence[Tree] | None = None,
    observe: Observe | None = None,
    observe_every: int | Collection[int] = 100,
    workers: int = 0,
    optimizer: optax.GradientTransformation | None = None,
) -> list[Tree]:
    """Trains one task vector for each task.

    With a folder for checkpoints the run can be stopped at any moment. Called again, it
    continues from the last checkpoint; on the same devices the result equals that of a
    run without a stop, to the last bit. On SIGTERM and Ctrl-C it saves first.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params_0: the pre-trained parameters; they are not changed.
      loss_fn: `loss(outputs, batch, constants) -> scalar` of one task.
      batches: `config.steps` batches with a leading task axis, from `task_batches`.
      config: the recipe.
      names: names of the T tasks, for the log, metrics and errors.
      constants: a tree of arrays `[T, ...]`; `loss_fn` gets one task's row.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      penalty_mask: for outputs by token, `[B, S, ...]`: the field of the penalty
        samples, `[B, S]`, that is 0 where a token is padding, such as
        "attention_mask". The penalty is the mean over the other tokens; without a mask,
        over all tokens.
      curvature: the curvature of what the task vectors must not disturb, for a penalty
        that is a form of curvature. Pass the result of `curvature.merge` for all tasks,
        or a list with one for each task, the result of `curvature.others`.
      log: a file for one JSON line per step, with step, learning rate, samples per
        second, and by task loss, penalty if there is one, and norm of the gradient.
      mesh: the devices, see `sharding`; by default one.
      checkpoints: the folder for checkpoints; several processes share it. By default
        nothing is saved.
      save_every: steps from one checkpoint to the next. The last step has one too.
      keep: number of checkpoints that are kept, the last ones.
      start: a task vector of every task to start from, with a fresh optimizer; by
        default zero.
      observe: `observe(done, taus, metrics)` is called with the number of steps done,
        the task vectors after them and the metrics of the last step, a line of the log,
        every `observe_every` steps, or after each of these numbers of steps. If it
        returns True, in any of several processes, training ends there, and these
        vectors are the result. The checkpoint of such a run records the end: called
        again, it returns the same vectors and does not train on. A run that continues
        from a checkpoint may observe the steps after it a second time.
      workers: number of processes that make the batches; 0 for threads. Guard a script
        with `__main__`: workers re-import it. See `data.pipeline.prefetch`.
      optimizer: makes updates from gradients and parameters θ0 + τ, for every task
        separately, instead of `train.optimizer(config)`. The learning rate and its
        schedule, weight decay and clipping of `config` have no effect unless it is made
        with them, as in `optax.chain(optax.clip_by_global_norm(1.0),
        optax.sgd(train.schedule(config)))`. Checkpoints hold its state, but cannot
        distinguish two optimizers whose states have the same structure.

    Returns:
      T task vectors in float32, with the leaves that `config.trained` matches. With
      `config.distill` each of them is `{"student": τ, "teacher": τ}`, here and wherever
      task vectors are named above.

    Raises:
      FloatingPointError: a loss or gradient is not finite; the message names the step,
        the task and the leaf. Checkpoints from before are kept.
      OSError: the checkpoints do not fit on the disk, or cannot be written.
      SystemExit: a signal came, and the state is saved. The status is 128 plus the
        number of the signal. With several processes only SIGTERM is noted.
      ValueError: `batches` is not `config.steps` long, the first batch lacks a field of
        `inputs` or is of another number of tasks than `names` or `constants`, `trained`
        matches no leaf, the mesh cannot share tasks or samples equally, the curvature
        is not of `config.penalty`'s form or of other parameters, or the checkpoints
        are of another run: of another recipe, start or other data.

    Example:
      >>> from jaxarith import losses, train
      >>> samples = {"x": np.eye(3, dtype="f4"), "label": np.arange(3)}
      >>> config = train.TrainConfig(steps=20, batch_size=3)
      >>> [tau] = train.fine_tune(
      ...     lambda params, x: x @ params["w"],
      ...     {"w": np.zeros((3, 3), "f4")},
      ...     lambda logits, batch, _: losses.cross_entropy(logits, batch["label"]),
      ...     train.task_batches([samples], config, names=["identity"]),
      ...     config,
      ...     names=["identity"],
      ...     inputs=["x"],
      ...     optimizer=optax.sgd(0.1),
      ... )
      >>> print(tau["w"].argmax(axis=0))
      [0 1 2]
    """
    if checkpoints is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}; at least 1 is needed.")
    if isinstance(observe_every, int):
        if observe_every < 1:
            raise ValueError(f"observe_every is {observe_every}; at least 1 is needed.")
        observe_every = range(observe_every, config.steps + 1, observe_every)
    if len(batches) != config.steps:
        raise ValueError(
            f"{tree.counted(len(batches), 'batch', 'batches')} for "
            f"{tree.counted(config.steps, 'step')}; give a batch for each step, as "
            "task_batches does."
        )
    mesh = mesh or sharding.one_device()
    _check_constants(constants, names)
    params_0 = sharding.shard(params_0, mesh)  # once, not with every step
    constants = sharding.put(constants, NamedSharding(mesh, P("task")))
    state = init_state(params_0, config, len(names), mesh, start, optimizer)
    objective_fn = objective(apply_fn, loss_fn, config, inputs, penalty_mask, mesh)
    step = make_step(objective_fn, config, mesh, optimizer)
    measured = _curvature(curvature, config, params_0, len(names), mesh)
    leaves = list(tree.flatten(state[0]))
    learning_rate = schedule(config)
    first, ended, saved, signalled = 0, False, None, lambda: None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            signalled = stack.enter_context(interrupts.noted())
            identity = _identity(config, names, params_0, constants)
            identity |= {"inputs": list(inputs), "penalty_mask": penalty_mask}
            if start is not None:
                identity["start"] = fingerprint.combined(list(start))
            if optimizer is not None:
                identity["optimizer"] = "given"
            if curvature is not None:
                parts = [jax.tree.leaves(part) for part in measured]
                identity["curvature"] = fingerprint.combined(parts)
            # Data are read only where a run goes on or is saved.
            saved = stack.enter_context(
                checkpoint.Checkpoints(
                    checkpoints,
                    lambda: identity | {"data": _data(batches)},
                    keep=keep,
                )
            )
            processes.on_first(lambda: saved.reserve(state))
            if restored := saved.restore(state):
                first, state, ended = restored
        is_first = jax.process_index() == 0
        if log is not None:  # an error of the first process must stop the others too
            processes.on_first(lambda: _keep_lines(log, first))
        file = stack.enter_context(open(log if log and is_first else os.devnull, "a"))
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
            rate = samples / (time.time() - since)
            loss = f"{np.mean(metrics['loss']):.3f}"
            bar.set_postfix(loss=loss, samples_s=int(rate), refresh=False)
            bar.update()
            line: dict[str, Any] = {"step": number}
            if optimizer is None:
                line["learning_rate"] = float(learning_rate(number))
            line["samples_per_second"] = round(rate, 1)
            for name, values in metrics.items():
                line[name] = dict(zip(names, values.tolist(), strict=True))
            file.write(json.dumps(line) + "\n")
            return line

        def said(text):
            if is_first:
                bar.write(text, file=sys.stderr)

        if ended:
            said(f"observe ended this run after step {first} of {config.steps}.")
            return _one_by_one(state[0], mesh)
        since, pending = time.time(), None
        made = pipeline.prefetch(batches, first, workers)
        for number, batch in enumerate(made, first):
            if number == first:
                _check_batch(batch, inputs, names, mesh)
            batch = sharding.from_local_rows(batch, mesh)
            now = measured if number % config.penalty_every == 0 else (None, None)
            state, metrics = step(state, params_0, batch, constants, *now)
            if pending:  # read the step before while the device computes this one
                record(*pending)
            pending, done = (number, metrics), number + 1
            if observe and done in observe_every:
                line = record(*pending)  # what is not finite is not shown
                pending = None
                answer = observe(done, _one_by_one(state[0], mesh), line)
                ended = processes.anywhere(_asks_to_end(answer))
            came = signalled()
            last = ended or done == config.steps
            if saved and (came or done % save_every == 0 or last):
                if pending:
                    record(*pending)  # what is not finite is not saved
                pending = None
                file.flush()
                saved.save(done, state, ended=ended)
            if came and saved:
                saved.wait()
                said(
                    f"{came.name}: saved after step {done} of {config.steps} in "
                    f"{checkpoints}. Run the same again to go on."
                )
                raise SystemExit(128 + came)
            if ended:
                said(f"observe ended the run after step {done} of {config.steps}.")
                break
        if pending:
            record(*pending)
    return _one_by_one(state[0], mesh)


def _asks_to_end(answer):
    """Whether `observe` returned True; other results have no effect."""
    boolean = isinstance(answer, bool) or getattr(answer, "dtype", None) == np.bool_
    return boolean and bool(np.all(answer))


def _check_batch(batch, inputs, names, mesh):
    """Raises a ValueError unless a batch has all inputs, and a row for each task."""
    fields_of(batch, inputs)
    expected = len(sharding.local_rows(len(names), mesh, "task"))
    for path, leaf in tree.flatten(batch).items():
        if np.ndim(leaf) < 2 or len(leaf) != expected:
            raise ValueError(
                f"the field {path} of a batch has shape {list(np.shape(leaf))}, for "
                f"{tree.counted(len(names), 'name')} ({', '.join(names)}); expected "
                f"[{expected}, B, …]: a row for each task. Give one name for each "
                "source of task_batches."
            )


def _check_constants(constants, names):
    for path, leaf in tree.flatten(constants).items():
        if np.shape(leaf)[:1] != (len(names),):
            raise ValueError(
                f"constants{'/' * bool(path)}{path} has shape {list(np.shape(leaf))}, "
                f"for {tree.counted(len(names), 'name')} ({', '.join(names)}); "
                f"expected [{len(names)}, …], a row for each task."
            )


def _identity(config, names, params_0, constants):
    """The settings that must be equal for a run to continue."""
    return {
        "train": identity_of(config),
        "tasks": list(names),
        "params_0": fingerprint.combined(params_0),
        "constants": fingerprint.combined(constants),
    }


def _data(batches):
    """Identifies the data of a run."""
    if isinstance(batches, pipeline.Batches):
        return batches.identity()
    # Of several processes, each has its own part of every batch.
    return pipeline.identity(batches) if jax.process_count() == 1 else None


def _keep_lines(log, steps):
    """Keeps the first lines of the log, one for each finished step."""
    log = Path(log)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    report.write_text(log, "".join(lines[:steps]))


def _one_by_one(taus, mesh):
    """Makes a list of trees from one tree with a leading task axis."""
    rows = jax.tree.map(lambda leaf: _rows(leaf, mesh), taus)
    return jax.tree.transpose(jax.tree.structure(taus), None, rows)


# By leaf: leaves of one shape, and all later runs, share what is compiled.
@functools.partial(jax.jit, static_argnums=1)
def _rows(leaf, mesh):
    return [sharding.pin(row, mesh) for row in leaf]


def _title(config):
    kind = "linearised" if config.linearized else "ordinary"
    if config.distill:
        kind = "distilled"
    if config.form:
        return f"{kind} + curvature ({config.form})"
    return f"{kind} + {config.penalty} τJp" if config.penalty else kind


def _curvature(given, config, params_0, tasks, mesh):
    """The curvature that all tasks share, and that of each with a task axis."""
    if (given is None) != (config.form is None):
        raise ValueError(
            f"penalty is {config.penalty!r} and curvature is "
            f"{'not ' if given is None else ''}given. A penalty of kronecker, eigen or "
            "diagonal needs it, and no other reads it."
        )
    if given is None:
        return None, None
    parts = [given] if isinstance(given, Curvature) else list(given)
    for number, part in enumerate(parts):
        if not isinstance(part, Curvature):
            raise ValueError(
                f"curvature {number} is a {type(part).__name__}; expected what "
                "curvature.merge gives, or a list as of curvature.others, in the order "
                "of the tasks. curvature.load gives it with metadata."
            )
        if number == 0 or part.base != parts[0].base:
            check_base(part, params_0)
        if (form := _form(part)) != config.form:
            raise ValueError(
                f"the curvature is of the form {form!r} and penalty is "
                f"{config.penalty!r}; set penalty={form!r}."
            )
    if isinstance(given, Curvature):
        return sharding.shard(given, mesh), None
    if len(parts) != tasks:
        raise ValueError(
            f"{len(parts)} curvatures for {tasks} tasks; give one for each task, as "
            "curvature.others does, or one for all."
        )
    shapes = [jax.tree.map(jnp.shape, part) for part in parts]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                f"curvatures 0 and {number} are of other layers, leaves or ranks. "
                "Collect and merge all in the same way, or train the tasks apart."
            )
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts))
    # What is on the host does not have to fit on one device together.
    stacked = _stacked(np, parts) if on_host else _stacked_on_device(parts)
    return None, sharding.shard(stacked, mesh, tasks=True)


def _stacked(library, parts):
    return jax.tree.map(lambda *leaves: library.stack(leaves), *parts)


_stacked_on_device = jax.jit(functools.partial(_stacked, jnp))


def _form(part):
    if isinstance(part, EigenFactors):
        return "eigen"
    return "kronecker" if part.layers else "diagonal"


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
                f"{tree.counted(len(leaves), 'leaf', 'leaves')}, the first {broken[0]},"
            )
        raise FloatingPointError(
            f"{' and '.join(what)} at step {number}. Lower the learning rate, or look "
            "for bad samples around that step."
        )
