r"""Model Breadcrumbs: task vectors without outliers and negligible entries.

Davari, Belilovsky. Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
Masks. ECCV 2024. arXiv:2312.06795.

.. math:: \theta_0 + \alpha \sum_t m_t^{\beta,\gamma} \odot \tau_t,

where of the entries of a layer, sorted by magnitude, the mask keeps those between the
quantiles β and γ.
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
    """Adds task vectors from which the smallest and the largest entries are dropped.

    Every leaf counts as a layer. Of its n entries ⌊βn⌋ are dropped as negligible and
    ⌊(1-γ)n⌋ as outliers, so a small leaf loses no outlier; entries that are equal to
    the smallest or the largest that is kept stay too.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      beta: the share of entries, in [0, 1), that is too small to matter.
      gamma: the quantile, in (beta, 1], above which entries are outliers. In mergekit's
        terms `density` is gamma - beta, and `gamma` is 1 - gamma.
      coef: the coefficient α: one number, one per task `[T]`, or either by path.
      axis: None takes the quantiles over a whole leaf, as the paper says. A function of
        the path that gives an axis takes them over every row along it: the authors'
        code does so over rows of PyTorch weights, which is `axis=merge.input_axis`.

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
            f"beta is {beta} and gamma {gamma}; they must be quantiles with 0 <= beta "
            "< gamma <= 1."
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
    """⌊share · size⌋, not one less because the product is rounded."""
    return math.floor(round(share * size, 6))


@jax.jit(static_argnames="axis")
def _kth_of_rows(row, ranks, axis):
    """For each rank, that magnitude of every row of a leaf, by task."""
    sizes = [jnp.sort(jnp.abs(leaf), axis=axis) for leaf in row]
    return [[jnp.take(x, jnp.array([k - 1]), axis) for x in sizes] for k in ranks]


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, coefs, limits):
    kept = [
        jnp.where((jnp.abs(tau) >= smallest) & (jnp.abs(tau) <= largest), tau, 0)
        for tau, smallest, largest in zip(taus, *limits, strict=True)
    ]
    return leaf_0 + sum(coef * tau for coef, tau in zip(coefs, kept, strict=True))
