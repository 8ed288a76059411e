r"""TALL masks: find the entries of a multi-task vector that each task uses.

Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard. Localizing Task Information for
Improved Model Merging and Compression. ICML 2024. arXiv:2405.07813.

.. math:: m_t = \mathbb{1}\big[\,|\tau_t| > \lambda_t\,|\tau_{MT} - \tau_t|\,\big]

and the model of task t is :math:`\theta_0 + m_t \odot \tau_{MT}`. The multi-task vector
comes from task arithmetic, :math:`\sum_t \tau_t`, or from TIES. As in the authors'
code, this TIES takes the sum of the entries that agree.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxarith import task_vectors, tree
from jaxarith.merge import _leaves
from jaxarith.merge._masked import Masked
from jaxarith.merge.greedy_soup import checked_score
from jaxarith.merge.ties import agreeing, majority_sign, trim, trim_thresholds
from jaxarith.typing import Params, PerTask, Taus, Tree

Of = Literal["task_arithmetic", "ties"]


def tall_masks(
    params_0: Params,
    taus: Taus,
    *,
    threshold: PerTask = 0.4,
    of: Of = "task_arithmetic",
    density: float = 0.2,
) -> Masked:
    """Returns the multi-task vector and the mask of every task.

    It takes one pass over the task vectors. TIES needs more passes to find its
    thresholds.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      threshold: λ ≥ 0, one number or one per task `[T]`. With 0 a mask keeps all
        entries that the task changes; a larger threshold keeps fewer. The authors
        choose it for each task from 0.2, 0.3, …, 0.6 on validation data, as
        `tall_thresholds` does.
      of: how the multi-task vector is merged.
      density: the share of entries of every task vector that TIES keeps, in (0, 1].

    Returns:
      The multi-task vector, the masks, and scales of one.

    Raises:
      ValueError: an unknown `of`, `density` or `threshold` out of range, a wrong number
        of thresholds, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([2.0, -3.0])}]
      >>> merged = tall_masks({"w": jnp.zeros(2)}, taus, threshold=0.5)
      >>> print(merged.tau["w"], merged.masks[0]["w"], merged.vector(0)["w"])
      [ 6. -2.] [ True False] [6. 0.]
    """
    _leaves.one_of(of, Of, "of")
    _leaves.check(params_0, taus)
    thresholds = check_thresholds(threshold, len(taus))
    rows = tree.aligned(taus)
    statistics = multi_task_statistics(rows, of, density)
    tau, masks = {}, [{} for _ in taus]
    for path, row in rows.items():
        tau[path], masks_of_leaf = _mask_leaf(row, thresholds, statistics)
        for mask, of_leaf in zip(masks, masks_of_leaf, strict=True):
            mask[path] = of_leaf
    ones = jnp.ones(len(taus))
    return Masked(tree.unflatten(tau), [*map(tree.unflatten, masks)], ones)


def tall_thresholds(
    params_0: Params,
    taus: Taus,
    score: Callable[[int, Tree], float],
    *,
    grid: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6),
    of: Of = "task_arithmetic",
    density: float = 0.2,
) -> list[float]:
    """Returns, for each task, the threshold with which its masked model scores best.

    Source: Wang et al. 2024 choose the thresholds in this way, on validation data.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors.
      score: `score(task, params)` returns a number that is larger for a better model,
        for example the accuracy on validation data of that task. It is called T times
        for every threshold.
      grid: the thresholds to try; if scores are equal, the first one wins.
      of: how the multi-task vector is merged.
      density: the share of entries of every task vector that TIES keeps.

    Returns:
      One threshold per task, for `tall_masks` or `consensus`.

    Raises:
      ValueError: the grid is empty, a score is NaN, or as for `tall_masks`.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([2.0, -3.0])}]
      >>> def score(task, params):  # the models should be [6, 0] and [6, -2]
      ...     return -jnp.abs(params["w"] - jnp.array([6.0, -2.0 * task])).sum()
      >>> tall_thresholds({"w": jnp.zeros(2)}, taus, score, grid=(0.2, 0.4))
      [0.4, 0.2]
    """
    if not len(grid):
        raise ValueError("the grid of thresholds is empty; give at least one.")
    scores = []
    for threshold in grid:
        masked = tall_masks(params_0, taus, threshold=threshold, of=of, density=density)
        models = (
            task_vectors.apply(params_0, masked.vector(i)) for i in range(len(taus))
        )
        scores.append(
            [
                checked_score(score(i, model), f"task {i} at threshold {threshold}")
                for i, model in enumerate(models)
            ]
        )
    return [float(grid[best]) for best in np.argmax(scores, axis=0)]


def check_thresholds(threshold: PerTask, tasks: int) -> jax.Array:
    """Returns one threshold per task, `[T]`.

    Raises:
      ValueError: a threshold is negative or not finite, or their number is not T.
    """
    thresholds = _leaves.per_task(threshold, tasks, "threshold")
    if not isinstance(thresholds, Tracer) and not np.all(thresholds >= 0):
        raise ValueError(f"threshold is {threshold}; it must not be negative.")
    return thresholds


def multi_task_statistics(
    rows: Mapping[str, tuple], of: Of, density: float
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the statistics of whole vectors that `multi_task_leaf` needs.

    For TIES these are the thresholds and the majority sign; else None.

    Raises:
      ValueError: `density` is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    if of == "task_arithmetic":
        return None
    trims = trim_thresholds(rows, density)
    return trims, majority_sign(rows, trims)


def multi_task_leaf(
    taus: Sequence[jax.Array], statistics: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Returns a leaf of the multi-task vector: the sum, or the disjoint sum of TIES."""
    if statistics is None:
        return tree.total(taus)
    trims, majority = statistics
    kept, _ = agreeing(trim(taus, trims), majority)
    return tree.total(kept)


def masks_of_leaf(
    taus: Sequence[jax.Array], merged: jax.Array, thresholds: jax.Array
) -> list[jax.Array]:
    """Returns, for each task, a mask of the entries that outweigh the other tasks."""
    return [
        jnp.abs(tau) > threshold * jnp.abs(merged - tau)
        for tau, threshold in zip(taus, thresholds, strict=True)
    ]


@jax.jit
def _mask_leaf(row, thresholds, statistics):
    dtype = tree.wide_dtype(*row)
    taus = [tau.astype(dtype) for tau in row]
    merged = multi_task_leaf(taus, statistics)
    return merged, masks_of_leaf(taus, merged, thresholds)
