r"""DARE's dropping: entries of the task vectors at random, the rest rescaled.

Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099.

.. math:: m_t \sim \mathrm{Bernoulli}(p), \qquad
          \hat\tau_t = \frac{(1 - m_t) \odot \tau_t}{1 - p},

so that the expectation of :math:`\hat\tau_t` is τ_t.

The mask of a leaf depends only on the key, the leaf's path and the task's number. It is
drawn whenever a merge reads the leaf; the dropped vectors are not held as a whole.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxarith import lazy, task_vectors, tree
from jaxarith.merge import _draws, _leaves, _order
from jaxarith.merge.breadcrumbs import floor_share
from jaxarith.typing import Params, Taus

Strategy = Literal["random", "magnitude"]
Rescale = Literal["inverse", "l1", "none"]
DROP_RATE = 0.9


def drop(
    taus: Taus,
    *,
    drop_rate: float = DROP_RATE,
    strategy: Strategy = "random",
    rescale: Rescale = "inverse",
    key: jax.Array | None = None,
) -> list[Params]:
    """Task vectors that lack a share of their entries, for any merge.

    Running statistics of normalisation layers stay whole.

    Args:
      taus: T task vectors.
      drop_rate: the share p of entries that is dropped, in [0, 1).
      strategy: what is dropped: "random", or "magnitude", the ⌊pn⌋ smallest of the n
        entries of every leaf, to which the paper compares. Entries that are equal to
        the smallest that is kept stay too.
      rescale: what the rest is multiplied with: "inverse", 1/(1-p), or for "magnitude"
        n over the number of entries of the leaf that are kept, which differs where
        these are few; "l1", what restores the sum of magnitudes in every leaf, as
        mergekit does; or "none".
      key: the key of the random draws, which "magnitude" does without.

    Returns:
      T trees of the same structure. Their leaves are no arrays: a merge computes them
      when it reads them, as `jnp.asarray` does. A function under `jit` cannot take
      them; it can call `drop`.

    Raises:
      ValueError: `drop_rate` out of range, an unknown option, no key for random draws,
        or no list of task vectors.

    Example:
      >>> from jaxarith import merge
      >>> taus = [{"w": jnp.ones(8)}]
      >>> dropped = drop(taus, drop_rate=0.5, key=jax.random.key(0))
      >>> print(merge.ties({"w": jnp.zeros(8)}, dropped, density=1.0)["w"])
      [2. 0. 2. 0. 0. 0. 2. 2.]
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; it must be in [0, 1).")
    _leaves.one_of(strategy, Strategy, "strategy")
    _leaves.one_of(rescale, Rescale, "rescale")
    _leaves.check_list(taus)
    if strategy == "magnitude":
        return _without_smallest(taus, drop_rate, rescale)
    if key is None:
        raise ValueError(
            'strategy="random" needs a key of its draws, such as jax.random.key(0).'
        )
    draws = functools.partial(_drop_random, share=1 - drop_rate, rescale=rescale)
    return changed_at_random(taus, draws, key)


def changed_at_random(
    taus: Taus, function: Callable[..., jax.Array], key: jax.Array
) -> list[Params]:
    """Task vectors whose leaves become `function(path, leaf, key_of_leaf, task=)`."""

    def of_leaf(path, leaf, task):
        if _leaves.is_running(path):
            return leaf
        change = functools.partial(function, path, task=task)
        return lazy.changed(leaf, change, task_vectors.leaf_key(key, path))

    return [
        tree.map_with_path(functools.partial(of_leaf, task=task), tree.floating(tau))
        for task, tau in enumerate(taus)
    ]


def _without_smallest(taus, drop_rate, rescale):
    taus, least = list(map(tree.floating, taus)), {}
    for path, row in tree.aligned(taus).items():
        size = row[0].size
        rank = min(floor_share(drop_rate, size) + 1, size)
        least[path] = _order.kth_magnitudes({path: row}, rank)
    below = functools.partial(_drop_below, rescale=rescale)

    def leaf(path, leaf, task):
        if _leaves.is_running(path):
            return leaf
        return lazy.changed(leaf, below, least[path][task])

    return [
        tree.map_with_path(functools.partial(leaf, task=task), tau)
        for task, tau in enumerate(taus)
    ]


def _drop_random(path, tau, key, *, task, share, rescale):
    return _draw_and_drop(whole(tau, rescale), key, task, share, 1 / share, rescale)


def whole(tau: jax.Array, rescale: Rescale) -> jax.Array:
    """The leaf, gathered from all devices where rescaling sums over it."""
    return tree.gathered(tau) if rescale == "l1" else tau


@jax.jit(static_argnames="rescale")
def _draw_and_drop(tau, key, task, share, inverse, rescale):
    kept = _draws.draw(jax.random.fold_in(key, task), share, tau.shape)
    # Not divided by the share: in a loop XLA rounds that as it likes.
    return rescaled(_leaves.widened(tau), kept, inverse, rescale)


def _drop_below(tau, least, rescale):
    return _drop_small(whole(tau, rescale), least, rescale)


@jax.jit(static_argnames="rescale")
def _drop_small(tau, least, rescale):
    tau = _leaves.widened(tau)
    kept = jnp.abs(tau) >= least
    # Of a leaf of few entries the share that is kept is not 1 - p: a number stays.
    inverse = tau.size / jnp.maximum(tree.counts([kept])[0], 1)
    return rescaled(tau, kept, inverse.astype(tau.dtype), rescale)


def rescaled(
    tau: jax.Array, kept: jax.Array, inverse: Any, rescale: Rescale
) -> jax.Array:
    """The kept entries, multiplied as `rescale` says.

    `inverse` is one over the share that is kept, or over each entry's probability.
    """
    # Zero, but NaN where the entry is NaN or infinite: merges then refuse the vector,
    # whether or not the entry was dropped.
    nothing = tau * 0
    if rescale == "inverse":
        return jnp.where(kept, tau * inverse, 0) + nothing
    rest = jnp.where(kept, tau, 0) + nothing
    if rescale == "none":
        return rest
    before, after = tree.sums([jnp.abs(tau), jnp.abs(rest)])
    some = after > 0
    return rest * jnp.where(some, before / jnp.where(some, after, 1), 0)
