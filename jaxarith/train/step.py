r"""One optimizer step of several tasks, and its state.

The state of a task is its task vector, not the parameters: nothing is lost to rounding
in :math:`\theta_0 + \tau`. Weight decay pulls :math:`\theta_0 + \tau`, not
:math:`\tau`, towards zero, as AdamW on the parameters does.

Tasks train side by side along a leading task axis, in one compiled program. On a mesh
the devices share every batch, hold parts of the state, or train different tasks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxarith import curvature, sharding, tangent, task_vectors, tau_jp, tree
from jaxarith.train import delta, padding
from jaxarith.train.config import TrainConfig, optimizer
from jaxarith.typing import ApplyFn, LossFn, Params, Tree

Objective = Callable[..., tuple[jax.Array, dict[str, Any]]]
Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


def objective(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    config: TrainConfig,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    mesh: Mesh | None = None,
) -> Objective:
    """Makes the function to minimise.

    The result is a function `(tau, params_0, batch, constants) -> (total, metrics)`.
    `batch` holds the fields named by `inputs` and the fields that `loss_fn` reads. With
    a penalty it also holds `"penalty"`: a dict of the same input fields, and of
    `penalty_mask`, for samples of other tasks; see `fine_tune`. The devices of `mesh`,
    by default one, share the samples; `tau` and `params_0` are `sharding.whole`.
    """
    mesh = mesh or sharding.one_device()
    if config.distill:
        return delta.objective(
            apply_fn,
            loss_fn,
            config.distill.coef,
            inputs,
            mesh,
            config.product_dtype,
        )
    apply_fn = sharding.of_samples(apply_fn, mesh)

    def total(tau, params_0, batch, constants):
        task_inputs = tuple(batch[name] for name in inputs)
        penalty = 0.0
        if config.tau_jp_mode:
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
                weight=others.get(padding.WEIGHT),
                norm=config.penalty_norm,
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
        loss = padding.loss(loss_fn, outputs, batch, constants)
        metrics: dict[str, Any] = {"loss": loss}
        if config.tau_jp_mode:
            metrics["penalty"] = penalty
        return loss + config.penalty_coef * penalty, metrics

    return total


def make_step(
    objective_fn: Objective,
    config: TrainConfig,
    mesh: Mesh | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Step:
    """One optimizer step of all tasks, jitted.

    Args:
      objective_fn: the result of `objective` for the same mesh.
      config: the recipe.
      mesh: the devices, see `sharding`; by default one.
      optimizer: as for `fine_tune`.

    Returns:
      `step(state, params_0, batch, constants, shared, own) -> (state, metrics)`.
      `state` is `(taus, opt_state)`. It, `batch` and `constants` have a leading task
      axis. So have the metrics: those of the objective, `[T]`, and
      `"gradient_norms"`, `[T, L]`, for the L trained leaves in the order of
      `tree.flatten`. The step reuses the buffers of the state that it is passed, which
      is then invalid. `shared` is a curvature for the penalty of all tasks, `own` has
      one for each task, with a task axis; by default there is none. Its penalty is
      computed once, not for every micro-batch.
    """
    mesh = mesh or sharding.one_device()
    update = _transform(optimizer, config).update

    def part(*args):
        grads, metrics = jax.grad(objective_fn, has_aux=True)(*args)
        return sharding.pin(grads, mesh), metrics

    def gradient(tau, params_0, batch, constants):
        tau, params_0 = sharding.whole((tau, params_0), mesh)
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

    def penalised(tau, grads, metrics, measured):
        value, slopes = jax.value_and_grad(penalty)(tau, measured)
        weight = config.penalty_coef * config.penalty_every
        grads = jax.tree.map(lambda g, slope: g + weight * slope, grads, slopes)
        return sharding.pin(grads, mesh), metrics | {"penalty": value}

    def penalty(tau, measured):
        models = tau.values() if config.distill else [tau]
        return tree.total(curvature.penalty(model, measured) for model in models)

    def task_step(params_0, shared, state, batch, constants, own):
        tau, opt_state = state
        grads, metrics = gradient(tau, params_0, batch, constants)
        measured = own if shared is None else shared
        if measured is not None:
            grads, metrics = penalised(tau, grads, metrics, measured)
        squared = [
            optax.tree.norm(leaf, squared=True) for leaf in jax.tree.leaves(grads)
        ]
        metrics["gradient_norms"] = jnp.sqrt(jnp.stack(squared))
        start = tree.restrict(_models(params_0, config), tree.flatten(tau))
        params = jax.tree.map(jnp.add, start, tau)
        updates, opt_state = update(grads, opt_state, params)
        return (optax.apply_updates(tau, updates), opt_state), metrics

    def own_tasks(state, params_0, batch, constants, shared, own):
        if config.tasks_at_once > 1:
            return jax.lax.map(
                lambda task: task_step(params_0, shared, *task),
                (state, batch, constants, own),
                batch_size=config.tasks_at_once,
            )

        # The loop carries the state and updates it in place: a `map` would hold the
        # states of all tasks twice.
        def one(state, task):
            number, *rest = task
            old = jax.tree.map(lambda leaf: _row(leaf, number), state)
            new, metrics = _at_once(task_step, params_0, shared, old, *rest)
            state = jax.tree.map(lambda x, row: _with_row(x, row, number), state, new)
            return state, metrics

        tasks = len(jax.tree.leaves(state)[0])
        return jax.lax.scan(one, state, (jnp.arange(tasks), batch, constants, own))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params_0, batch, constants, shared=None, own=None):
        all_tasks = own_tasks
        if mesh.shape["task"] > 1:
            all_tasks = jax.shard_map(
                own_tasks,
                mesh=mesh,
                in_specs=(P("task"), P(), P("task"), P("task"), P(), P("task")),
                out_specs=P("task"),
                axis_names={"task"},
                check_vma=False,
            )
        state, metrics = all_tasks(state, params_0, batch, constants, shared, own)
        # Without this the state may change its place, and the next step be compiled.
        return sharding.pin(state, mesh, tasks=True), sharding.constrain(
            metrics, mesh, P()
        )

    return step


# `x[i]` and `x.at[i].set(row)` would ask of every leaf whether i is negative, and the
# second is a scatter: both are compiled for every leaf of the state.
_row = functools.partial(
    jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False
)
_with_row = functools.partial(
    jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False
)


def _at_once(function, *args):
    """Calls the function so that no result is ready before all results are.

    XLA then knows that all arguments have been read, and may write over them. On a CPU
    it drops barriers early, but not a conditional whose outcome it cannot know.
    """
    function = jax.jit(function)  # traced once, for its shapes and for the branch
    first = jnp.ravel(jax.tree.leaves(args[2])[0])[0]
    is_number = jax.lax.platform_dependent(
        first, cpu=lambda x: x == x, default=lambda x: jnp.array(True)
    )
    shapes = jax.eval_shape(function, *args)

    def broken(x):
        is_real = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.full(x.shape, jnp.nan if is_real else 0, x.dtype)

    def unreached(*args):  # except for a state that is NaN already
        return args[2], jax.tree.map(broken, shapes[1])

    return jax.lax.optimization_barrier(
        jax.lax.cond(is_number, function, unreached, *args)
    )


def _models(params, config):
    return delta.pair(params) if config.distill else params


def _transform(given, config):
    transform = _given_or_papers(given, config)
    return delta.each(transform) if config.distill else transform


def _given_or_papers(given, config):
    if given is None:
        return optimizer(config)
    if not isinstance(given, optax.GradientTransformation):
        raise ValueError(
            f"optimizer is {given!r}; expected an optax.GradientTransformation. "
            "Write optax.sgd(1e-2), or optax.sgd(train.schedule(config)) for the "
            "learning rates of the recipe."
        )
    return given


def _micro_batches(batch, count, mesh):
    """Cuts `[B, ...]` into `[count, B / count, ...]`; devices keep their samples."""
    shards = sharding.batch_shards(mesh)

    def cut(leaf):
        parts = leaf.reshape(shards, count, -1, *leaf.shape[1:])
        return jnp.swapaxes(parts, 0, 1).reshape(count, -1, *leaf.shape[1:])

    return jax.tree.map(cut, batch)


def init_state(
    params_0: Params,
    config: TrainConfig,
    tasks: int,
    mesh: Mesh | None = None,
    start: Sequence[Tree] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Any, Any]:
    """Task vectors, by default zero, and fresh optimizer states, by task.

    The optimizer's state is initialised with the parameters θ0 + τ.

    Args:
      params_0: the pre-trained parameters.
      config: the recipe.
      tasks: the number of tasks.
      mesh: the devices, see `sharding`; by default one.
      start: task vectors to start from, one for each task.
      optimizer: as for `fine_tune`.

    Raises:
      ValueError: `start` does not have one task vector for each task, with the trained
        leaves.
    """
    mesh = mesh or sharding.one_device()
    trained = _models(tree.select(tree.floating(params_0), config.trained), config)
    if start is not None and len(start) != tasks:
        vectors = tree.counted(len(start), "task vector")
        raise ValueError(
            f"{vectors} to start from for {tree.counted(tasks, 'task')}; give one for "
            "each task."
        )
    for tau in start or ():
        tree.check_part(tau, trained, "task vector to start from", "trained part")
        tree.check_part(trained, tau, "trained part", "task vector to start from")

    transform = _transform(optimizer, config)

    def init(start, trained):
        if start is None:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
            start = [zeros] * tasks
        taus = jax.tree.map(lambda *x: jnp.stack(x).astype(jnp.float32), *start)

        def fresh(tau):
            params = jax.tree.map(lambda x, t: (x + t).astype(t.dtype), trained, tau)
            return transform.init(params)

        return taus, jax.vmap(fresh)(taus)

    shapes = jax.eval_shape(init, start, trained)
    places = sharding.shardings(shapes, mesh, tasks=True)
    return jax.jit(init, out_shardings=places)(start, trained)
