r"""Consensus merging: a multi-task vector without entries that too few tasks use.

Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard. Localizing Task Information for
Improved Model Merging and Compression. ICML 2024. arXiv:2405.07813.

With the TALL masks :math:`m_t`,

.. math:: m = \mathbb{1}\big[\textstyle\sum_t m_t \ge k\big], \qquad
          \theta = \theta_0 + \alpha\, m \odot \tau_{MT}.

k = 1 removes the entries that no task uses ("catastrophic" weights). k = 2 also removes
those that only one task uses ("selfish" weights). k = 0 removes nothing.
"""

import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.tall_masks import (
    Of,
    check_thresholds,
    masks_of_leaf,
    multi_task_leaf,
    multi_task_statistics,
)
from jaxarith.typing import Coef, Params, PerTask, Taus


def consensus(
    params_0: Params,
    taus: Taus,
    *,
    least: int = 2,
    threshold: PerTask = 0.4,
    coef: Coef = 1.0,
    of: Of = "task_arithmetic",
    density: float = 0.2,
) -> Params:
    """Merges task vectors by Consensus TA or Consensus TIES; stores no mask.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      least: the number k: an entry is kept if at least k tasks use it.
      threshold: λ ≥ 0 of the masks, one number or one per task `[T]`. The authors
        choose it for each task from 0.2, 0.3, …, 0.6, as `tall_thresholds` does.
      coef: the coefficient α: one number, or one by path. The authors choose it from
        0.1, 0.2, …, 1 on validation data.
      of: how the multi-task vector is merged.
      density: the share of entries of every task vector that TIES keeps, in (0, 1].

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `of`, `least`, `density` or `threshold` out of range, fewer
        than `least` task vectors, a wrong number of thresholds or coefficients, one
        vector that does not fit, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 5.0])}, {"w": jnp.array([2.0, -0.1])}]
      >>> print(consensus({"w": jnp.zeros(2)}, taus)["w"])
      [6. 0.]
    """
    if least != int(least) or least < 0:
        raise ValueError(f"least is {least}; it must be a number of tasks, 0 or more.")
    _leaves.one_of(of, Of, "of")
    _leaves.check(params_0, taus, least=least)
    thresholds = check_thresholds(threshold, len(taus))
    coefs = _leaves.vector_coef(coef, taus)
    statistics = multi_task_statistics(tree.aligned(taus), of, density)
    return _leaves.fold(
        _merge_leaf, params_0, taus, thresholds, statistics, coefs, least=int(least)
    )


@_leaves.leaf_function(static=("least",))
def _merge_leaf(leaf_0, taus, thresholds, statistics, coef, least):
    merged = multi_task_leaf(taus, statistics)
    users = sum(mask.astype(int) for mask in masks_of_leaf(taus, merged, thresholds))
    return leaf_0 + coef * jnp.where(users >= least, merged, 0)
