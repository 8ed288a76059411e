"""Subsets and pairs of tasks, and disentanglement errors of pairs."""

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.common.vision import scores, setups
from jaxarith.typing import Numbers, Taus


def subsets(count: int) -> np.ndarray:
    """Returns all subsets of `count` tasks, by size and then lexicographically.

    Returns:
      `[2^count, count]` with zeros and ones; the first row is the empty subset.

    Example:
      >>> print(subsets(2).tolist())
      [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    sizes = range(count + 1)
    members = [c for n in sizes for c in itertools.combinations(range(count), n)]
    rows = np.zeros((len(members), count), int)
    for row, own in zip(rows, members, strict=True):
        row[list(own)] = 1
    return rows


def pairs(count: int) -> list[tuple[int, int]]:
    """Returns all pairs of `count` tasks.

    Example:
      >>> pairs(3)
      [(0, 1), (0, 2), (1, 2)]
    """
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def pair_values(matrix: np.ndarray) -> list[float]:
    """Returns for every pair the mean of its two entries (τJp paper, Eq. 9)."""
    return [float(matrix[i, j] + matrix[j, i]) / 2 for i, j in pairs(len(matrix))]


def pair_setup(setup: setups.Setup, pair: tuple[int, int]) -> setups.Setup:
    """Returns the setup with only two of its tasks."""
    return setup._replace(tasks=[setup.tasks[i] for i in pair])


def disentanglement_error(
    setup: setups.Setup,
    taus: Taus,
    *,
    linearized: bool,
    coefs: Numbers,
    samples: int = 2048,
    distances: Sequence[Callable] | None = None,
) -> np.ndarray:
    """Returns the disentanglement error ξ of the two tasks of `setup` on test data.

    Args:
      setup: a setup with two tasks, see `pair_setup`.
      taus: their vectors.
      linearized: whether the vectors belong to the tangent-space model.
      coefs: the n values of both coefficients.
      samples: number of test samples of each task, drawn with a fixed seed.
      distances: R functions `distance(dataset, features_1, features_2)`, which return
        means over samples; by default only `labels_differ`. All share one pass over the
        images.

    Returns:
      `[R, n, n]`; the first of the two n is the coefficient of the first task.
    """
    distances = distances or [labels_differ]
    grid = [(a, b) for a in coefs for b in coefs]
    alone = [[(a, 0) for a in coefs], [(0, b) for b in coefs]]
    shape = (len(coefs), len(coefs))
    total = np.zeros((len(distances), *shape))
    for axis, task in enumerate(setup.tasks):
        dataset = setups.drawn(setup, task.test, samples)
        at = scores.outputs(setup, taus, dataset, linearized)
        found = at(np.array(grid + alone[axis]))
        both, own = found[: len(grid)], found[len(grid) :]
        index = np.indices(shape)[axis].ravel()
        for part, distance in zip(total, distances, strict=True):
            values = [
                distance(dataset, own[i], x) for i, x in zip(index, both, strict=True)
            ]
            part += np.reshape(values, shape)
    return total


def labels_differ(dataset: setups.Dataset, first, second) -> float:
    """Returns the share of predictions that differ, for ξ (τJp paper, Eq. 2)."""
    return float(np.mean(dataset.predict(first) != dataset.predict(second)))


def symmetric_kl(dataset: setups.Dataset, first, second) -> float:
    """Returns the symmetric KL divergence of the softmax of two representations.

    It is half the sum of both directions, averaged over samples (linear-layers paper,
    section 4).
    """
    del dataset
    p, q = (jax.nn.log_softmax(np.asarray(x), axis=-1) for x in (first, second))
    return float(0.5 * np.mean(np.sum((np.exp(p) - np.exp(q)) * (p - q), axis=-1)))
