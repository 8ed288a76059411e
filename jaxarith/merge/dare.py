r"""DARE: drop entries of the task vectors at random and rescale the rest, then merge.

Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099.

.. math:: m_t \sim \mathrm{Bernoulli}(p), \qquad
          \hat\tau_t = \frac{(1 - m_t) \odot \tau_t}{1 - p},

so that the expectation of :math:`\hat\tau_t` is τ_t. Then any merge of the
:math:`\hat\tau_t`.

The mask of a leaf depends only on the key, the leaf's path and the task's number. It is
drawn again in every pass; the dropped vectors are not held as a whole.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxarith import tree
from jaxarith.merge import _leaves, _order
from jaxarith.merge.breadcrumbs import floor_share
from jaxarith.merge.task_arithmetic import add_scaled
from jaxarith.merge.ties import chosen, merge_rows
from jaxarith.typing import Coef, Params, Taus

Strategy = Literal["random", "magnitude"]
Rescale = Literal["inverse", "l1", "none"]
Into = Literal["task_arithmetic", "average", "ties"]


def dare(
    params_0: Params,
    taus: Taus,
    *,
    drop_rate: float = 0.9,
    strategy: Strategy = "random",
    rescale: Rescale = "inverse",
    into: Into = "task_arithmetic",
    coef: Coef = 1.0,
    density: float = 0.2,
    key: jax.Array | None = None,
) -> Params:
    """Drops and rescales task vectors, and merges them.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      drop_rate: the share p of entries that is dropped, in [0, 1).
      strategy: what is dropped: "random", or "magnitude", the ⌊pn⌋ smallest of the n
        entries of every leaf, to which the paper compares. Entries that are equal to
        the smallest that is kept stay too.
      rescale: what the rest is multiplied with: "inverse", 1/(1-p), or for "magnitude"
        n over the number of entries of the leaf that are kept, which differs where
        these are few; "l1", what restores the sum of magnitudes in every leaf, as
        mergekit does; or "none".
      into: the merge that follows: "task_arithmetic", "average" or "ties".
      coef: its coefficient λ: one number, one per task `[T]`, or either by path.
        "average" divides it by T; "ties" takes one number.
      density: the share of entries that "ties" keeps in its trim, dropped entries
        counting among them; the other merges do without it.
      key: the key of the random draws, which "magnitude" does without.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `drop_rate` or `density` out of range, an unknown option, no key for
        random draws, no task vector, one that does not fit, non-finite values, or a
        wrong number of coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(8)}
      >>> taus = [{"w": jnp.ones(8)}]
      >>> print(dare(params_0, taus, drop_rate=0.5, key=jax.random.key(0))["w"])
      [2. 0. 0. 0. 0. 2. 2. 2.]
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; it must be in [0, 1).")
    _leaves.one_of(strategy, Strategy, "strategy")
    _leaves.one_of(rescale, Rescale, "rescale")
    check_into(into, density)
    if strategy == "random" and key is None:
        raise ValueError(
            'strategy="random" needs a key of its draws, such as jax.random.key(0).'
        )
    _leaves.check(params_0, taus)
    rows = tree.aligned(taus)
    if rescale == "l1":  # it sums over leaves
        rows = _leaves.Mapped(tree.gathered, rows)
    if key is not None and strategy == "random":
        keys = _leaves.keys(key, taus)
        share = 1 - drop_rate
        dropped = _leaves.Mapped(_drop_random, rows, keys, share, 1 / share, rescale)
    else:
        sizes = {path: row[0].size for path, row in _leaves.unmapped(rows).items()}
        ranks = {p: min(floor_share(drop_rate, n) + 1, n) for p, n in sizes.items()}
        least = {
            path: _order.kth_magnitudes({path: row}, ranks[path])
            for path, row in rows.items()
        }
        dropped = _leaves.Mapped(_drop_small, rows, least, rescale)
    return merge_into(into, params_0, taus, dropped, coef, density)


def check_into(into: Into, density: float) -> None:
    """Raises a ValueError unless these options of `merge_into` are possible."""
    _leaves.one_of(into, Into, "into")
    chosen("official", density)


def merge_into(
    into: Into,
    params_0: Params,
    taus: Taus,
    rows: Mapping[str, tuple],
    coef: Coef,
    density: float,
) -> Params:
    """Merges leaves by path, made of checked task vectors, as `into` of `dare` says."""
    if into == "ties":
        options = chosen("official", density)
        return merge_rows(params_0, rows, options, _leaves.vector_coef(coef, taus))
    coefs = _leaves.task_coefs(coef, taus)
    if into == "average":
        coefs = jax.tree.map(lambda coefs: coefs / len(taus), coefs)
    return _leaves.fold(add_scaled, params_0, rows, coefs)


def _drop_random(row, key, share, inverse, rescale):
    # Task by task: the random numbers take more memory than the leaf.
    return tuple(
        _drop_one(tau, key, task, share, inverse, rescale)
        for task, tau in enumerate(row)
    )


@jax.jit(static_argnames="rescale")
def _drop_one(tau, key, task, share, inverse, rescale):
    kept = draw(jax.random.fold_in(key, task), share, tau.shape)
    # Not divided by the share: in a loop XLA rounds that as it likes.
    return rescaled(_leaves.widened(tau), kept, inverse, rescale)


@jax.jit(static_argnames="rescale")
def _drop_small(row, least, rescale):
    row = [_leaves.widened(tau) for tau in row]
    kept = [jnp.abs(tau) >= size for tau, size in zip(row, least, strict=True)]
    # Of a leaf of few entries the share that is kept is not 1 - p: a number stays.
    inverses = row[0].size / jnp.maximum(tree.counts(kept), 1)
    return tuple(
        rescaled(tau, mask, inverse.astype(tau.dtype), rescale)
        for tau, mask, inverse in zip(row, kept, inverses, strict=True)
    )


def draw(key: jax.Array, share: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """A mask whose entries are true with probability `share`: a number, or an array."""
    # Always from float32 numbers: the bits do not depend on the dtype of the vectors.
    return jax.random.uniform(key, shape, jnp.float32) < jnp.asarray(share, jnp.float32)


def rescaled(
    tau: jax.Array, kept: jax.Array, inverse: Any, rescale: Rescale
) -> jax.Array:
    """The kept entries, multiplied as `rescale` says.

    `inverse` is one over the share that is kept, or over each entry's probability.
    """
    if rescale == "inverse":
        return jnp.where(kept, tau * inverse, 0)
    rest = jnp.where(kept, tau, 0)
    if rescale == "none":
        return rest
    before, after = tree.sums([jnp.abs(tau), jnp.abs(rest)])
    some = after > 0
    return rest * jnp.where(some, before / jnp.where(some, after, 1), 0)
