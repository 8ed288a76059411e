r"""Model Breadcrumbs: task vectors without outliers and negligible entries.

Davari, Belilovsky. Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
Masks. ECCV 2024. arXiv:2312.06795.

.. math:: \theta_0 + \alpha \sum_t m_t^{\beta,\gamma} \odot \tau_t,

The mask keeps the entries of a layer whose magnitude lies between the quantiles β and
γ.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.typing import Coef, Params, Taus


def breadcrumbs(
    params_0: Params,
    taus: Taus,
    *,
    beta: float = 0.85,
    gamma: float = 0.993,
    coef: Coef = 0.3,
    axis: Callable[[str], int] | None = None,
) -> Params:
    """Drops the smallest and the largest entries of task vectors, and adds the rest.

    Every leaf counts as a layer. From its n entries, ⌊βn⌋ are dropped as negligible and
    ⌊(1-γ)n⌋ as outliers. So a small leaf loses no outlier. Entries that equal the
    smallest or the largest kept entry stay too.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      beta: the share of entries that are dropped as negligible, in [0, 1).
      gamma: the quantile above which entries are outliers, in (beta, 1]. mergekit's
        `density` is gamma - beta, and its `gamma` is 1 - gamma.
      coef: the coefficient α: one number, one per task `[T]`, or either by path.
      axis: None takes the quantiles over a whole leaf, as the paper says. Else it is a
        function of the path that returns an axis, and the quantiles are taken over each
        row along this axis. `axis=merge.input_axis` does so for the rows of PyTorch
        weights, as the authors' code does.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `beta` or `gamma` out of range, no task vector, one that does not fit,
        non-finite values, or a wrong number of coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(5)}
      >>> taus = [{"w": jnp.array([0.1, -9.0, 2.0, -3.0, 0.2])}]
      >>> print(breadcrumbs(params_0, taus, beta=0.4, gamma=0.8, coef=1.0)["w"])
      [ 0.  0.  2. -3.  0.]
    """
    if not 0 <= beta < gamma <= 1:
        raise ValueError(
            f"beta is {beta} and gamma is {gamma}; expected quantiles with 0 <= beta < "
            "gamma <= 1."
        )
    _leaves.check(params_0, taus)
    coefs = _leaves.task_coefs(coef, taus)
    limits = {}
    for path, row in tree.aligned(taus).items():
        if not row[0].size:
            continue
        along = axis(path) if axis is not None and row[0].ndim > 1 else None
        size = row[0].size if along is None else row[0].shape[along]
        low = min(floor_share(beta, size), size - 1)
        ranks = [low + 1, max(size - floor_share(1 - gamma, size), low + 1)]
        if along is None:
            limits[path] = [_order.kth_magnitudes({path: row}, rank) for rank in ranks]
        else:
            limits[path] = _kth_of_rows(row, ranks, along)
    return _leaves.fold(_merge_leaf, params_0, taus, coefs, limits)


def floor_share(share: float, size: int) -> int:
    """Returns ⌊share · size⌋, correct even if rounding makes the product too small."""
    return math.floor(round(share * size, 6))


@jax.jit(static_argnames="axis")
def _kth_of_rows(row, ranks, axis):
    """Returns, for each rank and task, the magnitude with this rank in every row."""
    sizes = [jnp.sort(jnp.abs(leaf), axis=axis) for leaf in row]
    return [[jnp.take(x, jnp.array([k - 1]), axis) for x in sizes] for k in ranks]


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, coefs, limits):
    kept = [
        jnp.where((jnp.abs(tau) >= smallest) & (jnp.abs(tau) <= largest), tau, 0)
        for tau, smallest, largest in zip(taus, *limits, strict=True)
    ]
    return leaf_0 + sum(coef * tau for coef, tau in zip(coefs, kept, strict=True))
