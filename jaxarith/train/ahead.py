"""A step that is compiled ahead of time from shapes, without weights and data."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import sharding
from jaxarith.curvature import Curvature
from jaxarith.train import padding
from jaxarith.train.config import TrainConfig
from jaxarith.train.step import init_state, make_step, objective
from jaxarith.typing import ApplyFn, LossFn, Params, Tree


def lowered_step(
    apply_fn: ApplyFn,
    params_0: Params,
    loss_fn: LossFn,
    sample: Tree,
    config: TrainConfig,
    *,
    tasks: int = 1,
    others: int = 1,
    constants: Tree = None,
    inputs: Sequence[str] = ("image",),
    penalty_mask: str | None = None,
    mesh: Mesh | None = None,
    curvature: Curvature | None = None,
) -> jax.stages.Lowered:
    """The program of one optimizer step of `fine_tune`, before it is compiled.

    `cost_analysis()` of the result counts FLOPs, and counts the body of a loop once:
    one micro-batch, and one of a device's tasks. `compile().memory_analysis()` tells
    how much memory each device needs.

    Args:
      apply_fn, loss_fn, config, inputs, penalty_mask, mesh: as for `fine_tune`.
      params_0: the parameters, or `jax.ShapeDtypeStruct`s of them.
      sample: one sample of a batch, as arrays or `jax.ShapeDtypeStruct`s.
      tasks: the number of tasks that train side by side.
      others: the number of other tasks of a strict penalty.
      constants: as for `fine_tune`, or `jax.ShapeDtypeStruct`s of them, `[T, ...]`.
      curvature: curvature that all tasks share, with arrays or
        `jax.ShapeDtypeStruct`s; by default no penalty of curvature is in the step.

    Example:
      >>> shape = jax.ShapeDtypeStruct((3, 2), np.float32)
      >>> step = lowered_step(
      ...     lambda params, x: x @ params["w"],
      ...     {"w": shape},
      ...     lambda outputs, batch, _: (outputs**2).mean(),
      ...     {"image": np.zeros(3, np.float32)},
      ...     TrainConfig(batch_size=4),
      ... )
      >>> step.compile().memory_analysis().temp_size_in_bytes > 0
      True
    """
    mesh = mesh or sharding.one_device()

    def rows(count):
        def leaf(x):
            return jax.ShapeDtypeStruct((tasks, count, *np.shape(x)), _dtype(x))

        return leaf

    total = padding.filled(config.batch_size, mesh, config.micro_batches)
    batch = jax.tree.map(rows(total), sample)
    batch |= _weight(rows, config.batch_size, total)
    if config.distill:
        batch["alpha"] = rows(total)(np.float32(0))
    if config.tau_jp_mode:
        count = config.penalty_batch_size
        count *= others if config.tau_jp_mode == "strict" else 1
        total = padding.copied(count, mesh, config.micro_batches)
        wanted = {*inputs, *([penalty_mask] if penalty_mask else [])}
        foreign = {name: leaf for name, leaf in sample.items() if name in wanted}
        batch["penalty"] = jax.tree.map(rows(total), foreign)
        weighed = 0 if config.penalty_start else count
        batch["penalty"] |= _weight(rows, weighed, total)

    def placed(tree_, places):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(
                np.shape(x), _dtype(x), sharding=place
            ),
            tree_,
            places,
        )

    def everywhere(tree_, spec):
        return placed(tree_, jax.tree.map(lambda _: NamedSharding(mesh, spec), tree_))

    state = jax.eval_shape(
        lambda params: init_state(params, config, tasks, mesh), params_0
    )
    step = make_step(
        objective(apply_fn, loss_fn, config, inputs, penalty_mask, mesh), config, mesh
    )
    return step.lower(  # type: ignore[attr-defined]
        placed(state, sharding.shardings(state, mesh, tasks=True)),
        placed(params_0, sharding.shardings(params_0, mesh)),
        everywhere(batch, P("task", sharding.BATCH)),
        everywhere(constants, P("task")),
        placed(curvature, sharding.shardings(curvature, mesh)),
    )


def device_bytes(compiled: jax.stages.Compiled) -> int:
    """The peak memory of a device during a compiled step, by XLA's plan."""
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _weight(rows, count, total):
    return {} if count == total else {padding.WEIGHT: rows(total)(np.float32(0))}


def _dtype(x):
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
