r"""DELLA: drops entries at random, small ones more often than large ones, and merges.

Deep, Bhardwaj, Poria. DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling. arXiv:2406.11617.

MAGPRUNE ranks the n entries of every row by magnitude; the smallest has rank 1. The
entry of rank r is dropped with probability :math:`p_r`, or else multiplied by
:math:`1 / (1 - p_r)`. So the expectation of the result is the task vector:

.. math:: p_r = p + \epsilon - 2\epsilon\,\frac{r - 1}{n - 1}.

Then signs are elected and the entries that agree are averaged, as in TIES. ε is half
the width of the window of drop probabilities, as in mergekit and in the authors' code.
The ends of the window, at ranks 1 and n, also follow the authors' code.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxarith.merge import _draws, _leaves
from jaxarith.merge._matrices import input_axis
from jaxarith.merge.drop import Rescale, changed_at_random, rescaled, whole
from jaxarith.merge.ties import chosen, of_checked
from jaxarith.typing import Coef, Params, Taus

DROP_RATE = 0.3
EPSILON = 0.07


def della(
    params_0: Params,
    taus: Taus,
    *,
    drop_rate: float = DROP_RATE,
    epsilon: float = EPSILON,
    rescale: Rescale = "inverse",
    coef: Coef = 1.0,
    density: float = 1.0,
    axis: Callable[[str], int] = input_axis,
    key: jax.Array,
) -> Params:
    """Drops entries of the task vectors at random, mostly small ones, and merges.

    It calls `magprune` and then `merge.ties`. Other merges can follow `magprune` too.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      drop_rate, epsilon, rescale, axis, key: as for `magprune`.
      coef: the coefficient λ of the merged vector: one number, or one by path.
      density: the share of entries that the trim of TIES keeps; the paper has no trim.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a window outside [0, 1), `density` out of range, an unknown option, no
        task vector, one that does not fit, non-finite values, or a wrong number of
        coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(4)}
      >>> taus = [{"w": jnp.array([1.0, 2.0, 3.0, 4.0])}]
      >>> key = jax.random.key(1)
      >>> params = della(params_0, taus, drop_rate=0.5, epsilon=0.3, key=key)
      >>> print(params["w"].round(3))
      [0. 5. 5. 5.]
    """
    pruned = magprune(
        taus,
        drop_rate=drop_rate,
        epsilon=epsilon,
        rescale=rescale,
        axis=axis,
        key=key,
    )
    options = chosen("official", density=density)
    # The pruned vectors are finite if the task vectors are, and cost more to check.
    _leaves.check(params_0, taus)
    return of_checked(params_0, pruned, options, coef)


def magprune(
    taus: Taus,
    *,
    drop_rate: float = DROP_RATE,
    epsilon: float = EPSILON,
    rescale: Rescale = "inverse",
    axis: Callable[[str], int] = input_axis,
    key: jax.Array,
) -> list[Params]:
    """Drops random entries of task vectors, mostly small ones; any merge can follow.

    Args:
      taus: T task vectors.
      drop_rate: the mean drop probability p.
      epsilon: half the width of the window of drop probabilities: p - ε for the largest
        entry of a row, p + ε for the smallest. The window must be in [0, 1). The only
        entry of a row has p. The default rate and window are those of the example in
        the authors' code; mergekit's ε is 0.15.
      rescale: the factor for the kept entries. "inverse" is one divided by the
        probability with which the entry is kept. "l1" restores the sum of magnitudes of
        every leaf, as mergekit does. "none" is 1.
      axis: a function of the path that returns the axis along which rows run. The
        default follows the rows of PyTorch weights.
      key: the key of the random draws.

    Returns:
      T trees of the same structure. A merge computes their leaves, as for `merge.drop`.

    Raises:
      ValueError: the window is not in [0, 1), an option is unknown, or `taus` is not a
        list of task vectors.

    Example:
      >>> taus = [{"w": jnp.array([1.0, 2.0, 3.0, 4.0])}]
      >>> [pruned] = magprune(taus, drop_rate=0.5, epsilon=0.3, key=jax.random.key(1))
      >>> print(jnp.asarray(pruned["w"]).round(3))
      [0. 5. 5. 5.]
    """
    if not (epsilon >= 0 and 0 <= drop_rate - epsilon and drop_rate + epsilon < 1):
        raise ValueError(
            f"drop_rate is {drop_rate} and epsilon {epsilon}; both ends of the window "
            "drop_rate ± epsilon must be in [0, 1)."
        )
    _leaves.one_of(rescale, Rescale, "rescale")
    _leaves.check_list(taus)

    def prune(path, tau, key, *, task):
        along = axis(path) if tau.ndim > 1 else -1
        share, window = 1 - drop_rate, float(epsilon)
        return _magprune(whole(tau, rescale), key, task, share, window, along, rescale)

    return changed_at_random(taus, prune, key)


@jax.jit(static_argnames=("axis", "rescale"))
def _magprune(tau, key, task, share, epsilon, axis, rescale):
    tau = _leaves.widened(tau)
    shares = share + epsilon * centered_ranks(tau, axis)
    kept = _draws.draw(jax.random.fold_in(key, task), shares, tau.shape)
    return rescaled(tau, kept, 1 / shares, rescale)


def centered_ranks(x: jax.Array, axis: int) -> jax.Array:
    """Returns the ranks of the magnitudes in every row, scaled to [-1, 1].

    Rows run along `axis`. Equal magnitudes share the mean of their ranks. The only
    entry of a row has 0.
    """
    width = x.shape[axis] if x.ndim else 1
    if width < 2:
        return jnp.zeros_like(x)
    # Bit patterns have the same order as magnitudes. Sorting them once and searching
    # for each entry is several times as fast as sorting twice. And the ranks are exact
    # whole numbers for any dtype of x.
    bits = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    magnitudes = jnp.abs(jax.lax.stop_gradient(x))
    rows = jnp.moveaxis(jax.lax.bitcast_convert_type(magnitudes, bits), axis, -1)
    ordered = jnp.sort(rows, axis=-1)
    below = _count_below(ordered, rows)
    # For each place, the end of the run of equal entries that begins there.
    places = 1 + jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
    is_end = (ordered != jnp.roll(ordered, -1, axis=-1)) | (places == width)
    ends = jnp.where(is_end, places, width)
    ends = jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)
    up_to = jnp.take_along_axis(ends, below, -1, mode="promise_in_bounds")
    centered = (below + up_to - width).astype(x.dtype) / (width - 1)
    return jnp.moveaxis(centered, -1, axis)


def _count_below(ordered, rows):
    """Returns, for every entry, the number of entries of its row below it.

    It bisects the ordered row, one bit of the number at a time.
    """
    width = ordered.shape[-1]
    length = width.bit_length()

    def decide_bit(i, count):
        trial = count + (1 << (length - 1 - i))
        last = jnp.minimum(trial, width) - 1
        entries = jnp.take_along_axis(ordered, last, -1, mode="promise_in_bounds")
        return jnp.where((trial <= width) & (entries < rows), trial, count)

    return jax.lax.fori_loop(0, length, decide_bit, jnp.zeros(ordered.shape, jnp.int32))
