"""Table of bases of equal size: clusters, PCA, autoencoder, random sample.

Zeng et al. Task Vector Bases. arXiv:2502.01015. The first version of the paper has
clusters; the authors' current code has the other bases. The table is ours.

    python -m experiments.bases.basis_sizes --data-dir DATA
    python -m experiments.bases.basis_sizes --tasks a=FOLDER b=FOLDER c=FOLDER

Data: the eight image tasks, or any three or more. Negation needs the control task;
--control none leaves it out.

All bases store the same number of vectors (PCA's mean is one of them). Every task
vector is recovered from them:

- clusters: the mean of the task's cluster, from Algorithm 1;
- clusters, fitted: the nearest linear combination of these means;
- PCA, autoencoder: see `jaxarith.merge.linear_bases`;
- sample, fitted: the nearest linear combination of randomly chosen task vectors.

Columns:

- error: norm of the unrecovered part, relative to the norm of the task vectors;
- least: the smallest error that a linear basis of this size can have;
- own: accuracy on a task with its recovered vector, mean over tasks;
- sum of basis: accuracy on all tasks with the sum of the basis vectors. This is the
  paper's addition. For PCA the sum has no mean, as in the authors' code, and depends on
  the arbitrary signs of eigenvectors;
- sum of recovered: accuracy on all tasks with the sum of the recovered vectors. For
  clusters and PCA it equals the sum of the task vectors;
- target, control: accuracies after subtracting the recovered vector of a task, as in
  Table 6.

Coefficients are chosen on validation data. For sums they are 0, 0.05, …, 1. The
absolute weights of the task vectors always sum to T times the coefficient, so no sum
has a larger range than another.

A second table has the bounds of `jaxarith.evaluate.bounds` for every number of
clusters, relative to C, and the numbers that the eigengap and the bound of
generalization choose.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.bases import partitions
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import tree
from jaxarith.evaluate import bounds
from jaxarith.merge.bases import cluster, eigengap
from jaxarith.merge.linear_bases import (
    autoencoder_factors,
    combined,
    pca_factors,
    squared_error,
)
from jaxarith.typing import Taus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    model: str = partitions.LAION_B32
    sizes: tuple[int, ...] = ()
    """Numbers of stored vectors; by default half the tasks, as in the authors' code."""
    draws: int = 1
    """Number of starts of the autoencoder, and of random samples; the table averages
    over them."""
    tolerance: float = 0.25
    """Tolerance for the fewest clusters, relative to C: how much the bound of
    generalization may exceed that of one cluster per task."""


class Bases(NamedTuple):
    """A basis and its recovered vectors, as weights of the T task vectors.

    Attributes:
      method: name in the table.
      stored: number of stored vectors.
      basis: the basis vectors, `[T, M]`.
      recovered: the recovered vectors, `[T, T]`.
    """

    method: str
    stored: int
    basis: np.ndarray
    recovered: np.ndarray


def of_size(gram: jax.Array, stored: int, config: Config) -> list[Bases]:
    """Returns all bases of one size; random ones once for every draw.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      stored: number of stored vectors, less than T.
      config: options of the script.
    """
    tasks = len(gram)
    members = np.zeros((tasks, stored))
    for k, own in enumerate(cluster(tree.cosine(gram), stored)):
        members[own, k] = 1
    means = members / members.sum(axis=0)
    found = [
        Bases("clusters", stored, means, means @ members.T),
        fitted(gram, "clusters, fitted", means),
    ]
    if stored > 1:  # the mean takes one place
        encoder, decoder = map(np.asarray, pca_factors(gram, stored - 1))
        recovered = encoder @ decoder + 1 / tasks
        found.append(Bases("PCA", stored, encoder, recovered))
    for seed in range(config.seed, config.seed + config.draws):
        key = jax.random.key(seed)
        encoder, decoder = map(np.asarray, autoencoder_factors(gram, stored, key=key))
        found.append(Bases("autoencoder", stored, encoder, encoder @ decoder))
    for seed in range(config.seed, config.seed + config.draws):
        chosen = np.random.default_rng(seed).permutation(tasks)[:stored]
        found.append(fitted(gram, "sample, fitted", np.eye(tasks)[:, chosen]))
    return found


def fitted(gram: jax.Array, method: str, basis: np.ndarray) -> Bases:
    """Returns a basis with the nearest recovered vectors to the task vectors."""
    inner = basis.T @ np.asarray(gram, float)
    decoder = np.linalg.lstsq(inner @ basis, inner)[0]
    return Bases(method, basis.shape[1], basis, basis @ decoder)


def sum_of(weights: np.ndarray) -> np.ndarray:
    """Returns the sum of vectors `[T, n]`, scaled to absolute weights that sum to T."""
    total = weights.sum(axis=1)
    return total * (len(total) / np.abs(total).sum())


def measured(
    setup: setups.Setup, taus: Taus, gram: jax.Array, several: Sequence[Bases]
) -> list[dict]:
    """Returns a row for every basis."""
    sums = [
        sum_of(weights) for own in several for weights in (own.basis, own.recovered)
    ]
    # Many sums equal the sum of all task vectors; each is measured once.
    unique, which = np.unique(np.round(sums, 5), axis=0, return_inverse=True)
    coefs = scores.coefs_of(setup.options, scores.COEFS)
    found = scores.searched(setup, taus, unique, coefs)
    added = [found[i][0] for i in which]
    own_task = [
        scores.accuracies(
            setup, taus, task.test, False, [own.recovered[:, i] for own in several]
        )
        for i, task in enumerate(tqdm(setup.tasks, desc="own tasks", unit="task"))
    ]
    megabytes = 4e-6 * tree.size(taus[0])
    rows = []
    for i, own in enumerate(several):
        # A rounded zero may be negative.
        error = max(float(squared_error(gram, own.recovered) / gram.trace()), 0) ** 0.5
        row = {
            "method": own.method,
            "stored": own.stored,
            "MB": own.stored * megabytes,
            "error": error,
            "least": least_error(gram, own.stored),
            "own": scores.means([accuracies[i] for accuracies in own_task]),
            "sum of basis": added[2 * i],
            "sum of recovered": added[2 * i + 1],
        }
        rows.append(row | negated(setup, taus, own))
    return rows


def least_error(gram: jax.Array, stored: int) -> float:
    """Returns the error of the truncated SVD of the task vectors (Eckart, Young)."""
    shares = np.linalg.eigvalsh(np.asarray(gram, float) / float(gram.trace()))
    return max(float(shares[: len(gram) - stored].sum()), 0) ** 0.5


def negated(setup: setups.Setup, taus: Taus, own: Bases) -> dict:
    """Returns accuracies after negating recovered vectors; {} without a control."""
    if setup.control is None:
        return {}
    found = scores.negation(setup, combined(taus, own.recovered), linearized=False)
    target, control = found.searched
    return {"target": target, "control": control}


def means_over_draws(rows: Sequence[dict]) -> list[dict]:
    """Averages over draws: one row for every method and size."""
    groups: dict = {}
    for row in rows:
        groups.setdefault((row["method"], row["stored"]), []).append(row)
    found = []
    for (method, stored), group in groups.items():
        numbers = [name for name in group[0] if name not in ("method", "stored")]
        means = {name: float(np.mean([row[name] for row in group])) for name in numbers}
        found.append({"method": method, "stored": stored} | means)
    return found


def numbers_of_clusters(
    setup: setups.Setup, gram: jax.Array, tolerance: float
) -> list[dict]:
    """Returns the bounds for every number of clusters, and the chosen numbers."""
    cosines = tree.cosine(gram)
    fewest = len(bounds.fewest_clusters(gram, tolerance))
    largest = float(gram.diagonal().max())
    rows = []
    for count in range(1, len(gram) + 1):
        clusters = cluster(cosines, count)
        found = bounds.of_clusters(gram, clusters)
        chosen = {"eigengap": eigengap(cosines), "bound": fewest}
        rows.append(
            {
                "clusters": count,
                "addition": found.addition / largest,
                "generalization": found.generalization / largest,
                "chosen by": ", ".join(k for k, v in chosen.items() if v == count),
                "members": partitions.label(clusters, setup.titles),
            }
        )
    return rows


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, sizes=(1, 2))
    count = len(config.tasks)
    if count < 3:
        raise ValueError(
            f"--tasks names {count} tasks; expected at least 3, for an eigengap."
        )
    sizes = config.sizes or (count // 2,)
    if not all(0 < size < count for size in sizes):
        raise ValueError(f"--sizes {sizes}: expected numbers from 1 to {count - 1}.")
    if config.draws < 1:
        raise ValueError(f"--draws {config.draws}: expected 1 or more.")
    runs.start(config)
    setup = setups.load(config, config.model)
    taus = vectors.vectors(setup, "nonlinear")
    gram = tree.gram(taus)
    everything = Bases("task vectors", count, np.eye(count), np.eye(count))
    several = [own for size in sizes for own in of_size(gram, size, config)]
    rows = measured(setup, taus, gram, [everything, *several])
    choices = numbers_of_clusters(setup, gram, config.tolerance)
    results = {"rows": rows, "means": means_over_draws(rows), "clusters": choices}
    control = f", and on {setup.control.title}" if setup.control else ""
    shown = {
        f"Bases by size: accuracies in percent{control}; {config.draws} draws of the "
        "autoencoder and of samples.": tables.markdown(results["means"], digits=3),
        "Numbers of clusters: bounds relative to C, for a smoothness of 1; tolerance "
        f"{config.tolerance:g}.": tables.markdown(choices, digits=3),
    }
    return tables.write(config.out, "Bases of equal size", shown, results)


if __name__ == "__main__":
    script.run(Config, main)
