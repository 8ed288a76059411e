"""Exact order statistics of magnitudes over all leaves, without sorting or joining.

For small models NumPy selects among the entries, so nothing is compiled. For other
models the search uses bit patterns: read as integers, the bit patterns of magnitudes
have the same order as the magnitudes. Each pass over the leaves counts the entries
below a few trial patterns. That narrows the bracket around the wanted pattern, until
one pattern is left.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Array

TRIALS = 7  # patterns that a pass counts at the speed of memory
LARGE = 2**16  # a larger model gets a first guess from a sample of its entries
SAMPLE = 64  # the sample has every 64th row of a leaf
WHOLE = 2**21  # most entries of a leaf for which one program does all passes
JOINED = 2**21  # most entries of all vectors together for which NumPy selects


@_leaves.at_once
def kth_magnitudes(rows: Mapping[str, tuple], rank: int | Array) -> jax.Array:
    """Returns the `rank`-th smallest magnitude of each vector; 0 for rank 0.

    Args:
      rows: by path, the tuple of a leaf of T vectors.
      rank: from 1 to the number of entries of a vector; one rank for all vectors, or an
        array with one rank for each.

    Returns:
      `[T]` in float32, or in float64 if a leaf is float64.

    Raises:
      ValueError: a leaf has 2^31 entries or more, which an int32 cannot count. If `jit`
        traces the vectors, the limit holds for all leaves together.
    """
    known, traced = _leaves.unmapped(rows), _leaves.is_traced(rows)
    size = sum(row[0].size for row in known.values())
    counted = size if traced else max(row[0].size for row in known.values())
    if counted >= 2**31:
        raise ValueError(
            f"found {counted} entries to count; the limit is 2^31 - 1 for each leaf, "
            "and inside `jit` for all leaves together. Merge outside `jit`, or split "
            "the leaf."
        )
    tasks = len(next(iter(known.values())))
    leaves = [leaf for row in known.values() for leaf in row]
    dtype = tree.wide_dtype(*leaves)
    if isinstance(rank, int) and not rank:
        return jnp.zeros(tasks, dtype)
    traced = traced or tree.is_traced(rank)
    xp, whole = (jnp, jnp.int32) if traced else (np, np.int64)
    ranks: Any = xp.broadcast_to(xp.asarray(rank, whole), (tasks,))
    here = (getattr(leaf, "is_fully_addressable", True) for leaf in leaves)
    if size * tasks <= JOINED and not traced and all(here):
        return _selected(rows, ranks, dtype)
    guess = None
    if size > LARGE:
        sample = {path: tuple(map(_sample, rows[path])) for path in rows}
        drawn = sum(row[0].size for row in sample.values())
        near = (ranks / size * drawn).round().clip(1, drawn).astype(whole)
        guess = _search(sample, near, dtype, traced)
    return _search(rows, ranks, dtype, traced, guess)


def kth_of_leaf(row: tuple, rank: int | Array) -> jax.Array:
    """Returns `kth_magnitudes` of a single leaf of T vectors; 0 if it has no entries.

    One program for all passes is the fastest for small leaves. It is slow for large
    leaves, because it stores the magnitudes in float32, which all passes share.
    """
    if not row[0].size:
        rank = 0
    if row[0].size > WHOLE:
        return tree.settled(kth_magnitudes({"leaf": row}, rank))
    if isinstance(rank, int):
        rank = np.full(len(row), rank)
    return tree.settled(_kth_of_leaf(row, rank))


@jax.jit
def _kth_of_leaf(row, rank):
    return kth_magnitudes({"leaf": row}, rank if row[0].size else 0)


def _selected(rows, ranks, dtype):
    """Selects with NumPy, which needs memory for all entries."""
    flat = [
        [np.abs(np.asarray(jnp.asarray(leaf, dtype))).reshape(-1) for leaf in row]
        for row in rows.values()
    ]
    vectors = map(np.concatenate, zip(*flat, strict=True))
    # The smallest magnitude has rank 1; the result for rank 0 is 0.
    found = [
        np.partition(vector, max(rank, 1) - 1)[max(rank, 1) - 1] * (rank > 0)
        for vector, rank in zip(vectors, ranks, strict=True)
    ]
    return jnp.asarray(found, dtype)


def _sample(leaf):
    """Returns every 64th row of a leaf, or of its longest axis if it has few rows."""
    if leaf.ndim and leaf.shape[0] < SAMPLE:
        leaf = jnp.moveaxis(leaf, leaf.shape.index(max(leaf.shape)), 0)
    return leaf[::SAMPLE] if leaf.ndim else leaf


def _search(rows, rank, dtype, traced, guess=None):
    """Narrows a bracket until only the `rank`-th smallest magnitude is left.

    NumPy holds the bracket, because its counts may need 64 bits, unless `jit` traces.
    """
    known = _leaves.unmapped(rows)
    tasks = len(next(iter(known.values())))
    size = sum(row[0].size for row in known.values())
    bits = jnp.int64 if dtype == jnp.float64 else jnp.int32
    largest = np.array(np.inf, dtype).view(bits)
    xp, whole = (jnp, jnp.int32) if traced else (np, np.int64)
    found = _Bracket(
        xp.zeros(tasks, bits),
        xp.full(tasks, largest + 1),
        xp.zeros(tasks, whole),
        xp.full(tasks, size, whole),
    )

    def narrow(bracket, trials):
        counts = (_count_below(row, trials) for row in rows.values())
        below = sum(xp.asarray(tree.settled(count), whole) for count in counts)
        return _narrowed(xp, bracket, trials, below, rank)

    if guess is not None:
        found = narrow(found, xp.asarray(_around(guess, bits)))
    if traced:
        found = jax.lax.while_loop(
            _is_open, lambda bracket: narrow(bracket, _trials(xp, bracket, rank)), found
        )
    else:
        while _is_open(found):
            found = narrow(found, _trials(xp, found, rank))
    return jax.lax.bitcast_convert_type(jnp.asarray(found.low), dtype)


class _Bracket(NamedTuple):
    """Two patterns around the wanted one, and the numbers of entries below them.

    `below_low < rank <= below_high` always holds. So the wanted pattern is `low` once
    `high` is `low + 1`.
    """

    low: jax.Array
    high: jax.Array
    below_low: jax.Array
    below_high: jax.Array


def _is_open(bracket):
    return (bracket.high - bracket.low > 1).any()


@jax.jit
def _count_below(row, trials):
    """Returns the number of entries of a leaf below each pattern, `[task, trial]`."""

    def count(leaf, trials):
        leaf = jnp.asarray(leaf, "f8" if trials.dtype == jnp.int64 else "f4")
        pattern = jax.lax.bitcast_convert_type(jnp.abs(leaf), trials.dtype)
        return tree.counts([pattern < trial for trial in trials])

    return jnp.stack([count(*pair) for pair in zip(row, trials, strict=True)])


def _narrowed(xp, bracket, trials, below, rank):
    is_low = below < rank[:, None]
    low = xp.where(is_low, trials, bracket.low[:, None])
    high = xp.where(is_low, bracket.high[:, None], trials)
    # Counts grow with the patterns, so the extreme pattern has the extreme count.
    below_low = xp.where(is_low, below, bracket.below_low[:, None])
    below_high = xp.where(is_low, bracket.below_high[:, None], below)
    return _Bracket(low.max(1), high.min(1), below_low.max(1), below_high.min(1))


def _trials(xp, bracket, rank):
    """Returns the patterns to count next, `[task, trial]`, above `low`, up to `high`.

    Entries lie almost evenly between close patterns. So five trials are near the place
    where the rank should be, within two standard deviations of even sampling. The other
    two trials cut the bracket into thirds, for entries that do not lie evenly.
    """
    low, high = bracket.low[:, None], bracket.high[:, None]
    real = np.float64 if low.dtype == np.int64 else np.float32
    entries = (bracket.below_high - bracket.below_low)[:, None].astype(real)
    share = (rank - bracket.below_low)[:, None].astype(real) / entries
    steps = xp.array([[-1, -0.25, 0, 0.25, 1]], real) * 2 / xp.sqrt(entries)
    thirds = xp.broadcast_to(xp.array([[1 / 3, 2 / 3]], real), (len(low), 2))
    shares = xp.concatenate([share + steps, thirds], axis=1).clip(0, 1)
    trials = low + (shares * (high - low).astype(real)).astype(low.dtype)
    every = low + 1 + xp.arange(TRIALS, dtype=low.dtype)[None]
    return xp.where(high - low <= TRIALS + 1, every, trials).clip(low + 1, high)


def _around(guess, bits):
    """Returns the pattern of a guess, and patterns close to it on both sides.

    The guess and the next pattern are among them. Differences of models in bfloat16
    have few different values, so a sample finds the right one, and the search ends.
    """
    near = jnp.array([[0.8, 0.98, 0.998, 1, 1, 1.002, 1.02]], guess.dtype)
    patterns = jax.lax.bitcast_convert_type(guess[:, None] * near, bits)
    return patterns + jnp.array([[0, 0, 0, 0, 1, 1, 1]], bits)
