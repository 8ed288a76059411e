r"""The merge that disturbs every task's own model least, by curvature.

.. math:: \arg\min_\tau \sum_t (\tau - \tau_t)^\top G_t\,(\tau - \tau_t)

In the tangent space :math:`(\tau - \tau_t)^\top G_t (\tau - \tau_t)` is the mean
squared distance of the merged features from those of task t's model, on the inputs of
task t. Given G, which `jaxarith.curvature` measures once, no sample is needed. That is
the problem of Tam, Bansal, Raffel. Merging by Matching Models in Task Parameter
Subspaces. TMLR 2024. arXiv:2312.04339, with the Gram matrix of the Jacobian of features
in the place of the Fisher information.
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
    r"""The minimiser of :math:`\sum_t (\tau-\tau_t)^\top G_t(\tau-\tau_t)`.

    Conjugate gradients from the mean of the task vectors, which is what the directions
    that no task's features notice keep. Few steps move only along what matters most.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      curvatures: for every task its curvature on its own inputs, such as
        `jaxarith.curvature.collect` measures: at `params_0` or, which was better where
        it was tried, at the task's own fine-tuned model.
      coef: scaling coefficient of the merged vector.
      steps: steps of conjugate gradients, each T products.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not one curvature per task, one that was not measured for a leaf of
        the task vectors, no task vector, or one that does not fit.

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
        raise ValueError(f"steps is {steps}; at least 1 is needed.")
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
