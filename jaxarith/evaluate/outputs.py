"""Outputs of edited models, and what is read off them.

Everything that varies coefficients (a search, a ξ grid, a curve) needs one thing: the
outputs on a dataset as a function of the coefficients of some task vectors. There are
two ways to get it. `forward` runs the network once per set of coefficients. `tangent`
runs it once in all: a linearised model is affine in the coefficients, so f(x; θ0) and
J(x; θ0)τ_t are cached and every later set of coefficients costs a weighted sum.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
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
    """The model's outputs on every sample that is not padding.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [B, ...]`.
      params: its parameters.
      batches: dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them; without a mask, all samples
        count. They are read once, in order, so they may be a stream.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      mesh: the devices that share every batch, see `sharding`; by default those that
        the parameters are on.

    Returns:
      `[N, ...]`, N being the number of True entries of all masks.

    Raises:
      ValueError: there is no batch, a batch is no dict or lacks a field, or the model
        gives no single array.
    """
    mesh = sharding.for_tasks(mesh or sharding.mesh_of(params), 1)
    params = sharding.shard(params, mesh)  # once, not with every batch
    rows = [
        (settled(_apply(apply_fn, mesh, params, *_inputs(b, inputs, mesh))), mask_of(b))
        for b in batches
    ]
    _check_any(rows)
    return np.concatenate([_unpadded(*row) for row in rows])


def _check_any(rows):
    if not rows:
        raise ValueError(
            "there is no batch to evaluate on. Batches that are read several times "
            "must be a list, or a stream that every pass makes anew, not a generator."
        )


def _inputs(batch, inputs, mesh):
    return sharding.spread(fields_of(batch, inputs), mesh)


# Compiled once per model and shape, however many datasets and coefficients follow.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(apply_fn, mesh, params, *inputs):
    found = sharding.on_mesh(apply_fn, mesh)(params, *inputs)
    if not isinstance(found, jax.Array | np.ndarray):
        raise ValueError(
            f"apply_fn gave a {type(found).__name__}; expected one array [B, ...]. "
            "Pass a function that returns the outputs alone."
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


def _unpadded(rows, mask, axis=0):
    # A mask is as long as its batch; more rows than that filled up the devices.
    return np.compress(mask, np.asarray(rows), axis)


def labels(batches: Sequence[dict]) -> np.ndarray:
    """The labels of every sample that is not padding, in the order of `outputs`."""
    rows = [np.asarray(fields_of(b, ["label"])[0])[mask_of(b)] for b in batches]
    _check_any(rows)
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
    r"""Outputs of :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)`; a pass per call."""
    mesh = sharding.for_tasks(mesh or sharding.mesh_of((params_0, tuple(taus))), 1)
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)

    def at(coefs):
        params = _edit(params_0, taus, np.asarray(coefs, np.float32))
        return outputs(apply_fn, params, batches, inputs, mesh=mesh)

    return at


def sweep(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    batches: Iterable[dict],
    coefs: Sequence[Numbers] | np.ndarray,
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
    readout: Callable[[jax.Array], jax.Array] = lambda found: found,
) -> np.ndarray:
    r"""Outputs of :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)` at many coefficients.

    Every device computes other coefficients, on all samples; of fewer coefficients than
    devices, several share the samples. So n passes take the time of n over the number
    of devices. Each holds the whole model and all task vectors, and no device waits for
    another, whatever axes the mesh has. Where all coefficients of a point are equal,
    pass the sum of the task vectors as the only one.

    Args:
      apply_fn, params_0, taus, batches, inputs: as for `forward`.
      coefs: n sets of coefficients, `[n, T]`, such as the points of a ξ grid.
      mesh: the devices; by default all.
      readout: what is kept of the outputs `[B, ...]` of a batch, or of the part of one
        that a device has, such as the predicted labels; all outputs of all coefficients
        may be more than the host can hold.

    Returns:
      `[n, N, ...]`.

    Raises:
      ValueError: `coefs` is not `[n, T]`.

    Example:
      >>> f = lambda params, x: params["w"] * x
      >>> batch = {"image": np.ones(1, np.float32), "mask": np.ones(1, bool)}
      >>> start, tau = {"w": np.float32(1)}, {"w": np.float32(2)}
      >>> print(sweep(f, start, [tau], [batch], [[0.0], [0.5], [1.0]]).T)
      [[1. 2. 3.]]
    """
    points = np.asarray(coefs, np.float32)
    if points.ndim != 2 or points.shape[1] != len(taus) or not len(points):
        raise ValueError(
            f"coefficients of shape {list(points.shape)} for {len(taus)} task vectors; "
            "expected [n, T]."
        )
    mesh = _shared_by(mesh or sharding.make_mesh(), len(points))
    whole = NamedSharding(mesh, P())
    params_0, taus = sharding.put((params_0, tuple(taus)), whole)
    # Few programs serve sweeps of all lengths: each has room for eight points on every
    # device, and a longer sweep is several calls.
    parts = np.array_split(points, -(-len(points) // (_ROOM * mesh.shape["task"])))
    placed = [_placed(part, mesh) for part in parts]
    rows = []
    for batch in batches:
        fields = sharding.spread(fields_of(batch, inputs), mesh)
        at_batch = []
        for each, room, places in placed:
            model = (apply_fn, readout, mesh, params_0, taus)
            found = settled(_at_all(*model, each, room, *fields))
            at_batch.append(_unpadded(found, mask_of(batch), axis=1)[places])
        rows.append(np.concatenate(at_batch))
    _check_any(rows)
    return np.concatenate(rows, axis=1)


_ROOM = 8


def _shared_by(mesh, points):
    """The devices of a mesh, with the axis `task` for points and `data` for samples."""
    size = max(n for n in range(1, min(points, mesh.size) + 1) if mesh.size % n == 0)
    devices = mesh.devices.reshape(size, mesh.size // size, 1)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _placed(coefs, mesh):
    """Points shared by the devices: how many each computes, the room, their places."""
    each = -(-len(coefs) // mesh.shape["task"])
    number = np.arange(len(coefs))
    places = number // each * _ROOM + number % each
    room = np.zeros((_ROOM * mesh.shape["task"], coefs.shape[1]), np.float32)
    room[places] = coefs
    return each, sharding.put(room, NamedSharding(mesh, P("task"))), places


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _at_all(apply_fn, readout, mesh, params_0, taus, each, coefs, *inputs):
    def own(coefs, params_0, taus, each, *inputs):
        @jax.jit  # traced once, for its shape and for the loop
        def at(coefs):
            params = task_arithmetic(params_0, taus, coef=coefs)
            return readout(apply_fn(params, *inputs))

        one = jax.eval_shape(at, coefs[0])
        nothing = jnp.zeros((len(coefs), *one.shape), one.dtype)
        return jax.lax.fori_loop(
            0, each, lambda i, found: found.at[i].set(at(coefs[i])), nothing
        )

    found = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(P("task"), *[P()] * 3, *[P(sharding.BATCH)] * len(inputs)),
        out_specs=P("task", sharding.BATCH),
        check_vma=False,
    )(coefs, params_0, taus, each, *inputs)
    return sharding.constrain(found, mesh, P())


class TangentOutputs(NamedTuple):
    r"""Outputs of :math:`f(x;\theta_0) + \sum_t \lambda_t J(x;\theta_0)\tau_t`.

    Called with coefficients `[T]` it gives the outputs `[N, ...]`, without the network,
    in float32 or better.

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
        # Not `tensordot`: the threads of BLAS wait for those of XLA.
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
    """Outputs of the linearised model as a function of the coefficients.

    One linearisation per batch serves all task vectors; the T + 1 outputs of every
    sample are kept in host memory and calls only sum them. Making them costs 1 + 2T
    forward passes of the network. Where all vectors share one coefficient, their sum
    (`task_vectors.add`) is all that is asked for, at 3 forward passes.
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
    _check_any(rows)
    return TangentOutputs(
        np.concatenate([_unpadded(f0, mask) for f0, _, mask in rows]),
        np.concatenate([_unpadded(moves, mask, 1) for _, moves, mask in rows], axis=1),
    )
