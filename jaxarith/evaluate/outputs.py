"""Outputs of edited models on a dataset, as functions of coefficients.

A search, a ξ grid and a curve all need the outputs on a dataset as a function of the
coefficients of some task vectors. There are two ways to compute it. `forward` runs the
network once for every set of coefficients; `sweeps` does so for many sets in one pass
over the data. `tangent` runs the network only once: a linearised model is affine in
the coefficients, so f(x; θ0) and J(x; θ0)τ_t are cached, and every later set of
coefficients costs a weighted sum.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxarith import sharding
from jaxarith import tangent as tangents
from jaxarith.batches import fields_of, mask_of
from jaxarith.merge import task_arithmetic
from jaxarith.tree import settled
from jaxarith.typing import ApplyFn, Numbers, Params, Taus

# Coefficients [T] to outputs [N, …].
OutputsAt = Callable[[Any], np.ndarray]


def outputs(
    apply_fn: ApplyFn,
    params: Params,
    batches: Iterable[dict],
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Returns the model's outputs on every sample that is not padding.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [B, ...]`.
      params: its parameters.
      batches: dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them. Without a mask all samples count.
        They are read once, in order, so they may be a stream.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      mesh: the devices that share every batch, see `sharding`; by default the devices
        that hold the parameters.

    Returns:
      `[N, ...]`, where N is the number of True entries in all masks.

    Raises:
      ValueError: there is no batch, a batch is not a dict or lacks a field, or the
        model does not return one array.
    """
    mesh = sharding.for_tasks(mesh or sharding.mesh_of(params), 1)
    params = sharding.shard(params, mesh)  # once, not with every batch
    rows = [
        (settled(_apply(apply_fn, mesh, params, *_inputs(b, inputs, mesh))), mask_of(b))
        for b in batches
    ]
    check_any(rows)
    return np.concatenate([unpadded(*row) for row in rows])


def check_any(rows: Sequence) -> None:
    """Raises a ValueError if the batches gave no rows."""
    if not rows:
        raise ValueError(
            "there is no batch to evaluate on. Batches that are read several times "
            "must be a list, or a stream that can be read again, not a generator."
        )


def _inputs(batch, inputs, mesh):
    return sharding.spread(fields_of(batch, inputs), mesh)


# Compiled once per model and shape, however many datasets and coefficients follow.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(apply_fn, mesh, params, *inputs):
    found = sharding.on_mesh(apply_fn, mesh)(params, *inputs)
    if not isinstance(found, jax.Array | np.ndarray):
        raise ValueError(
            f"apply_fn returned a {type(found).__name__}; expected one array [B, ...]. "
            "Pass a function that returns only the outputs."
        )
    return sharding.constrain(found, mesh, P())  # every process reads all of it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jvps(apply_fn, mesh, params_0, taus, *inputs):
    apply_fn = sharding.on_mesh(apply_fn, mesh)
    found = tangents.jvps(apply_fn, params_0, taus, *inputs)
    return sharding.constrain(found, mesh, P())


@jax.jit
def _edit(params_0, taus, coefs):
    return task_arithmetic(params_0, taus, coef=coefs)


def unpadded(rows: jax.Array, mask: np.ndarray, axis: int = 0) -> np.ndarray:
    """Returns the rows on the host, without padding."""
    # The mask has the length of the batch. Rows beyond it filled up the devices.
    return np.compress(mask, np.asarray(rows), axis)


def labels(batches: Sequence[dict]) -> np.ndarray:
    """Returns the labels of all samples except padding, in the order of `outputs`."""
    rows = [np.asarray(fields_of(b, ["label"])[0])[mask_of(b)] for b in batches]
    check_any(rows)
    return np.concatenate(rows)


def forward(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    batches: Sequence[dict],
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
) -> OutputsAt:
    r"""Returns the outputs of the network as a function of the coefficients.

    They are :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)`. Every call is a pass over
    the data.
    """
    mesh = sharding.for_tasks(mesh or sharding.mesh_of((params_0, tuple(taus))), 1)
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)

    def at(coefs):
        params = _edit(params_0, taus, np.asarray(coefs, np.float32))
        return outputs(apply_fn, params, batches, inputs, mesh=mesh)

    return at


class TangentOutputs(NamedTuple):
    r"""Outputs of :math:`f(x;\theta_0) + \sum_t \lambda_t J(x;\theta_0)\tau_t`.

    A call with coefficients `[T]` returns the outputs `[N, ...]`, in float32 or better,
    without running the network.

    Attributes:
      f0: the pre-trained model's outputs, `[N, ...]`.
      moves: the tangents of the T task vectors, `[T, N, ...]`.
    """

    f0: np.ndarray
    moves: np.ndarray

    def __call__(self, coefs: Numbers) -> np.ndarray:
        dtype = np.promote_types(self.f0.dtype, np.float32)
        weights = np.asarray(coefs, dtype)
        if weights.shape != (len(self.moves),):
            raise ValueError(
                f"coefficients of shape {weights.shape} for {len(self.moves)} task "
                "vectors; give one for each."
            )
        moves = self.moves.astype(dtype, copy=False)
        # Not `tensordot`: the threads of BLAS would wait for the threads of XLA.
        moved = np.einsum("t,t...->...", weights, moves)
        return self.f0.astype(dtype, copy=False) + moved


def tangent(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    batches: Iterable[dict],
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
) -> TangentOutputs:
    """Returns the outputs of the linearised model as a function of the coefficients.

    One linearisation per batch serves all task vectors. The T + 1 outputs of every
    sample are kept in host memory, and calls only sum them. Computing them costs as
    much as 1 + 2T forward passes. If all vectors share one coefficient, pass their sum
    (`task_vectors.add`) as the only vector: that costs 3 forward passes.
    """
    mesh = sharding.for_tasks(mesh or sharding.mesh_of((params_0, tuple(taus))), 1)
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)
    rows = [
        (
            *settled(_jvps(apply_fn, mesh, params_0, taus, *_inputs(b, inputs, mesh))),
            mask_of(b),
        )
        for b in batches
    ]
    check_any(rows)
    return TangentOutputs(
        np.concatenate([unpadded(f0, mask) for f0, _, mask in rows]),
        np.concatenate([unpadded(moves, mask, 1) for _, moves, mask in rows], axis=1),
    )
