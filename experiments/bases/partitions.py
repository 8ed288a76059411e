"""What the scripts of the bases paper share: partitions, and merged clusters.

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
# The order of the columns of Tables 10 to 12, M, S, E and R being tasks 0 to 3.
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
    """The options of scripts that merge the clusters of partitions."""

    tasks: tuple[str, ...] = FOUR
    partition: tuple[str, ...] = ()
    """The partition that is singled out, MS-ER in the paper: clusters such as
    mnist,svhn eurosat,resisc45. By default that of Algorithm 1."""
    inner: tuple[str, ...] = INNER
    """The inner merges. MTL and Tangent train every cluster."""

    @property
    def names(self) -> list[str]:
        """The names of the tasks, some of which are given as NAME=FOLDER."""
        return [spec.partition("=")[0] for spec in self.tasks]


def architecture(setup: setups.Setup) -> str:
    """What the paper calls a model: by its architecture alone."""
    known = {Path(model).name: title for model, title in LAION.items()}
    return known.get(Path(setup.model).name, setup.title)


def other_models(models: Iterable[str]) -> str:
    """A line on models that are not the paper's beside its numbers, or nothing.

    The paper does not say which checkpoints its tables of partitions are of. Zero-shot
    accuracies of Tables 6 and 7 fit `laion2b_e16`.

    Example:
      >>> other_models([LAION_B32, "runs/clip"])  # doctest: +ELLIPSIS
      "Published numbers are of OpenCLIP's models of LAION-2B (...); ours of clip."
    """
    known = {Path(model).name for model in LAION}
    names = [Path(model).name for model in models]
    if not (others := [name for name in names if name not in known]):
        return ""
    return (
        "Published numbers are of OpenCLIP's models of LAION-2B (ViT-B-32: by its "
        f"accuracies laion2b_e16); ours of {', '.join(others)}."
    )


def partitions(count: int) -> list[Partition]:
    """All partitions of so many tasks into clusters, those of fewer clusters first.

    Those of four tasks are in the order of the paper's Tables 10 to 12, with members as
    they are written there.

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
    """The initials of tasks, where all are different, or else their names.

    Example:
      >>> letters(["MNIST", "SVHN"]), letters(["Cars", "CIFAR10"])
      (['M', 'S'], ['Cars', 'CIFAR10'])
    """
    initials = [title[0].upper() for title in titles]
    return initials if len(set(initials)) == len(titles) else list(titles)


def label(partition: Partition, names: Sequence[str]) -> str:
    """A partition as the paper writes it, or with names of several letters.

    Example:
      >>> label([[0, 1], [2]], "MSE"), label([[0, 1], [2]], ["dtd", "sun397", "cars"])
      ('MS-E', 'dtd+sun397 - cars')
    """
    short = all(len(name) == 1 for name in names)
    within, between = ("", "-") if short else ("+", " - ")
    groups = (within.join(names[i] for i in members) for members in partition)
    return between.join(groups)


def given_partition(clusters: Sequence[str], names: Sequence[str]) -> Partition:
    """The partition that clusters such as "mnist,svhn" make of the tasks.

    Raises:
      ValueError: a name is none of a task, or not every task is in exactly one cluster.

    Example:
      >>> given_partition(["mnist,svhn", "dtd"], ["mnist", "svhn", "dtd"])
      [[0, 1], [2]]
    """
    listed = [[name.strip() for name in members.split(",")] for members in clusters]
    unknown = sorted({n for members in listed for n in members} - set(names))
    if unknown:
        raise ValueError(
            f"--partition names {', '.join(unknown)}, and the tasks are "
            f"{', '.join(names)}."
        )
    indices = [[list(names).index(name) for name in members] for members in listed]
    try:
        return in_order(checked_partition(indices, len(names)))
    except ValueError as error:
        raise ValueError(
            f"--partition {' '.join(clusters)}: every one of the tasks "
            f"{', '.join(names)} must be in exactly one cluster. {error}"
        ) from error


def check(config: Options):
    """Raises a ValueError for inner merges or a partition that there are not."""
    unknown = [name for name in config.inner if name not in INNER]
    if unknown or not config.inner:
        raise ValueError(
            f"--inner {', '.join(unknown)}; the merges are {', '.join(INNER)}."
        )
    if config.partition:
        given_partition(config.partition, config.names)


def check_count(count: int):
    """Raises a ValueError for so many tasks that their partitions are too many."""
    if count > 6:
        raise ValueError(
            f"{count} tasks have too many partitions to merge them all; six tasks have "
            "203. table4_partitions has --no-all-partitions."
        )


def chosen_partition(config: Options, taus: Taus) -> Partition:
    """The given partition, or that of Algorithm 1 for the vectors."""
    if config.partition:
        return given_partition(config.partition, config.names)
    return found_partition(taus)


def found_partition(taus: Taus) -> Partition:
    """The clusters of Algorithm 1; of two vectors, which have no eigengap, both."""
    if len(taus) < 3:
        return [[i] for i in range(len(taus))]
    return in_order(cluster(task_vectors.cosine_matrix(taus)))


def key(members: Iterable[int]) -> tuple[int, ...]:
    """A cluster, in whichever order its members are written."""
    return tuple(sorted(members))


def frozen(partition: Partition) -> frozenset:
    """A partition, in whichever order its clusters are written."""
    return frozenset(map(key, partition))


def in_order(partition: Partition) -> Partition:
    """The same partition as `partitions` has it, so that it has the paper's label.

    Example:
      >>> in_order([[3, 2], [1, 0]]), in_order([[2], [1, 0]])
      ([[0, 1], [2, 3]], [[0, 1], [2]])
    """
    if sum(map(len, partition)) != 4:
        return sorted(map(sorted, partition))
    [found] = [p for p in partitions(4) if frozen(p) == frozen(partition)]
    return found


def clusters_of(several: Sequence[Partition]) -> list[tuple[int, ...]]:
    """All clusters of some partitions, each once; of all those of T tasks 2**T - 1."""
    found = {key(members): None for partition in several for members in partition}
    return list(found)


def ties(params_0: Params, taus: Taus) -> Tree:
    """TIES with α = 0.4 (C.5), on the sum of the entries of the elected sign.

    The paper does not say whether they are summed or averaged. It is the sum that
    Table 12 needs: at 0.4 the mean of sparse vectors would move little, as that of Topk
    does, and TIES is the best of the outer merges there.
    """
    return merge.ties(params_0, taus, density=0.2, coef=0.4, aggregate="sum")


# Merges that need the vectors alone; the others of `INNER` need data.
DATALESS: Mapping[str, Callable] = {
    "Mean": merge.average,
    "TIES": ties,
    "Topk": merge.topk,
}


def merged_clusters(
    setup: setups.Setup, inner: str, clusters: Sequence[tuple[int, ...]]
) -> list[Tree]:
    """The basis vector of every cluster, on the host.

    A cluster of one task is its own vector with every method: the paper has the same
    number for M-S-E-R in all rows of Table 10 but that of Tangent.

    Args:
      setup: the model and the tasks.
      inner: one of `INNER`.
      clusters: members by their index.
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
    """What one of the merges without data makes of some vectors, as a task vector."""
    found = DATALESS[method](setup.params_0, taus)
    return task_vectors.difference(found, setup.params_0)


def averages(values: Mapping[str, float], sizes: Mapping[str, int]) -> dict:
    """Columns "Avg." of Table 10: the means over partitions of k = 2 and over all.

    Args:
      values: by the label of each partition.
      sizes: the number of clusters of each.
    """
    two = [value for name, value in values.items() if sizes[name] == 2]
    return {
        "avg_k2": float(np.mean(two)) if two else None,
        "avg_all": float(np.mean(list(values.values()))),
    }


def save_strategies(
    rows: Sequence[Mapping], natural: Partition, count: int
) -> list[dict]:
    """Table 5: what is worth saving before the next task comes, means over models.

    "Save One" merges all earlier tasks into one vector: the mean of the partitions into
    one task and the cluster of all others. "Save All" keeps every vector.

    Args:
      rows: with "merge", the "partition" as lists of indices, and "abs"; of every
        model, with the same inner and outer merge.
      natural: the partition whose bases are saved, MS-ER in the paper.
      count: the number of tasks.
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
