r"""Outputs of a model at many coefficients, in one pass over the data.

`forward` reads the data once for every set of coefficients. Here every batch is read
and placed once, and one compiled program evaluates all models on it.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import sharding
from jaxarith.batches import fields_of, mask_of
from jaxarith.evaluate.outputs import check_any, unpadded
from jaxarith.merge import task_arithmetic
from jaxarith.tree import settled
from jaxarith.typing import ApplyFn, Numbers, Params, Taus

Coefs = Sequence[Numbers] | np.ndarray


def _whole(outputs):
    return outputs


def sweep(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    batches: Iterable[dict],
    coefs: Coefs,
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
    readout: Callable[[jax.Array], jax.Array] = _whole,
) -> np.ndarray:
    r"""Outputs of :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)` at many coefficients.

    Every device computes other coefficients, on all samples. If there are fewer
    coefficients than devices, several devices share the samples. So n passes take the
    time of n over the number of devices. Each device holds the whole model and all task
    vectors, and none waits for another, whatever axes the mesh has. If all coefficients
    of a point are equal, pass the sum of the task vectors as the only vector. A point
    that is given twice is computed once.

    Args:
      apply_fn, params_0, taus, batches, inputs: as for `forward`; the batches are read
        once, so they may be a stream.
      coefs: n sets of coefficients, `[n, T]`, such as the points of a ξ grid.
      mesh: the devices; by default all.
      readout: reduces the outputs `[B, ...]` of a batch, or of one device's part of a
        batch, before they are kept: to predicted labels, for example. The outputs at
        all coefficients may be more than the host can hold.

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
    several = [(taus, coefs)]
    [found] = sweep_all(
        apply_fn, params_0, several, batches, inputs, mesh=mesh, readout=readout
    )
    return found


def sweep_all(
    apply_fn: ApplyFn,
    params_0: Params,
    several: Sequence[tuple[Taus, Coefs]],
    batches: Iterable[dict],
    inputs: Sequence[str] = ("image",),
    *,
    mesh: Mesh | None = None,
    readout: Callable[[jax.Array], jax.Array] = _whole,
) -> list[np.ndarray]:
    r"""`sweep` of several lists of task vectors, in one pass over the data.

    It compares merges. A merge whose coefficient scales its result is one vector, the
    difference of its model and :math:`\theta_0`, and λ is the coefficient of that
    vector. Lists of equally many vectors with leaves of the same shapes share one
    compiled program. At coefficients that are all 0 every list has the same model,
    which is evaluated once.

    Args:
      apply_fn, params_0, batches, inputs, mesh, readout: as for `sweep`.
      several: pairs of task vectors and coefficients, as `sweep` takes them. Each
        device holds the vectors of all pairs.

    Returns:
      For each pair `[n, N, ...]`.

    Raises:
      ValueError: there is no pair, or the coefficients of a pair are not `[n, T]`.

    Example:
      >>> f = lambda params, x: params["w"] * x
      >>> batch = {"image": np.ones(1, np.float32), "mask": np.ones(1, bool)}
      >>> start = {"w": np.float32(1)}
      >>> several = [([{"w": np.float32(w)}], [[0.0], [1.0]]) for w in (2, 5)]
      >>> for found in sweep_all(f, start, several, [batch]):
      ...     print(found.T)
      [[1. 3.]]
      [[1. 6.]]
    """
    if not several:
        raise ValueError("no task vectors to sweep; give at least one pair.")
    groups = [tuple(taus) for taus, _ in several]
    points = [
        _checked(coefs, len(taus))
        for (_, coefs), taus in zip(several, groups, strict=True)
    ]
    distinct, places = _distinct(points)
    mesh = _shared_by(mesh or sharding.make_mesh(), max(map(len, distinct)))
    params_0, groups = sharding.put((params_0, groups), NamedSharding(mesh, P()))
    # Few programs serve sweeps of all lengths: each has room for eight points on every
    # device, and a longer sweep is several calls.
    calls = [
        (taus, _placed(part, mesh))
        for taus, own in zip(groups, distinct, strict=True)
        for part in _parts(own, _ROOM * mesh.shape["task"])
    ]
    rows = []
    for batch in batches:
        fields = sharding.spread(fields_of(batch, inputs), mesh)
        mask, at_batch = mask_of(batch), []
        for taus, (each, room, order) in calls:
            model = (apply_fn, readout, mesh, params_0, taus)
            found = settled(_at_all(*model, each, room, *fields))
            at_batch.append(unpadded(found, mask, axis=1)[order])
        rows.append(np.concatenate(at_batch))
    check_any(rows)
    found = np.concatenate(rows, axis=1)
    return [_at(found, own) for own in places]


_ROOM = 8


def _checked(coefs, tasks):
    points = np.asarray(coefs, np.float32)
    if points.ndim != 2 or points.shape[1] != tasks or not len(points):
        raise ValueError(
            f"coefficients of shape {list(points.shape)} for {tasks} task vectors; "
            "expected [n, T]."
        )
    return points


def _distinct(groups):
    """Leaves out points that have the same model as an earlier point.

    Args:
      groups: for each list of vectors its points, `[n, T]`.

    Returns:
      For each list the points to compute, `[m, T]`; and for each list the places of its
      n points among all computed ones, which are numbered through all lists.
    """
    known, distinct, places = {}, [], []
    for number, points in enumerate(groups):
        own, found = [], []
        for point in points:
            # At coefficients 0 all lists have the model θ0.
            key = (number, *point.tolist()) if point.any() else ()
            if key not in known:
                known[key] = len(known)
                own.append(point)
            found.append(known[key])
        distinct.append(np.array(own, np.float32).reshape(-1, points.shape[1]))
        places.append(found)
    return distinct, places


def _at(found, places):
    """`found[places]`, without a copy if that is `found`."""
    return found if places == list(range(len(found))) else found[places]


def _shared_by(mesh, points):
    """The devices of a mesh, with the axis `task` for points and `data` for samples."""
    size = max(n for n in range(1, min(points, mesh.size) + 1) if mesh.size % n == 0)
    devices = mesh.devices.reshape(size, mesh.size // size, 1)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _parts(points, size):
    return np.array_split(points, -(-len(points) // size)) if len(points) else []


def _placed(coefs, mesh):
    """Shares points among the devices.

    Returns:
      The number of points of each device, the points with room for `_ROOM` on every
      device, and the places of the points in that room.
    """
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
