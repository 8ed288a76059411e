r"""The drop of DARE: drops entries of the task vectors at random, rescales the rest.

Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch. ICML 2024. arXiv:2311.03099.

.. math:: m_t \sim \mathrm{Bernoulli}(p), \qquad
          \hat\tau_t = \frac{(1 - m_t) \odot \tau_t}{1 - p},

so that the expectation of :math:`\hat\tau_t` is τ_t.

The mask of a leaf depends only on the key, the leaf's path and the task's number. It is
drawn again whenever a merge reads the leaf, so a whole dropped vector is never stored.
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
    """Drops a share of the entries of task vectors; any merge can follow.

    Running statistics of normalisation layers keep all entries.

    Args:
      taus: T task vectors.
      drop_rate: the share p of entries that is dropped, in [0, 1).
      strategy: "random" drops entries at random. "magnitude" drops the ⌊pn⌋ smallest of
        the n entries of every leaf, which the paper compares with. Entries that equal
        the smallest kept entry stay too.
      rescale: the factor for the kept entries. "inverse" is 1/(1-p); for "magnitude" it
        is n divided by the number of kept entries of the leaf, which differs if these
        are few. "l1" restores the sum of magnitudes of every leaf, as mergekit does.
        "none" is 1.
      key: the key of the random draws; "magnitude" needs none.

    Returns:
      T trees of the same structure. Their leaves are not arrays: a merge computes them
      when it reads them, as `jnp.asarray` does. A function under `jit` cannot take them
      as arguments; it can call `drop` itself.

    Raises:
      ValueError: `drop_rate` is out of range, an option is unknown, the key for random
        draws is missing, or `taus` is not a list of task vectors.

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
            'strategy="random" needs a key; found None. Give key=jax.random.key(0).'
        )
    draws = functools.partial(_drop_random, share=1 - drop_rate, rescale=rescale)
    return changed_at_random(taus, draws, key)


def changed_at_random(
    taus: Taus, function: Callable[..., jax.Array], key: jax.Array
) -> list[Params]:
    """Returns task vectors with leaves `function(path, leaf, key_of_leaf, task=)`."""

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
    """Returns the leaf, gathered from all devices if rescaling sums over it."""
    return tree.gathered(tau) if rescale == "l1" else tau


@jax.jit(static_argnames="rescale")
def _draw_and_drop(tau, key, task, share, inverse, rescale):
    kept = _draws.draw(jax.random.fold_in(key, task), share, tau.shape)
    # `inverse` is computed outside: XLA may round a division differently in a loop.
    return rescaled(_leaves.widened(tau), kept, inverse, rescale)


def _drop_below(tau, least, rescale):
    return _drop_small(whole(tau, rescale), least, rescale)


@jax.jit(static_argnames="rescale")
def _drop_small(tau, least, rescale):
    tau = _leaves.widened(tau)
    kept = jnp.abs(tau) >= least
    # A leaf keeps a whole number of entries. In a small leaf that share is not 1 - p.
    inverse = tau.size / jnp.maximum(tree.counts([kept])[0], 1)
    return rescaled(tau, kept, inverse.astype(tau.dtype), rescale)


def rescaled(
    tau: jax.Array, kept: jax.Array, inverse: Any, rescale: Rescale
) -> jax.Array:
    """Returns the kept entries, multiplied as `rescale` says; the others are zero.

    `inverse` is one divided by the share that is kept, or by the probability with which
    each entry is kept.
    """
    # This is zero, but NaN where an entry is NaN or infinite. So merges refuse such a
    # vector even if the entry was dropped.
    nothing = tau * 0
    if rescale == "inverse":
        return jnp.where(kept, tau * inverse, 0) + nothing
    rest = jnp.where(kept, tau, 0) + nothing
    if rescale == "none":
        return rest
    before, after = tree.sums([jnp.abs(tau), jnp.abs(rest)])
    some = after > 0
    return rest * jnp.where(some, before / jnp.where(some, after, 1), 0)
