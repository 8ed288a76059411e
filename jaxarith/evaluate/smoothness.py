r"""The smoothness of a loss: the spectral norm of its Hessian, by power iteration.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. Its assumption 4.2
calls

.. math:: L_i = \|H_i(\theta_i)\|_2

the local smoothness of the loss of task i: the largest *magnitude* of an eigenvalue of
its Hessian at the fine-tuned model. For figure 6, the paper estimates it by power
iteration (von Mises, Pollaczek-Geiringer 1929) on products of the Hessian with vectors.
`bounds` says what L bounds, and at which other points it must be measured.

Such a product is the forward derivative of a gradient. It forms no matrix. It costs a
pass over the data, which takes two to three times as much as a training pass.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxarith import sharding, task_vectors, tree
from jaxarith.batches import fields_of, mask_of
from jaxarith.typing import ApplyFn, Params, Tree

# loss(outputs, *targets) -> [B]: the loss of every sample.
SampleLoss = Callable[..., jax.Array]


class Eigenvalue(NamedTuple):
    r"""The result of power iteration on a Hessian.

    Attributes:
      value: :math:`\lambda = v^\top H v` of the last unit vector v, with its sign.
      residual: :math:`\|Hv - \lambda v\|`. Some eigenvalue is at most this far from
        `value`.
      iterations: the number of products with H, each a pass over the data.
    """

    value: float
    residual: float
    iterations: int

    @property
    def smoothness(self) -> float:
        r""":math:`\|Hv\|`, the estimate of L; it is never above L.

        After convergence, it is the magnitude of `value`. If λ and -λ are both largest,
        no vector converges, but this estimate does.
        """
        return math.hypot(self.value, self.residual)


def largest_eigenvalue(
    apply_fn: ApplyFn,
    loss_fn: SampleLoss,
    params: Params,
    batches: Iterable[dict],
    *,
    key: jax.Array,
    part: Tree | None = None,
    inputs: Sequence[str] = ("image",),
    targets: Sequence[str] = ("label",),
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    mesh: Mesh | None = None,
) -> Eigenvalue:
    r"""Finds the eigenvalue of largest magnitude of the Hessian of a mean loss.

    .. math:: H = \nabla^2_\theta \frac1N \sum_n \ell(f(x_n; \theta), y_n)

    For a linearised model, pass `tangent.linearize(apply_fn, params_0)` as `apply_fn`.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      loss_fn: `loss_fn(outputs, *targets) -> [B]`, the loss of every sample, such as
        `optax.softmax_cross_entropy_with_integer_labels`. Calls with the same
        `loss_fn` and `apply_fn` compile them only once.
      params: parameters at which the Hessian is taken.
      batches: dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them; padding may hold anything. Every
        iteration reads them once, so give a list, or a stream that can be read again.
      key: random key of the first vector.
      part: a task vector, or any tree with the leaves to differentiate; by default all
        floating-point leaves.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      targets: the fields that are passed to `loss_fn`, in order.
      tolerance: the iteration ends when the residual is at most this share of
        `smoothness`.
      max_iterations: the largest number of iterations; the residual shows how far they
        have converged.
      mesh: the devices that share every batch, see `sharding`; by default the devices
        that hold the parameters.

    Returns:
      The value in float32 or better, with its residual.

    Raises:
      ValueError: there is no sample; a later pass has another number of samples; the
        losses are not `[B]`; a number is not finite; `max_iterations` is below 1; or
        `part` does not fit `params`.

    Example:
      >>> x = np.array([[2.0, 0.0], [0.0, 1.0]])  # H is diag(4, 1) / 2
      >>> batch = {"image": x, "label": np.zeros(2), "mask": np.ones(2, bool)}
      >>> found = largest_eigenvalue(
      ...     lambda params, x: x @ params["w"],
      ...     optax.l2_loss,
      ...     {"w": jnp.zeros(2)},
      ...     [batch],
      ...     key=jax.random.key(0),
      ... )
      >>> round(found.value, 4)
      2.0
    """
    from tqdm import tqdm  # here, so that importing this stays light

    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; at least 1 is needed.")
    part = tree.floating(params) if part is None else part
    tree.check_part(part, params)
    mesh = sharding.for_tasks(mesh or sharding.mesh_of(params), 1)
    params = sharding.shard(params, mesh)  # once, not with every batch
    v = _unit(_normal(key, tree.restrict(params, tree.flatten(part))))
    v = sharding.shard(v, mesh)
    add = functools.partial(_add, apply_fn, loss_fn, mesh, len(inputs))
    samples, found = 0, Eigenvalue(math.nan, math.nan, 0)
    for iteration in tqdm(
        range(1, max_iterations + 1), "power iteration", unit="pass", leave=False
    ):
        total, count = jax.tree.map(jnp.zeros_like, v), 0
        for batch in batches:
            mask = mask_of(batch)
            if mask.any():
                fields = _placed(batch, (*inputs, *targets), mask, mesh)
                total = tree.settled(add(total, v, params, *fields))
                count += int(mask.sum())
        if not count or count != (samples or count):
            raise ValueError(
                f"pass {iteration} over the batches has {count} samples; the first had "
                f"{samples or count}. Every iteration reads all batches: give a list, "
                "or a stream that can be read again, with at least one sample."
            )
        samples = count
        value, residual, v = _step(v, total, count)
        found = Eigenvalue(float(value), float(residual), iteration)
        if not math.isfinite(found.smoothness):
            raise ValueError(
                "a product of the Hessian with a vector is not finite; look for NaN "
                "and huge numbers in the parameters and in the data."
            )
        if found.residual <= tolerance * found.smoothness:
            break
    return found


def of_samples(loss_fn: SampleLoss, outputs: Tree, targets: Sequence) -> jax.Array:
    """Returns the losses `[B]`; raises a ValueError if they have another shape."""
    losses = loss_fn(outputs, *targets)
    size = len(jax.tree.leaves(outputs)[0])
    if jnp.shape(losses) != (size,):
        raise ValueError(
            f"loss_fn returned losses of shape {list(jnp.shape(losses))} for {size} "
            "samples; expected the loss of every sample, [B], not their mean."
        )
    return losses


def _normal(key, part):
    def leaf(path, value):
        dtype = jnp.promote_types(jnp.result_type(value), jnp.float32)
        return jax.random.normal(task_vectors.leaf_key(key, path), value.shape, dtype)

    return tree.map_with_path(leaf, part)


@jax.jit
def _unit(v):
    return optax.tree.scale(1 / optax.tree.norm(v), v)


def _placed(batch, names, mask, mesh):
    """Returns the mask and fields of a batch on the devices.

    A real sample replaces padding, for which a network may return NaN. Padding does not
    count, but 0 · NaN would.
    """
    rows = np.where(mask, np.arange(len(mask)), mask.argmax())
    fields = tuple(np.asarray(field)[rows] for field in fields_of(batch, names))
    mask = np.pad(mask, (0, -len(mask) % sharding.batch_shards(mesh)))
    return sharding.spread((mask, *fields), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="total")
def _add(apply_fn, loss_fn, mesh, count, total, v, params, mask, *fields):
    """Adds to `total` the product of `v` and the Hessian of a batch's summed loss."""
    model = sharding.on_mesh(apply_fn, mesh)

    def summed(part):
        outputs = model(tree.update(params, part), *fields[:count])
        losses = of_samples(loss_fn, outputs, fields[count:])
        return jnp.sum(losses, where=mask)

    start = tree.restrict(params, tree.flatten(v))
    _, product = jax.jvp(jax.grad(summed), (start,), (tree.fill(v, start),))
    total = jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, product)
    return sharding.pin(total, mesh)


@jax.jit
def _step(v, total, count):
    """Returns the eigenvalue and its residual at `v`, and the next vector."""
    moved = optax.tree.scale(1 / count, total)
    value = optax.tree.vdot(v, moved)
    residual = optax.tree.norm(optax.tree.add_scale(moved, jnp.negative(value), v))
    return value, residual, _unit(moved)
