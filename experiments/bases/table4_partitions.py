"""Tables 4, 5, 10, 11 and 12: addition of task vector bases, for all partitions.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.3, C.3.

    python -m experiments.bases.table4_partitions --data-dir DATA
    python -m experiments.bases.table4_partitions --tasks a=FOLDER b=FOLDER c=FOLDER \\
        --partition a,b c --models openai/clip-vit-base-patch32

Data: MNIST, SVHN, EuroSAT and RESISC45, or any tasks. The number of partitions is
Bell's number: 15 for four tasks, 4140 for eight. With --no-all-partitions only three
are merged: that of --partition (by default Algorithm 1's), one cluster of all tasks,
and one cluster per task.

Published, mean test accuracy in percent. Table 4 has a row for every inner merge, with
Task Arithmetic as outer merge: averages over partitions, and the partition MS-ER:

    Table 4  avg. k = 2  avg. all  MS-ER
    MTL      95.45       93.85     95.52
    TIES     88.68       88.48     90.43
    Fisher   82.41       83.67     86.37
    Tangent  88.50       88.75     90.05
    Topk     82.17       83.05     85.69
    Mean     85.65       86.44     88.65

Table 5, the same inner and outer merge, means over three models, by what is saved
before the next task comes:

    Table 5  Save One  MS-ER  Save All
    Mean     86.04     89.88  89.88
    TIES     84.58     91.41  92.48
    Topk     73.12     73.63  72.61

Table 10, the partitions behind Table 4, by inner merge:

    Table 10  MTL    TIES   Fisher  Tangent  Topk   Mean
    MSER      98.05  90.74  72.88   88.61    85.87  87.41
    MS-ER     95.52  90.43  86.37   90.05    85.69  88.65
    MR-ES     95.27  90.17  81.45   90.05    86.16  88.65
    ME-SR     94.40  90.36  84.21   90.05    85.95  88.65
    M-ESR     97.26  83.69  73.60   85.07    75.50  79.54
    S-MER     95.99  86.26  83.92   90.36    78.55  83.13
    E-MSR     96.60  89.70  85.72   83.56    81.20  84.26
    R-MSE     93.12  90.17  81.62   90.38    82.14  86.68
    M-S-ER    91.74  83.27  82.33   89.39    76.43  83.14
    S-R-EM    90.36  88.83  88.36   92.15    84.49  88.34
    M-R-ES    92.25  86.32  79.63   88.75    79.97  85.39
    E-S-RM    92.81  90.10  90.51   88.57    87.83  88.75
    M-E-RS    93.38  88.00  85.78   85.23    84.01  86.25
    E-R-MS    92.42  90.58  90.09   89.00    83.34  89.14
    M-S-E-R   88.62  88.62  88.62   90.01    88.62  88.62

Table 11, bases by Mean, by outer merge:

    Table 11  Mean   TIES   Topk
    MSER      87.42  83.46  68.71
    MS-ER     87.42  89.60  69.01
    MR-ES     87.42  89.26  68.12
    ME-SR     87.42  89.02  67.96
    M-ESR     79.50  79.86  68.71
    S-MER     83.13  82.50  69.62
    E-MSR     84.10  84.56  67.63
    R-MSE     84.22  84.18  66.65
    M-S-ER    83.12  83.04  69.14
    S-R-EM    86.61  87.67  67.88
    M-R-ES    84.22  85.61  67.60
    E-S-RM    88.18  89.48  68.23
    M-E-RS    85.91  87.34  67.82
    E-R-MS    87.25  90.90  67.09
    M-S-E-R   87.42  90.70  67.84

Table 12, the same merge twice, Mean / TIES / Topk, by model:

    Table 12  ViT-B-16               ViT-B-32               ViT-L-14
    MSER      89.23 / 89.23 / 72.98  87.42 / 85.31 / 70.60  92.98 / 92.98 / 80.02
    MS-ER     89.23 / 90.65 / 72.50  87.42 / 89.28 / 68.56  92.98 / 94.17 / 79.88
    MR-ES     89.23 / 90.73 / 72.26  87.42 / 89.35 / 69.23  92.98 / 94.15 / 79.40
    ME-SR     89.23 / 90.83 / 72.14  87.42 / 90.32 / 69.37  92.98 / 94.67 / 79.48
    M-ESR     82.97 / 78.09 / 71.98  79.50 / 82.90 / 69.62  88.75 / 86.82 / 78.87
    S-MER     85.41 / 75.97 / 71.62  83.13 / 86.26 / 69.69  92.40 / 88.61 / 79.21
    E-MSR     84.25 / 79.88 / 72.03  84.10 / 91.36 / 68.33  89.11 / 85.88 / 80.12
    R-MSE     86.99 / 82.82 / 70.21  84.22 / 88.19 / 67.21  91.70 / 88.12 / 78.56
    M-S-ER    85.57 / 81.35 / 71.45  83.12 / 85.75 / 67.84  91.57 / 91.55 / 78.97
    S-R-EM    89.25 / 89.28 / 70.47  86.61 / 89.92 / 67.96  93.94 / 94.53 / 78.57
    M-R-ES    87.05 / 87.66 / 70.81  84.22 / 87.64 / 68.04  91.41 / 91.51 / 78.81
    E-S-RM    89.01 / 88.85 / 71.56  88.18 / 91.96 / 68.36  92.84 / 93.26 / 79.45
    M-E-RS    87.10 / 86.55 / 71.86  85.91 / 90.47 / 68.59  90.19 / 90.28 / 79.46
    E-R-MS    88.39 / 89.75 / 70.96  87.25 / 92.78 / 67.04  92.06 / 92.81 / 80.12
    M-S-E-R   89.23 / 91.55 / 70.75  87.42 / 90.70 / 68.04  92.98 / 95.18 / 79.05

The paper does not name its checkpoints. The zero-shot accuracies of Tables 6 and 7 fit
ViT-B/32 of LAION-2B, `laion2b_e16`, which is our default; the two others are models of
LAION-2B too. Other choices and observations:

- Bases are added with one coefficient out of 0, 0.05, …, 1, the one with the best mean
  validation accuracy. With coefficients above 1, k = 1 of Mean (87.41) would exceed
  k = 4.
- α = 0.4 of TIES multiplies the sum of its entries, in both merges.
- A basis of one task is its task vector. Then the Topk cells of k = 4 in Tables 11 and
  12 should be equal, but they differ (67.84, 68.04); so do k = 1 of Mean in Tables 10
  and 11 (87.41, 87.42). In Table 12, TIES at k = 1 of ViT-B/16 and L/14 has the values
  of Mean.
- In Table 5, MS-ER of TIES and Topk are 91.41 and 73.63; the means of the cells of
  Table 12 are 91.37 and 73.65. The other cells agree.
- Joint training (MTL, Tangent) is described in `vectors.cluster_vector`.

Tables 4, 10 and 11 use the first model.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from experiments.bases import partitions
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith.typing import Tree

TABLE_4 = tables.published(__doc__, "Table 4")
TABLE_5 = tables.published(__doc__, "Table 5")
# Published values by (table, model, merge, partition).
PUBLISHED = {
    (table, "ViT-B-32", merge, label): value
    for table in ("10", "11")
    for (merge, label), (value,) in tables.published_by_column(
        __doc__, f"Table {table}"
    ).items()
} | {
    ("12", model, merge, label): value
    for (model, label), values in tables.published_by_column(
        __doc__, "Table 12"
    ).items()
    for merge, value in zip(("Mean", "TIES", "Topk"), values, strict=True)
}
# Number of vectors that are evaluated at once; every device holds all of them.
_TOGETHER = 8
CAPTIONS = {
    "10": "Table 10: bases from several inner merges, added with one coefficient",
    "11": "Table 11: bases from Mean, several outer merges",
    "12": "Table 12: the same inner and outer merge",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(partitions.Options):
    models: tuple[str, ...] = (
        *(partitions.LAION_B32, partitions.LAION_B16, partitions.LAION_L14),
    )
    """CLIPs: folders, or ids of the Hugging Face Hub. Tables 4, 10 and 11 use the
    first, Tables 5 and 12 use all."""
    all_partitions: bool = True
    """Merge with all partitions; --no-all-partitions uses three, see above."""


def added(
    setup: setups.Setup,
    bases: Sequence[Tree],
    clusters: Sequence[tuple[int, ...]],
    several: Sequence[partitions.Partition],
    linearized: bool,
) -> list[tuple[float, float]]:
    """Adds the bases of each partition; returns accuracies and coefficients."""
    rows = np.zeros((len(several), len(clusters)))
    for row, partition in zip(rows, several, strict=True):
        row[[clusters.index(partitions.key(members)) for members in partition]] = 1
    coefs = scores.coefs_of(setup.options, scores.COEFS)
    return scores.searched(setup, bases, rows, coefs, linearized=linearized)


def merged_twice(
    setup: setups.Setup,
    bases: Sequence[Tree],
    clusters: Sequence[tuple[int, ...]],
    several: Sequence[partitions.Partition],
    outer: str,
) -> list[tuple[float, None]]:
    """Merges the bases of each partition without data; returns test accuracies."""
    found: list[float] = []
    progress = tqdm(total=len(several), desc=f"outer {outer}", unit="partition")
    for first in range(0, len(several), _TOGETHER):
        taus = [
            partitions.merged_vector(
                *(setup, outer),
                [bases[clusters.index(partitions.key(own))] for own in partition],
            )
            for partition in several[first : first + _TOGETHER]
        ]
        own = scores.on_all(setup, taus, "test", np.eye(len(taus)))
        found += (100 * own.mean(axis=1)).tolist()
        progress.update(len(taus))
    progress.close()
    return [(accuracy, None) for accuracy in found]


def several_of(config: Config, count: int, chosen) -> list[partitions.Partition]:
    """Returns the partitions to merge, each only once."""
    if config.all_partitions:
        return partitions.partitions(count)
    ends = [list(range(count))], [[i] for i in range(count)]
    unique = {partitions.frozen(own): own for own in (ends[0], chosen, ends[1])}
    found = list(unique.values())
    # A smoke run skips the cluster of all tasks, which needs another compilation.
    return found[1:] if config.smoke else found


def rows_of(
    setup: setups.Setup, config: Config, several: Sequence, is_first: bool
) -> list[dict]:
    """Returns the rows of one model, in the order of the tables and columns."""
    clusters = partitions.clusters_of(several)
    inner = list(config.inner) if is_first else []
    plan = [("10", name, "Task Arithmetic") for name in inner]
    if is_first:
        plan += [("11", "Mean", name) for name in partitions.DATALESS]
    plan += [("12", name, name) for name in partitions.DATALESS]
    names = partitions.letters(setup.titles)
    cells: dict = {}  # cells are reused: Mean over Mean is in two tables
    for first in dict.fromkeys(first for _, first, _ in plan):
        bases = partitions.merged_clusters(setup, first, clusters)
        for second in {second: None for _, name, second in plan if name == first}:
            given = (setup, bases, clusters, several)
            if second == "Task Arithmetic":
                cells[first, second] = added(*given, first == "Tangent")
            else:
                cells[first, second] = merged_twice(*given, second)
    rows = []
    for table, first, second in plan:
        for partition, (accuracy, coef) in zip(
            several, cells[first, second], strict=True
        ):
            rows.append(
                {
                    "table": table,
                    "model": partitions.architecture(setup),
                    "inner": first,
                    "outer": second,
                    "merge": second if table == "11" else first,
                    "label": partitions.label(partition, names),
                    "partition": partition,
                    "abs": accuracy,
                    "coefficient": coef,
                }
            )
    return rows


def beside(rows: Sequence[Mapping], model: str, table: str) -> list[dict]:
    """Returns a transposed table of the paper: a row per partition, ours and theirs.

    Published cells are found by the label of the partition.
    """
    own = [row for row in rows if (row["model"], row["table"]) == (model, table)]
    found: dict[str, dict] = {}
    for row in own:
        merge, label = row["merge"], row["label"]
        line = found.setdefault(label, {"partition": label})
        theirs = PUBLISHED.get((table, model, merge, label))
        line |= {merge: row["abs"], f"{merge}, published": theirs}
    return list(found.values())


def summary(
    rows: Sequence[Mapping], chosen: partitions.Partition, averaged: bool
) -> list[dict]:
    """Returns Table 4: the chosen partition, and the averages of Table 10.

    It has no averages if not all partitions were merged.
    """
    found = []
    own = [row for row in rows if row["table"] == "10"]
    natural = partitions.frozen(chosen)
    for name in dict.fromkeys(row["merge"] for row in own):
        cells = [row for row in own if row["merge"] == name]
        line = {"inner": name}
        if averaged:
            line |= partitions.averages(
                {row["label"]: row["abs"] for row in cells},
                {row["label"]: len(row["partition"]) for row in cells},
            )
        [value] = [
            row["abs"]
            for row in cells
            if partitions.frozen(row["partition"]) == natural
        ]
        found.append(line | {"bases": value})
    return found


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config)
    names = config.names
    if len(names) < 2:
        raise ValueError(f"--tasks names {names}; expected two or more.")
    partitions.check(config)
    if config.all_partitions:
        partitions.check_count(len(names))
    if config.smoke:
        config = dataclasses.replace(config, all_partitions=False)
    runs.start(config)
    rows: list[dict] = []
    models: list[str] = []
    chosen: partitions.Partition = []
    setup = None
    for setup in setups.each(config, config.models, control=False):
        # The first model chooses the partition; all models use the same one.
        is_first = not chosen
        taus = vectors.vectors(setup, "nonlinear")
        chosen = chosen or partitions.chosen_partition(config, taus)
        several = several_of(config, len(setup.tasks), chosen)
        rows += rows_of(setup, config, several, is_first)
        models.append(setup.model)
    assert setup is not None  # there is a model
    letters = partitions.letters(setup.titles)
    natural = partitions.label(chosen, letters)
    twice = [row for row in rows if row["table"] == "12"]
    table_4 = summary(rows, chosen, config.all_partitions)
    table_5 = partitions.save_strategies(twice, chosen, len(setup.tasks))
    results = {
        "partition": {"label": natural, "clusters": chosen},
        "rows": rows,
        "table_4": table_4,
        "table_5": table_5,
    }
    are_theirs = tuple(names) == partitions.FOUR and natural == "MS-ER"
    columns = list(table_4[0])[1:]  # the averages, if any, and the bases
    theirs = {name: values[-len(columns) :] for name, values in TABLE_4.items()}
    shown = {
        f"Table 4: mean accuracy over partitions, and accuracy of {natural}, percent; "
        "Task Arithmetic is the outer merge.": tables.beside(
            table_4,
            theirs if are_theirs else {},
            keys=["inner"],
            values=columns,
        ),
        f"Table 5: means over the models; the bases are {natural}.": tables.beside(
            table_5,
            TABLE_5 if are_theirs else {},
            keys=["merge"],
            values=["save_one", "bases", "save_all"],
        ),
    }
    shown = {k: v for k, v in shown.items() if v}
    for table, model in dict.fromkeys((row["table"], row["model"]) for row in rows):
        shown[f"{CAPTIONS[table]}; {model}."] = beside(rows, model, table)
    title = "Addition of bases, all partitions (bases paper, Tables 4, 5, 10, 11, 12)"
    note = partitions.other_models(models) if tuple(names) == partitions.FOUR else ""
    return tables.write(config.out, title, shown, results, note, digits=2)


if __name__ == "__main__":
    script.run(Config, main)
