r"""PCB-Merging: entries compete within their task and between tasks.

Du, Lee, Li, Jiang, Guo, Yu, Liu, Goh, Tang, He, Zhang. Parameter Competition Balancing
for Model Merging. NeurIPS 2024. arXiv:2410.02396.

As in the authors' code, magnitudes are clipped at two quantiles; :math:`\hat\tau` is
the clipped vector. With :math:`N(x) = (x - \min x)/(\max x - \min x)` over a whole
vector:

.. math:: s_t = \exp\big(T\,N(|\hat\tau_t|)^2\big) \odot
                \tanh\big(\tau_t \odot \textstyle\sum_j \tau_j\big), \qquad
          w_t = N\big(\max(s_t, q_t)\big), \qquad
          \tau = \frac{\sum_t w_t \odot \hat\tau_t}{\sum_t w_t},

where :math:`q_t` is the quantile of :math:`s_t` above which the share `density` of the
entries lies. Unlike in the authors' code, an entry with a negative score never has a
weight. That makes a difference only if the share of positive scores is smaller than
`density`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.typing import Coef, Params, Taus

Cross = Literal["sum", "normalized"]


def pcb(
    params_0: Params,
    taus: Taus,
    *,
    density: float = 0.1,
    clip: float = 1e-4,
    coef: Coef = 1.0,
    cross: Cross = "sum",
) -> Params:
    """Merges task vectors by PCB-Merging.

    The authors' script for vision sets `density=0.05, clip=0.01, coef=1.2,
    cross="normalized"`. The authors also choose a coefficient for every task in
    [0.8, 1.3] by an evolutionary search. To use such coefficients, scale the task
    vectors.

    The quantiles are exact. They take about thirty passes over the task vectors. A
    third of the passes compute the scores again instead of storing them.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero. `density` is a share of all
        entries of the leaves that at least one task vector has.
      density: the share of entries of every task vector that is kept, in (0, 1].
      clip: the share of the smallest magnitudes, and of the largest, that is clipped,
        in [0, 0.5).
      coef: the coefficient of the merged vector: one number, or one by path.
      cross: the factor with which an entry competes between tasks: the "sum" of the
        task vectors, or the sum of vectors "normalized" to the magnitudes N(|τ|).

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `cross`, `density` or `clip` out of range, several
        coefficients, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> a, b = jnp.array([4.0, 1.0, 0.0]), jnp.array([2.0, -3.0, 0.0])
      >>> taus = [{"w": a}, {"w": b}]
      >>> print(pcb({"w": jnp.zeros(3)}, taus, density=0.6, clip=0.0)["w"])
      [ 4. -3.  0.]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip is {clip}; it must be in [0, 0.5).")
    _leaves.one_of(cross, Cross, "cross")
    _leaves.check(params_0, taus)
    coefs = _leaves.vector_coef(coef, taus)
    rows = tree.aligned(taus)
    # These are the indices of the authors' code into sorted entries, from 0.
    size = sum(row[0].size for row in _leaves.unmapped(rows).values())
    if not size:
        return params_0
    low = _order.kth_magnitudes(rows, int(size * clip) + 1)
    high = _order.kth_magnitudes(rows, max(int(size * (1 - clip) - 1), 0) + 1)
    scores = _leaves.Mapped(_positive_scores, rows, low, high, cross)
    cut = _order.kth_magnitudes(scores, min(int(size * (1 - density)), size - 1) + 1)
    top = jnp.max(jnp.stack([_largest(row) for row in scores.values()]), axis=0)
    return _leaves.fold(
        _merge_leaf, params_0, rows, low, high, cut, top, coefs, cross=cross
    )


@jax.jit(static_argnames="cross")
def _positive_scores(row, low, high, cross):
    taus = [jnp.asarray(tau, low.dtype) for tau in row]
    return tuple(jnp.maximum(score, 0) for score in _scores(taus, low, high, cross))


@jax.jit
def _largest(row):
    return jnp.stack([jnp.max(leaf, initial=0) for leaf in row])


def _scores(taus, low, high, cross):
    # exp(T(x - 1)) instead of exp(Tx), which overflows; the factor cancels in N.
    normalized = [
        _divide(jnp.clip(jnp.abs(tau), a, b) - a, b - a)
        for tau, a, b in zip(taus, low, high, strict=True)
    ]
    if cross == "sum":
        total = sum(taus)
    else:
        pairs = zip(taus, normalized, strict=True)
        total = sum(jnp.sign(tau) * size for tau, size in pairs)
    return [
        jnp.exp(len(taus) * (size**2 - 1)) * jnp.tanh(tau * total)
        for tau, size in zip(taus, normalized, strict=True)
    ]


def _divide(x, y):
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


@_leaves.leaf_function(static=("cross",))
def _merge_leaf(leaf_0, taus, low, high, cut, top, coef, cross):
    weighted, weights = 0, 0
    # The statistics are float64 if one leaf is; all scores must have the same dtype.
    scores = _scores([tau.astype(low.dtype) for tau in taus], low, high, cross)
    for tau, score, *bounds in zip(taus, scores, low, high, cut, top, strict=True):
        smallest, largest, least, most = bounds
        # If all remaining scores are equal, each of their entries has the weight 1.
        ties = ((score >= least) & (score > 0)).astype(score.dtype)
        # Weights are divided by their sum. So the weight of the entry at the quantile
        # must be exactly zero, although its score is computed again and rounded.
        above = score > least * (1 + 16 * jnp.finfo(score.dtype).eps)
        share = _divide(jnp.where(above, score - least, 0), most - least)
        weight = jnp.where(most > least, share, ties)
        clipped = jnp.sign(tau) * jnp.clip(jnp.abs(tau), smallest, largest)
        weighted, weights = weighted + weight * clipped, weights + weight
    return leaf_0 + coef * weighted / jnp.maximum(weights, 1e-12)
