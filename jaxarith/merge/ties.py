r"""TIES: trims, elects a sign for each entry, and merges the entries that agree.

Yadav, Tam, Choshen, Raffel, Bansal. TIES-Merging: Resolving Interference When Merging
Models. NeurIPS 2023. arXiv:2306.01708. Algorithm 1:

.. math:: \hat\tau_t = \operatorname{keep\_topk}(\tau_t), \quad
          \gamma = \operatorname{sgn}\big(\textstyle\sum_t \hat\tau_t\big), \quad
          \tau_m^p = \frac{1}{|A^p|} \sum_{t\in A^p} \hat\tau_t^p, \quad
          A^p = \{t : \operatorname{sgn}\hat\tau_t^p = \gamma^p \ne 0\},

and :math:`\theta = \theta_0 + \lambda\tau_m`.

Where the paper says nothing, the default follows the authors' code. Each task has one
trimming threshold over its whole vector. Entries at the threshold are kept. An entry
whose trimmed values cancel exactly takes the majority sign of all entries. If there is
no majority, such an entry stays at zero here; the authors' code keeps its negative
values.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.typing import Coef, Params, PerTask, Taus

PresetName = Literal["official", "adamerging"]
Trim = Literal["global", "tensor"]
Aggregate = Literal["mean", "sum", "max"]


class Preset(NamedTuple):
    """A variant of TIES with which results were published.

    Attributes:
      density: the share of entries that is kept.
      coef: the coefficient of the merged vector.
      trim: whether each vector or each tensor has its own threshold.
      aggregate: how the entries that agree are merged.
    """

    density: float
    coef: float
    trim: Trim = "global"
    aggregate: Aggregate = "mean"


PRESETS: dict[PresetName, Preset] = {
    "official": Preset(density=0.2, coef=1.0),
    "adamerging": Preset(density=0.2, coef=0.3, aggregate="sum"),
}


def ties(
    params_0: Params,
    taus: Taus,
    *,
    density: float | None = None,
    coef: Coef | None = None,
    weights: PerTask | None = None,
    trim: Trim | None = None,
    aggregate: Aggregate | None = None,
    preset: PresetName = "official",
) -> Params:
    """Merges task vectors by TIES.

    These are the presets. An option that is not None overrides the preset's value.

    ============  =======  ====  ======  =========
    preset        density  coef  trim    aggregate
    ============  =======  ====  ======  =========
    `official`    0.2      1.0   global  mean
    `adamerging`  0.2      0.3   global  sum
    ============  =======  ====  ======  =========

    `adamerging` is the baseline in the tables of AdaMerging and of FusionBench.
    mergekit's TIES is `merge.mergekit.generalized_task_arithmetic`.

    Cost: the task vectors are read about five times for the exact thresholds (one
    number per task), once for the majority sign, and once to merge.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero. `density` is a share of all
        entries of the leaves that at least one task vector has.
      density: the share of entries of every task vector that is kept, in (0, 1].
      coef: the coefficient λ of the merged vector: a number, or one by path. For the
        mean, the authors search 0.8 to 2.5.
      weights: one number, or one per task `[T]`. They multiply the trimmed vectors
        before signs are elected, and they weight the mean, as in mergekit.
      trim: `"global"` for one threshold over each task vector. `"tensor"` keeps the
        ⌊density·n⌋ largest of the n entries of every leaf, at least one.
      aggregate: merges the entries that agree by their mean, their sum or the largest.
      preset: name of the preset, which sets the options that are None.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown option, `density` out of range, a wrong number of
        coefficients, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> taus = [{"w": jnp.array([4.0, 3.0, 0.1])}, {"w": jnp.array([2.0, -5.0, 0.2])}]
      >>> print(ties(params_0, taus, density=0.5)["w"])
      [ 3. -5.  0.]
      >>> print(ties(params_0, taus, density=0.5, preset="adamerging", coef=1.0)["w"])
      [ 6. -5.  0.]
    """
    options = chosen(preset, density, trim, aggregate)
    _leaves.check(params_0, taus)
    return of_checked(
        params_0, taus, options, options.coef if coef is None else coef, weights
    )


def of_checked(
    params_0: Params,
    taus: Taus,
    options: Preset,
    coef: Coef,
    weights: PerTask | None = None,
) -> Params:
    """Does the same as `ties`, for task vectors that are known to fit and be finite."""
    coefs = _leaves.vector_coef(coef, taus)
    factors = None
    if weights is not None:
        factors = _leaves.per_task(weights, len(taus), "weights")
    rows = tree.aligned(taus)
    thresholds = trim_thresholds(rows, options.density, options.trim)
    elected = majority_sign(rows, thresholds, factors)
    return _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        thresholds,
        factors,
        elected,
        coefs,
        aggregate=options.aggregate,
    )


def chosen(
    preset: PresetName,
    density: float | None = None,
    trim: Trim | None = None,
    aggregate: Aggregate | None = None,
) -> Preset:
    """Returns the preset, with the options that are not None."""
    _leaves.one_of(preset, PresetName, "preset")
    given = {"density": density, "trim": trim, "aggregate": aggregate}
    given = {name: value for name, value in given.items() if value is not None}
    options = PRESETS[preset]._replace(**given)
    if not 0 < options.density <= 1:
        raise ValueError(f"density is {options.density}; it must be in (0, 1].")
    _leaves.one_of(options.trim, Trim, "trim")
    _leaves.one_of(options.aggregate, Aggregate, "aggregate")
    return options


def trim_thresholds(
    rows: Mapping[str, tuple], density: float, trim: Trim = "global"
) -> Any:
    """Returns, for each task vector, the smallest magnitude that is kept, `[T]`.

    For d entries it is exactly the (d - ⌊density·d⌋)-th smallest magnitude. This keeps
    ⌊density·d⌋ + 1 entries, as many as the authors' code. With `trim="tensor"` the
    result is a dict by path, and each leaf of n entries keeps ⌊density·n⌋, at least
    one.
    """
    if trim == "global":
        size = sum(row[0].size for row in _leaves.unmapped(rows).values())
        return _order.kth_magnitudes(rows, size - int(size * density))
    return {
        path: _order.kth_of_leaf(
            row, row[0].size - max(int(row[0].size * density), 1) + 1
        )
        for path, row in rows.items()
    }


def trim(taus: Sequence[jax.Array], thresholds: jax.Array) -> list[jax.Array]:
    """Returns a leaf of every task, with zeros below the task's threshold."""
    pairs = zip(taus, thresholds, strict=True)
    return [jnp.where(jnp.abs(tau) >= least, tau, 0) for tau, least in pairs]


@_leaves.at_once
def majority_sign(
    rows: Mapping[str, tuple],
    thresholds: _leaves.Coefs,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Returns the sign that most entries of the sum of the trimmed vectors have."""
    signs = (
        _sign_sum(row, _leaves.at(thresholds, path), weights)
        for path, row in rows.items()
    )
    signs = [tree.settled(sign) for sign in signs]
    if tree.is_traced(signs):
        return jnp.sign(sum(signs))
    total = sum(map(int, signs))  # a model may have more entries than an int32 counts
    return jnp.asarray((total > 0) - (total < 0))


@jax.jit
def _sign_sum(row, thresholds, weights):
    total = sum(
        weighted(trim([_leaves.widened(tau) for tau in row], thresholds), weights)
    )
    positive, negative = tree.counts([total > 0, total < 0])
    return positive - negative


def weighted(
    taus: Sequence[jax.Array], weights: jax.Array | None
) -> Sequence[jax.Array]:
    """Returns a leaf of every task, times the task's weight if there are weights."""
    if weights is None:
        return taus
    return [weight * tau for weight, tau in zip(weights, taus, strict=True)]


def agreeing(
    trimmed: Sequence[jax.Array], cancelled: jax.Array | int
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the entries of every task that have the elected sign, and that sign.

    Args:
      trimmed: a leaf of every task.
      cancelled: the sign for entries whose values cancel.
    """
    sign = jnp.sign(sum(trimmed))
    sign = jnp.where(sign == 0, cancelled, sign)
    return [jnp.where(tau * sign > 0, tau, 0) for tau in trimmed], sign


@_leaves.leaf_function(static="aggregate")
def _merge_leaf(leaf_0, taus, thresholds, weights, elected, coef, aggregate):
    kept, sign = agreeing(weighted(trim(taus, thresholds), weights), elected)
    if aggregate == "max":
        merged = sign * functools.reduce(jnp.maximum, map(jnp.abs, kept))
    else:
        merged = sum(kept)
    if aggregate == "mean":
        count = sum(weighted([tau != 0 for tau in kept], weights))
        merged = merged / jnp.where(count == 0, 1, count)
    return leaf_0 + coef * merged
