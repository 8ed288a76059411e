"""Shared code of the bases paper's scripts: partitions, and merged clusters.

Zeng et al. Efficient Model Editing with Task Vector Bases: A Theoretical Framework and
Scalable Approach. arXiv:2502.01015.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.common.vision import fitted, options, setups, vectors
from jaxarith import merge, sharding, task_vectors
from jaxarith.merge.bases import checked_partition, cluster
from jaxarith.typing import Params, Taus, Tree

Partition = list[list[int]]

FOUR = ("mnist", "svhn", "eurosat", "resisc45")
# The order of partitions in Tables 10 to 12; M, S, E and R are tasks 0 to 3.
_OF_FOUR = (
    *("MSER", "MS-ER", "MR-ES", "ME-SR", "M-ESR", "S-MER", "E-MSR", "R-MSE"),
    *("M-S-ER", "S-R-EM", "M-R-ES", "E-S-RM", "M-E-RS", "E-R-MS", "M-S-E-R"),
)
INNER = ("MTL", "TIES", "Fisher", "Tangent", "Topk", "Mean")

# OpenCLIP's models of LAION-2B. The first is laion2b_e16, in OpenCLIP's own format.
LAION_B32 = "timm/vit_base_patch32_clip_224.laion2b_e16"
LAION_B16 = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
LAION_L14 = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
LAION = {LAION_B32: "ViT-B-32", LAION_B16: "ViT-B-16", LAION_L14: "ViT-L-14"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """Options of scripts that merge the clusters of partitions."""

    tasks: tuple[str, ...] = FOUR
    partition: tuple[str, ...] = ()
    """The partition with its own column (MS-ER in the paper), for example mnist,svhn
    eurosat,resisc45. By default Algorithm 1 finds it."""
    inner: tuple[str, ...] = INNER
    """The inner merges. MTL and Tangent train a model for every cluster."""

    @property
    def names(self) -> list[str]:
        """The names of the tasks, without folders."""
        return [spec.partition("=")[0] for spec in self.tasks]


def architecture(setup: setups.Setup) -> str:
    """Returns the paper's name of a model, which is its architecture."""
    known = {Path(model).name: title for model, title in LAION.items()}
    return known.get(Path(setup.model).name, setup.title)


def other_models(models: Iterable[str]) -> str:
    """Returns a note if our models differ from the paper's, else "".

    The paper does not name the checkpoints of its tables of partitions. The zero-shot
    accuracies of Tables 6 and 7 fit `laion2b_e16`.

    Example:
      >>> other_models([LAION_B32, "runs/clip"])  # doctest: +ELLIPSIS
      "Published numbers use OpenCLIP's models of LAION-2B (...); ours use clip."
    """
    known = {Path(model).name for model in LAION}
    names = [Path(model).name for model in models]
    if not (others := [name for name in names if name not in known]):
        return ""
    return (
        "Published numbers use OpenCLIP's models of LAION-2B (ViT-B-32: by its "
        f"accuracies laion2b_e16); ours use {', '.join(others)}."
    )


def partitions(count: int) -> list[Partition]:
    """Returns all partitions of `count` tasks into clusters, fewest clusters first.

    For four tasks, partitions and members have the order of the paper's Tables 10 to
    12.

    Example:
      >>> partitions(3)
      [[[0, 1, 2]], [[0, 1], [2]], [[0, 2], [1]], [[0], [1, 2]], [[0], [1], [2]]]
      >>> partitions(4)[9]
      [[1], [3], [2, 0]]
    """
    if count == 4:
        return [
            [["MSER".index(letter) for letter in group] for group in label.split("-")]
            for label in _OF_FOUR
        ]
    found: list[Partition] = [[]]
    for task in range(count):
        found = [
            grown
            for groups in found
            for grown in (
                *(
                    [*groups[:i], [*group, task], *groups[i + 1 :]]
                    for i, group in enumerate(groups)
                ),
                [*groups, [task]],
            )
        ]
    return sorted(found, key=len)


def letters(titles: Sequence[str]) -> list[str]:
    """Returns the initials of tasks if all are different, else their names.

    Example:
      >>> letters(["MNIST", "SVHN"]), letters(["Cars", "CIFAR10"])
      (['M', 'S'], ['Cars', 'CIFAR10'])
    """
    initials = [title[0].upper() for title in titles]
    return initials if len(set(initials)) == len(titles) else list(titles)


def label(partition: Partition, names: Sequence[str]) -> str:
    """Returns a partition as the paper writes it, or with longer names.

    Example:
      >>> label([[0, 1], [2]], "MSE"), label([[0, 1], [2]], ["dtd", "sun397", "cars"])
      ('MS-E', 'dtd+sun397 - cars')
    """
    short = all(len(name) == 1 for name in names)
    within, between = ("", "-") if short else ("+", " - ")
    groups = (within.join(names[i] for i in members) for members in partition)
    return between.join(groups)


def given_partition(clusters: Sequence[str], names: Sequence[str]) -> Partition:
    """Returns the partition of the tasks from clusters, for example "mnist,svhn".

    Raises:
      ValueError: a name is unknown, or a task is not in exactly one cluster.

    Example:
      >>> given_partition(["mnist,svhn", "dtd"], ["mnist", "svhn", "dtd"])
      [[0, 1], [2]]
    """
    listed = [[name.strip() for name in members.split(",")] for members in clusters]
    unknown = sorted({n for members in listed for n in members} - set(names))
    if unknown:
        raise ValueError(
            f"--partition names {', '.join(unknown)}; expected the tasks "
            f"{', '.join(names)}."
        )
    indices = [[list(names).index(name) for name in members] for members in listed]
    try:
        return in_order(checked_partition(indices, len(names)))
    except ValueError as error:
        raise ValueError(
            f"--partition {' '.join(clusters)}: each of the tasks {', '.join(names)} "
            f"must be in exactly one cluster. {error}"
        ) from error


def check(config: Options):
    """Raises a ValueError for unknown inner merges, or a wrong partition."""
    unknown = [name for name in config.inner if name not in INNER]
    if unknown or not config.inner:
        raise ValueError(
            f"--inner {', '.join(unknown)}: expected merges out of {', '.join(INNER)}."
        )
    if config.partition:
        given_partition(config.partition, config.names)


def check_count(count: int):
    """Raises a ValueError if the tasks have too many partitions to merge them all."""
    if count > 6:
        raise ValueError(
            f"{count} tasks have too many partitions to merge them all; expected at "
            "most six tasks, which have 203. table4_partitions has --no-all-partitions."
        )


def chosen_partition(config: Options, taus: Taus) -> Partition:
    """Returns the given partition, or the one that Algorithm 1 finds."""
    if config.partition:
        return given_partition(config.partition, config.names)
    return found_partition(taus)


def found_partition(taus: Taus) -> Partition:
    """Returns the clusters of Algorithm 1; one or two vectors stay single."""
    if len(taus) < 3:
        return [[i] for i in range(len(taus))]
    return in_order(cluster(task_vectors.cosine_matrix(taus)))


def key(members: Iterable[int]) -> tuple[int, ...]:
    """Returns a cluster as a key that ignores the order of its members."""
    return tuple(sorted(members))


def frozen(partition: Partition) -> frozenset:
    """Returns a partition as a key that ignores all orders."""
    return frozenset(map(key, partition))


def in_order(partition: Partition) -> Partition:
    """Returns the partition in the order of `partitions`, which fixes its label.

    Example:
      >>> in_order([[3, 2], [1, 0]]), in_order([[2], [1, 0]])
      ([[0, 1], [2, 3]], [[0, 1], [2]])
    """
    if sum(map(len, partition)) != 4:
        return sorted(map(sorted, partition))
    [found] = [p for p in partitions(4) if frozen(p) == frozen(partition)]
    return found


def clusters_of(several: Sequence[Partition]) -> list[tuple[int, ...]]:
    """Returns all clusters of some partitions, each only once."""
    found = {key(members): None for partition in several for members in partition}
    return list(found)


def ties(params_0: Params, taus: Taus) -> Tree:
    """Merges by TIES with α = 0.4 (C.5); it sums the entries of the elected sign.

    The paper does not say whether they are summed or averaged. Only the sum explains
    Table 12, where TIES is the best outer merge: at 0.4 the mean of sparse vectors
    would change the model only a little, as Topk does.
    """
    return merge.ties(params_0, taus, density=0.2, coef=0.4, aggregate="sum")


# Merges that need only the vectors; the others of `INNER` need data.
DATALESS: Mapping[str, Callable] = {
    "Mean": merge.average,
    "TIES": ties,
    "Topk": merge.topk,
}


def merged_clusters(
    setup: setups.Setup, inner: str, clusters: Sequence[tuple[int, ...]]
) -> list[Tree]:
    """Returns the basis vector of every cluster, on the host.

    The basis of a cluster with one task is the task's vector, for every method: in
    Table 10 the paper has the same number for M-S-E-R in all rows except Tangent.

    Args:
      setup: the model and the tasks.
      inner: one of `INNER`.
      clusters: clusters, as indices of their members.
    """
    linearized = inner == "Tangent"
    taus = vectors.vectors(setup, "linear" if linearized else "nonlinear")

    def merged(members):
        tasks = [setup.tasks[i] for i in members]
        own = [taus[i] for i in members]
        if len(members) == 1:
            return own[0]
        if inner in ("MTL", "Tangent"):
            return vectors.cluster_vector(setup, tasks, linearized=linearized)
        if inner == "Fisher":
            return fitted.fisher(setup._replace(tasks=tasks), own)
        return merged_vector(setup, inner, own)

    bar = tqdm(clusters, desc=f"bases, {inner}", unit="cluster")
    return [sharding.to_host(merged(members)) for members in bar]


def merged_vector(setup: setups.Setup, method: str, taus: Taus) -> Tree:
    """Merges some vectors by a merge without data; returns a task vector."""
    found = DATALESS[method](setup.params_0, taus)
    return task_vectors.difference(found, setup.params_0)


def averages(values: Mapping[str, float], sizes: Mapping[str, int]) -> dict:
    """Returns the columns "Avg." of Table 10: means over k = 2, and over all.

    Args:
      values: values by the label of a partition.
      sizes: numbers of clusters by the label of a partition.
    """
    two = [value for name, value in values.items() if sizes[name] == 2]
    return {
        "avg_k2": float(np.mean(two)) if two else None,
        "avg_all": float(np.mean(list(values.values()))),
    }


def save_strategies(
    rows: Sequence[Mapping], natural: Partition, count: int
) -> list[dict]:
    """Returns the rows of Table 5: three ways to save vectors, means over models.

    "Save One" merges all earlier tasks into one vector: it is the mean over the
    partitions with one single task and one cluster of all others. "Save All" keeps
    every vector.

    Args:
      rows: rows of all models with the same inner and outer merge; each has "merge",
        "partition" (lists of indices) and "abs".
      natural: the partition whose bases are saved, MS-ER in the paper.
      count: number of tasks.
    """
    everything = {(i,) for i in range(count)}

    def is_one(partition):
        sizes = sorted(map(len, partition))
        return sizes == sorted([1, count - 1])

    chosen = {
        "save_one": is_one,
        "bases": lambda p: frozen(p) == frozen(natural),
        "save_all": lambda p: frozen(p) == everything,
    }
    found = []
    for name in dict.fromkeys(row["merge"] for row in rows):
        own = [row for row in rows if row["merge"] == name]
        means: dict = {"merge": name}
        for strategy, belongs in chosen.items():
            values = [row["abs"] for row in own if belongs(row["partition"])]
            means[strategy] = float(np.mean(values)) if values else None
        found.append(means)
    return found
