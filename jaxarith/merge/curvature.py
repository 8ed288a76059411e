r"""Merging by curvature: changes the features of all tasks' own models least.

.. math:: \arg\min_\tau \sum_t (\tau - \tau_t)^\top G_t\,(\tau - \tau_t)

In the tangent space :math:`(\tau - \tau_t)^\top G_t (\tau - \tau_t)` is the mean
squared distance between the features of the merged model and of task t's model, on the
inputs of task t. `jaxarith.curvature` measures G once; then no sample is needed.

Tam, Bansal, Raffel. Merging by Matching Models in Task Parameter Subspaces. TMLR 2024.
arXiv:2312.04339. They solve the same problem with the Fisher information. Here G is the
Gram matrix of the Jacobian of features.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jaxarith import task_vectors, tree
from jaxarith.merge import _leaves
from jaxarith.typing import Number, Params, Quadratic, Taus


def curvature(
    params_0: Params,
    taus: Taus,
    curvatures: Sequence[Quadratic],
    *,
    coef: Number = 1.0,
    steps: int = 100,
) -> Params:
    r"""Merges by the minimiser of :math:`\sum_t (\tau-\tau_t)^\top G_t(\tau-\tau_t)`.

    Conjugate gradients start from the mean of the task vectors. Directions that change
    no task's features keep their mean. A few steps move only along the directions that
    change the features most.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      curvatures: for every task, the curvature on its own inputs, for example from
        `jaxarith.curvature.collect`. Measure it at `params_0` or at the task's own
        fine-tuned model; the latter was better in our experiments.
      coef: coefficient of the merged vector, one number.
      steps: number of steps of conjugate gradients; each step takes T products.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a wrong number of curvatures, a curvature that was not measured for a
        leaf of the task vectors, `steps` below 1, no task vector, or one that does not
        fit.

    Example:
      >>> from jaxarith import curvature as curvatures
      >>> params_0 = {"w": jnp.zeros((2, 1))}
      >>> inputs = [[[1.0, 0.0]], [[0.0, 1.0]]]
      >>> found = [
      ...     curvatures.collect(
      ...         lambda params, x: x @ params["w"],
      ...         params_0,
      ...         [{"image": jnp.array(x)}],
      ...         probes=None,
      ...     )
      ...     for x in inputs
      ... ]
      >>> taus = [{"w": jnp.array([[1.0], [5.0]])}, {"w": jnp.array([[6.0], [2.0]])}]
      >>> print(curvature(params_0, taus, found)["w"].T)
      [[1. 2.]]
    """
    _leaves.check(params_0, taus)
    _leaves.one_each(curvatures, len(taus), "curvatures")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    paths = {path for tau in taus for path in tree.flatten(tau)}
    start = tree.restrict(params_0, paths)
    filled = tuple(_filled(tau, start) for tau in taus)
    merged = _solved(filled, tuple(curvatures), steps)
    scaled = jax.tree.map(lambda leaf: leaf * coef, merged)
    return task_vectors.apply(params_0, scaled)


def _filled(tau, like):
    leaves = tree.flatten(tau)

    def leaf(path, own):
        dtype = tree.wide_dtype(own)
        found = leaves.get(path)
        return jnp.zeros(own.shape, dtype) if found is None else found.astype(dtype)

    return tree.map_with_path(leaf, like)


@functools.partial(jax.jit, static_argnames="steps")
def _solved(taus, curvatures, steps):
    def total(parts):
        return jax.tree.map(lambda *leaves: tree.total(leaves), *parts)

    def products(tau):
        return total([one.product(tau) for one in curvatures])

    pairs = zip(taus, curvatures, strict=True)
    target = total([one.product(tau) for tau, one in pairs])
    mean = jax.tree.map(lambda leaf: leaf / len(taus), total(taus))
    found, _ = cg(products, target, x0=mean, maxiter=steps)
    return found
