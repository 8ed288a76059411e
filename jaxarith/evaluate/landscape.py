r"""Losses of edited models at many coefficients of task vectors.

On the plane of two task vectors through the pre-trained model, Ortiz-Jimenez et al.
(2023) measure weight disentanglement (`evaluate.disentanglement_error`). The losses on
that plane show the basins of the tasks and where they meet. `bounds` bounds the gaps
between losses.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from jaxarith import evaluate, sharding
from jaxarith.batches import fields_of, mask_of
from jaxarith.evaluate.smoothness import SampleLoss, of_samples
from jaxarith.typing import ApplyFn, Params, Taus


def losses(
    apply_fn: ApplyFn,
    loss_fn: SampleLoss,
    params_0: Params,
    taus: Taus,
    batches: Iterable[dict],
    coefs: ArrayLike,
    *,
    linearized: bool = False,
    inputs: Sequence[str] = ("image",),
    targets: Sequence[str] = ("label",),
    mesh: Mesh | None = None,
) -> np.ndarray:
    r"""The mean loss at :math:`\theta_0 + \sum_t \lambda_t\tau_t` at many λ.

    All coefficients share one pass over the data. A network runs once per batch for
    each of them (`evaluate.sweep`). The linearised model costs 1 + 2T runs per batch in
    all (`evaluate.tangent`).

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs[B, ...]`.
      loss_fn: `loss_fn(outputs, *targets) -> [B]`, the loss of every sample, such as
        `optax.softmax_cross_entropy_with_integer_labels`.
      params_0: the pre-trained parameters.
      taus: T task vectors.
      batches: dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them; they are read once, so they may
        be a stream.
      coefs: coefficients `[..., T]`, with any number of leading axes.
      linearized: whether the vectors belong to the tangent-space model.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      targets: the fields that are passed to `loss_fn`, in order.
      mesh: the devices. For a network the default is all devices; each computes other
        coefficients. For the linearised model it is the devices that hold the
        parameters; they share every batch.

    Returns:
      `f64[...]`. Far from the model a loss may be infinite or NaN.

    Raises:
      ValueError: there is no sample, losses are not `[B]`, or the numbers of
        coefficients and of task vectors differ.

    Example:
      >>> f = lambda params, x: x @ params["w"]
      >>> squares = lambda outputs, label: (outputs - label) ** 2
      >>> data = {"image": np.eye(2), "label": np.ones(2), "mask": np.ones(2)}
      >>> taus = [{"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}]
      >>> plane = np.stack(np.meshgrid([0, 1, 2], [0, 1], indexing="ij"), axis=-1)
      >>> print(losses(f, squares, {"w": np.zeros(2, "f4")}, taus, [data], plane))
      [[1.  0.5]
       [0.5 0. ]
       [1.  0.5]]
    """
    points = np.asarray(coefs, np.float32)
    rows = points.reshape(-1, points.shape[-1] if points.ndim else 1)
    batches = _with_samples(batches)
    if linearized:
        found = _of_tangents(
            apply_fn, loss_fn, params_0, taus, batches, rows, inputs, targets, mesh
        )
    else:
        model = _Losses(apply_fn, loss_fn, len(inputs))
        fields = (*inputs, *targets)
        found = evaluate.sweep(model, params_0, taus, batches, rows, fields, mesh=mesh)
    return found.mean(axis=1, dtype=np.float64).reshape(points.shape[:-1])


def _with_samples(batches):
    found = False
    for batch in batches:
        if mask_of(batch).any():
            found = True
            yield batch
    if not found:
        raise ValueError("the batches hold no sample to measure a loss on.")


@dataclasses.dataclass(frozen=True)  # equal ones are compiled once
class _Losses:
    """The model with its loss: from parameters and fields to losses `[B]`."""

    apply_fn: ApplyFn
    loss_fn: SampleLoss
    inputs: int

    def __call__(self, params, *fields):
        outputs = self.apply_fn(params, *fields[: self.inputs])
        return of_samples(self.loss_fn, outputs, fields[self.inputs :])


def _of_tangents(
    apply_fn, loss_fn, params_0, taus, batches, coefs, inputs, targets, mesh
):
    """Losses `[n, N]` of the linearised model."""
    if coefs.shape[1] != len(taus):
        raise ValueError(
            f"{coefs.shape[1]} coefficients for {len(taus)} task vectors; give one for "
            "each."
        )
    mesh = sharding.for_tasks(mesh or sharding.mesh_of((params_0, tuple(taus))), 1)
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)  # once
    rows = []
    for batch in batches:
        at = evaluate.tangent(apply_fn, params_0, taus, [batch], inputs, mesh=mesh)
        mask = mask_of(batch)
        fields = (np.asarray(field)[mask] for field in fields_of(batch, targets))
        rows.append(np.asarray(_at_all(loss_fn, coefs, *at, *fields)))
    return np.concatenate(rows, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _at_all(loss_fn, coefs, f0, moves, *targets):
    def at(coefs):
        moved = sum(coef * move for coef, move in zip(coefs, moves, strict=True))
        return of_samples(loss_fn, f0 + moved, targets)

    return jax.lax.map(at, coefs)
