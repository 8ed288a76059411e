r"""The tau-Jacobian product (τJp): penalty while training, and metric afterwards.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025. Two task vectors do not interfere, in the tangent space,
when

.. math:: \|J(x_B; \theta_0)\,\tau_A\| \quad\text{and}\quad \|J(x_A; \theta_0)\,\tau_B\|

are small, x_A and x_B being inputs of the tasks (Eq. 9). Training task A with a
penalty on the first, over inputs of the other tasks, needs none of their labels
(Eq. 10).

By default J is the Jacobian of the encoder's features, un-normalised, and the penalty
is the mean of the norm itself (`power=1`), as in the paper's released code; the paper
prints its square (`power=2`), which wants another weight.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxarith import sharding, tangent, tree
from jaxarith.batches import fields_of, mask_of
from jaxarith.typing import ApplyFn, Params, Taus, Tree

Mode = Literal["cyclic", "strict", "mixed"]
Power = Literal[1, 2]
Norm = Literal["l2", "mean_absolute"]
MODES = get_args(Mode)


def penalty(
    tangents: Tree,
    mask: jax.Array | None = None,
    power: Power = 1,
    weight: jax.Array | None = None,
    norm: Norm = "l2",
) -> jax.Array:
    r"""Mean over samples of :math:`\|J(x)\tau\|^\text{power}`.

    Args:
      tangents: array `[B, ..., D]` (or a pytree of such): :math:`J(x)\tau`. The norm is
        over the last axis, the mean over all others.
      mask: `[B, ...]`, True where an entry counts; all do by default.
      power: 1 (the paper's code) or 2 (as printed).
      weight: `[B]`, 0 for a copy that fills up a batch and the same number for every
        other sample, see `train.padding`; the mean is multiplied by its mean. By
        default no sample is a copy.
      norm: "l2", the Euclidean norm, or "mean_absolute", the mean of the magnitudes
        over the last axis, which is what the paper's code takes for T5. Of V logits it
        is at most the Euclidean norm divided by √V, and wants another weight.

    Returns:
      A scalar. Its gradient at `tau = 0` is zero, not NaN.

    Raises:
      ValueError: `power` is neither 1 nor 2.

    Example:
      >>> print(penalty(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      2.5
    """
    if power not in get_args(Power):
        raise ValueError(f"power is {power!r}; it must be 1 or 2.")
    if norm == "mean_absolute":
        leaves = jax.tree.leaves(tangents)
        values = tree.total(jnp.mean(_magnitudes(x), axis=-1) for x in leaves) ** power
    else:
        squares = tree.total(jnp.sum(x**2, axis=-1) for x in jax.tree.leaves(tangents))
        values = tree.safe_sqrt(squares) if power == 1 else squares
    if weight is not None:
        real = jnp.reshape(weight > 0, (-1,) + (1,) * (values.ndim - 1))
        real = real if mask is None else real & mask
        return weight.mean() * _masked_mean(values, real)
    return values.mean() if mask is None else _masked_mean(values, mask)


def _magnitudes(x):
    # The slope of `abs` at 0, where training begins, is 1.
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _masked_mean(values, mask):
    mask = jnp.broadcast_to(mask, values.shape)
    return jnp.sum(values, where=mask) / jnp.maximum(jnp.sum(mask), 1)


def linearized_and_penalty(
    apply_fn: ApplyFn,
    params_0: Params,
    tau: Params,
    inputs: tuple,
    penalty_inputs: tuple,
    *,
    mask: jax.Array | None = None,
    power: Power = 1,
    weight: jax.Array | None = None,
    norm: Norm = "l2",
    product_dtype: DTypeLike | None = None,
    shards: int = 1,
) -> tuple[Any, jax.Array]:
    """The linearised outputs on a batch and the penalty on another, fused.

    Both batches go through one linearisation, so the penalty costs its share of
    samples and no more.

    Args:
      apply_fn, params_0, tau: as for `tangent.jvp`.
      inputs: arrays `[B, ...]` of the task that is trained.
      penalty_inputs: arrays `[P, ...]` of the other tasks.
      mask, power, weight, norm: as for `penalty`, over the P samples.
      product_dtype: as for `tangent.jvp`.
      shards: the number of devices that each batch is cut into equal parts for; it
        divides B and P. The batches are joined part by part, and no sample moves.

    Returns:
      `(outputs, penalty)`: `f(x; θ0) + J(x; θ0)τ` with leading axis B, and a scalar.
    """
    count = len(inputs[0]) // shards

    def parts(leaf):  # [B, ...] -> [shards, B / shards, ...]
        return leaf.reshape(shards, -1, *leaf.shape[1:])

    def whole(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])

    joined = (
        whole(jnp.concatenate((parts(own), parts(other)), axis=1))
        for own, other in zip(inputs, penalty_inputs, strict=True)
    )
    outputs, tangents = tangent.jvp(
        apply_fn, params_0, tau, *joined, product_dtype=product_dtype
    )
    linearized = jax.tree.map(
        lambda f, df: whole(parts(f + df)[:, :count]), outputs, tangents
    )
    others = jax.tree.map(lambda df: whole(parts(df)[:, count:]), tangents)
    return linearized, penalty(others, mask, power, weight, norm)


def draw(mode: Mode, step: int, tasks: int, batch: int, seed: int = 0) -> np.ndarray:
    """Which task each penalty sample of a step comes from.

    Args:
      mode: `cyclic` (Eq. 11): all samples of step i from task `i mod tasks`.
        `strict` (Eq. 10): `batch` samples of every task. `mixed` (ours): `batch`
        samples, each from a task drawn at random; the expected penalty is the strict
        one, at the cyclic price.
      step: optimizer step, from 0.
      tasks: the number of other tasks.
      batch: samples per step, in strict mode per step and task.
      seed: seed of the draws in mixed mode, which depend on it and the step alone.

    Returns:
      `i32[P]` with values in `0..tasks-1`; P is `tasks · batch` in strict mode, else
      `batch`. The penalty is the mean over these P samples in every mode.

    Raises:
      ValueError: the mode is unknown, or there is no other task.

    Example:
      >>> draw("cyclic", step=4, tasks=3, batch=2)
      array([1, 1], dtype=int32)
    """
    if tasks < 1:
        raise ValueError("the τJp penalty needs at least one other task; found 0.")
    if mode == "cyclic":
        return np.full(batch, step % tasks, np.int32)
    if mode == "strict":
        return np.repeat(np.arange(tasks, dtype=np.int32), batch)
    if mode == "mixed":
        rng = np.random.default_rng((seed, step))
        return rng.integers(tasks, size=batch, dtype=np.int32)
    raise ValueError(
        f"unknown τJp mode {mode!r}; it must be one of {', '.join(MODES)}."
    )


def matrix(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    datasets: Sequence[Iterable[dict]],
    inputs: Sequence[str] = ("image",),
    *,
    penalty_mask: str | None = None,
    power: Power = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
    r"""The τJp metric of every task vector on every dataset (the paper's Fig. 6).

    Entry `[t, d]` is the mean of :math:`\|J(x;\theta_0)\tau_t\|^\text{power}` over the
    samples of dataset d. Each batch is linearised once for all vectors. The measure of
    a pair (Eq. 9) is the mean of its two off-diagonal entries.

    Args:
      apply_fn, params_0, taus: as for `tangent.jvps`.
      datasets: each an iterable of batches, as `evaluate.outputs` takes them: dicts of
        arrays `[B, ...]`, with a `mask`, `bool[B]`, that is False for padding.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      penalty_mask: for outputs by token, the field `[B, S]` that is 0 where a token is
        padding; the mean is that over the other tokens.
      power: 1 (the paper's code) or 2 (as printed).
      mesh: the devices that share every batch, see `sharding`; by default those that
        the parameters are on.

    Returns:
      `f64[T, len(datasets)]`.

    Raises:
      ValueError: there is no task vector or no dataset, a dataset has no sample, or a
        batch is no dict or lacks a field.

    Example:
      >>> batch = {"image": np.eye(2), "mask": np.array([True, True])}
      >>> taus = [{"w": np.float32([[3.0, 4.0], [0.0, 0.0]])}]
      >>> f = lambda params, x: x @ params["w"]
      >>> print(matrix(f, {"w": np.zeros((2, 2), "f4")}, taus, [[batch]]))
      [[2.5]]
    """
    if not datasets:
        raise ValueError("the τJp matrix needs at least one dataset; found 0.")
    mesh = sharding.for_tasks(mesh or sharding.mesh_of((params_0, tuple(taus))), 1)
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)  # once
    columns = []
    for number, batches in enumerate(datasets):
        sums, samples = np.zeros(len(taus)), 0
        for batch in batches:
            values = sharding.spread(fields_of(batch, inputs), mesh)
            mask = mask_of(batch)
            if penalty_mask is not None:
                [tokens] = fields_of(batch, [penalty_mask])
                mask = mask[:, None] & (np.asarray(tokens) != 0)
            counted = np.zeros((len(values[0]), *mask.shape[1:]), bool)
            counted[: len(mask)] = mask  # what `spread` filled up does not count
            means = _means(
                apply_fn,
                power,
                mesh,
                params_0,
                taus,
                values,
                *sharding.spread((counted,), mesh),
            )
            sums += np.asarray(means) * np.sum(mask)
            samples += int(np.sum(mask))
        if not samples:
            raise ValueError(f"dataset {number} has no sample to measure τJp on.")
        columns.append(sums / samples)
    return np.stack(columns, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _means(apply_fn, power, mesh, params_0, taus, inputs, mask):
    apply_fn = sharding.on_mesh(apply_fn, mesh)
    _, tangents = tangent.jvps(apply_fn, params_0, taus, *inputs)
    means = jax.vmap(lambda moved: penalty(moved, mask, power))(tangents)
    return sharding.constrain(means, mesh, P())  # every process reads them
