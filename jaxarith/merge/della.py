r"""DELLA: drop entries of the task vectors at random, small ones rather, then merge.

Deep, Bhardwaj, Poria. DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling. arXiv:2406.11617.

MAGPRUNE ranks the n entries of every row by magnitude, 1 for the smallest. The entry of
rank r is dropped with probability :math:`p_r` and multiplied by :math:`1 / (1 - p_r)`
otherwise, so that the expectation of what is left is the task vector:

.. math:: p_r = p + \epsilon - 2\epsilon\,\frac{r - 1}{n - 1}.

Signs are then elected and the entries that agree averaged, as in TIES. ε is half the
window of drop probabilities, as in mergekit and in the authors' code, from which the
ends of the window at ranks 1 and n are taken too.
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
    """Drops small entries of the task vectors rather than large ones, and merges.

    It is `merge.ties` of what `magprune` leaves; any other merge takes that too.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      drop_rate, epsilon, rescale, axis, key: as for `magprune`.
      coef: the coefficient λ of the merged vector: one number, or one by path.
      density: the share of entries that TIES keeps in its trim; the paper has no trim.

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
    # What is pruned is finite where the task vectors are, and costs more to look at.
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
    """Task vectors that lack random entries, small ones rather, for any merge.

    Args:
      taus: T task vectors.
      drop_rate: the mean drop probability p.
      epsilon: half the window of drop probabilities, p - ε for the largest entry of a
        row to p + ε for the smallest; the window must be in [0, 1). A row of one entry
        has p. The default rate and window are the example of the authors' code;
        mergekit's ε is 0.15.
      rescale: what the rest is multiplied with: "inverse", the inverse of each entry's
        own probability of being kept; "l1", what restores the sum of magnitudes in
        every leaf, as mergekit does; or "none".
      axis: a function of the path that gives the axis along which rows run. The default
        follows the rows of PyTorch weights.
      key: the key of the random draws.

    Returns:
      T trees of the same structure, whose leaves a merge computes as for `merge.drop`.

    Raises:
      ValueError: a window outside [0, 1), an unknown option, or no list of task
        vectors.

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
    """Ranks of the magnitudes in every row along an axis, scaled to [-1, 1].

    Equal magnitudes share the mean of their ranks. The only entry of a row has 0.
    """
    width = x.shape[axis] if x.ndim else 1
    if width < 2:
        return jnp.zeros_like(x)
    # Bit patterns order as magnitudes do. To sort these and search for each is several
    # times as fast as to sort twice, and the ranks are whole numbers in any dtype of x.
    bits = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    magnitudes = jnp.abs(jax.lax.stop_gradient(x))
    rows = jnp.moveaxis(jax.lax.bitcast_convert_type(magnitudes, bits), axis, -1)
    ordered = jnp.sort(rows, axis=-1)
    below = _count_below(ordered, rows)
    # Where the run of equal entries ends that starts there.
    places = 1 + jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
    is_end = (ordered != jnp.roll(ordered, -1, axis=-1)) | (places == width)
    ends = jnp.where(is_end, places, width)
    ends = jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)
    up_to = jnp.take_along_axis(ends, below, -1, mode="promise_in_bounds")
    centered = (below + up_to - width).astype(x.dtype) / (width - 1)
    return jnp.moveaxis(centered, -1, axis)


def _count_below(ordered, rows):
    """For every entry, how many of its ordered row are below it.

    Bisection, one bit at a time.
    """
    width = ordered.shape[-1]
    length = width.bit_length()

    def decide_bit(i, count):
        trial = count + (1 << (length - 1 - i))
        last = jnp.minimum(trial, width) - 1
        entries = jnp.take_along_axis(ordered, last, -1, mode="promise_in_bounds")
        return jnp.where((trial <= width) & (entries < rows), trial, count)

    return jax.lax.fori_loop(0, length, decide_bit, jnp.zeros(ordered.shape, jnp.int32))
