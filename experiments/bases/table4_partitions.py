"""Tables 4, 5, 10, 11 and 12: addition of task vector bases, for all partitions.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015: section 6.3, C.3.

    python -m experiments.bases.table4_partitions --data-dir DATA
    python -m experiments.bases.table4_partitions --tasks a=FOLDER b=FOLDER c=FOLDER \\
        --partition a,b c --models openai/clip-vit-base-patch32
    python -m experiments.bases.table4_partitions --smoke --out runs/smoke

Data: MNIST, SVHN, EuroSAT and RESISC45, or any tasks. T tasks have as many partitions
as Bell's number says, 15 of four and 4140 of eight; with --no-all-partitions only the
one of --partition (by default that of Algorithm 1), one cluster of all, and one of
every task are merged.

Published, mean test accuracy in percent; `merge_out` is Task Arithmetic in Table 4:

    merge_in   avg. k = 2   avg. all   MS-ER     Table 5   Save One   MS-ER   Save All
    MTL             95.45      93.85   95.52     Mean         86.04   89.88      89.88
    TIES            88.68      88.48   90.43     TIES         84.58   91.41      92.48
    Fisher          82.41      83.67   86.37     Topk         73.12   73.63      72.61
    Tangent         88.50      88.75   90.05
    Topk            82.17      83.05   85.69
    Mean            85.65      86.44   88.65

Table 10 has the 15 partitions behind Table 4, Table 11 three outer merges of bases by
Mean, Table 12 the same merge twice, with three models; all stand beside ours.

The paper does not say which checkpoints these are. Its zero-shot accuracies of Tables 6
and 7 fit ViT-B/32 of LAION-2B (`laion2b_e16`), which is there in OpenCLIP's format
only; we take the LAION-2B models that are in the format of transformers. What else is
not stated, and what we take:

- Bases are added with one coefficient of 0, 0.05, …, 1, the one with the best mean
  validation accuracy; with more than 1, k = 1 of Mean (87.41) would exceed k = 4.
- α = 0.4 of TIES is the factor of the sum of its entries, in both merges.
- A basis of one task is its task vector. The Topk cells of k = 4 in Tables 11 and 12
  differ (67.84, 68.04) and should then be one; so should k = 1 of Mean in Tables 10 and
  11 (87.41, 87.42). TIES at k = 1 of ViT-B/16 and L/14 in Table 12 has the values of
  Mean.
- MS-ER of TIES and Topk in Table 5 (91.41, 73.63) are 91.37 and 73.65 as the means of
  the cells of Table 12; the other cells agree.
- Joint training (MTL, Tangent) takes a batch of every member in each of as many steps
  as one task has, see `methods.cluster_vector`.

Tables 4, 10 and 11 are of the first model. Not run at full scale yet.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.bases import partitions
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, vectors
from jaxarith.typing import Taus, Tree

# By table, model, inner and outer merge, the columns in the order of `partitions`.
_TABLE_10 = {
    "MTL": (
        *(98.05, 95.52, 95.27, 94.40, 97.26, 95.99, 96.60, 93.12),
        *(91.74, 90.36, 92.25, 92.81, 93.38, 92.42, 88.62),
    ),
    "TIES": (
        *(90.74, 90.43, 90.17, 90.36, 83.69, 86.26, 89.70, 90.17),
        *(83.27, 88.83, 86.32, 90.10, 88.00, 90.58, 88.62),
    ),
    "Fisher": (
        *(72.88, 86.37, 81.45, 84.21, 73.60, 83.92, 85.72, 81.62),
        *(82.33, 88.36, 79.63, 90.51, 85.78, 90.09, 88.62),
    ),
    "Tangent": (
        *(88.61, 90.05, 90.05, 90.05, 85.07, 90.36, 83.56, 90.38),
        *(89.39, 92.15, 88.75, 88.57, 85.23, 89.00, 90.01),
    ),
    "Topk": (
        *(85.87, 85.69, 86.16, 85.95, 75.50, 78.55, 81.20, 82.14),
        *(76.43, 84.49, 79.97, 87.83, 84.01, 83.34, 88.62),
    ),
    "Mean": (
        *(87.41, 88.65, 88.65, 88.65, 79.54, 83.13, 84.26, 86.68),
        *(83.14, 88.34, 85.39, 88.75, 86.25, 89.14, 88.62),
    ),
}
_TABLE_11 = {
    "Mean": (
        *(87.42, 87.42, 87.42, 87.42, 79.50, 83.13, 84.10, 84.22),
        *(83.12, 86.61, 84.22, 88.18, 85.91, 87.25, 87.42),
    ),
    "TIES": (
        *(83.46, 89.60, 89.26, 89.02, 79.86, 82.50, 84.56, 84.18),
        *(83.04, 87.67, 85.61, 89.48, 87.34, 90.90, 90.70),
    ),
    "Topk": (
        *(68.71, 69.01, 68.12, 67.96, 68.71, 69.62, 67.63, 66.65),
        *(69.14, 67.88, 67.60, 68.23, 67.82, 67.09, 67.84),
    ),
}
_TABLE_12 = {
    ("ViT-B-16", "Mean"): (
        *(89.23, 89.23, 89.23, 89.23, 82.97, 85.41, 84.25, 86.99),
        *(85.57, 89.25, 87.05, 89.01, 87.10, 88.39, 89.23),
    ),
    ("ViT-B-16", "TIES"): (
        *(89.23, 90.65, 90.73, 90.83, 78.09, 75.97, 79.88, 82.82),
        *(81.35, 89.28, 87.66, 88.85, 86.55, 89.75, 91.55),
    ),
    ("ViT-B-16", "Topk"): (
        *(72.98, 72.50, 72.26, 72.14, 71.98, 71.62, 72.03, 70.21),
        *(71.45, 70.47, 70.81, 71.56, 71.86, 70.96, 70.75),
    ),
    ("ViT-B-32", "Mean"): _TABLE_11["Mean"],
    ("ViT-B-32", "TIES"): (
        *(85.31, 89.28, 89.35, 90.32, 82.90, 86.26, 91.36, 88.19),
        *(85.75, 89.92, 87.64, 91.96, 90.47, 92.78, 90.70),
    ),
    ("ViT-B-32", "Topk"): (
        *(70.60, 68.56, 69.23, 69.37, 69.62, 69.69, 68.33, 67.21),
        *(67.84, 67.96, 68.04, 68.36, 68.59, 67.04, 68.04),
    ),
    ("ViT-L-14", "Mean"): (
        *(92.98, 92.98, 92.98, 92.98, 88.75, 92.40, 89.11, 91.70),
        *(91.57, 93.94, 91.41, 92.84, 90.19, 92.06, 92.98),
    ),
    ("ViT-L-14", "TIES"): (
        *(92.98, 94.17, 94.15, 94.67, 86.82, 88.61, 85.88, 88.12),
        *(91.55, 94.53, 91.51, 93.26, 90.28, 92.81, 95.18),
    ),
    ("ViT-L-14", "Topk"): (
        *(80.02, 79.88, 79.40, 79.48, 78.87, 79.21, 80.12, 78.56),
        *(78.97, 78.57, 78.81, 79.45, 79.46, 80.12, 79.05),
    ),
}
PUBLISHED = {
    **{("10", "ViT-B-32", name): cells for name, cells in _TABLE_10.items()},
    **{("11", "ViT-B-32", name): cells for name, cells in _TABLE_11.items()},
    **{("12", *names): cells for names, cells in _TABLE_12.items()},
}
# Average of k = 2, average of all, and MS-ER.
TABLE_4 = {
    "MTL": (95.45, 93.85, 95.52),
    "TIES": (88.68, 88.48, 90.43),
    "Fisher": (82.41, 83.67, 86.37),
    "Tangent": (88.50, 88.75, 90.05),
    "Topk": (82.17, 83.05, 85.69),
    "Mean": (85.65, 86.44, 88.65),
}
TABLE_5 = {
    "Mean": (86.04, 89.88, 89.88),
    "TIES": (84.58, 91.41, 92.48),
    "Topk": (73.12, 73.63, 72.61),
}
# Vectors that are evaluated at once, all of which every device holds.
_TOGETHER = 8
CAPTIONS = {
    "10": "Table 10: bases of several inner merges, added with one coefficient",
    "11": "Table 11: bases by Mean, several outer merges",
    "12": "Table 12: the same inner and outer merge",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Bases of all partitions of a few tasks, with several inner and outer merges."""

    out: Path = Path("runs/bases/table4")
    """Folder for report.json and report.md."""
    models: tuple[str, ...] = (
        *(partitions.LAION_B32, partitions.LAION_B16, partitions.LAION_L14),
    )
    """CLIPs: folders, or ids of the Hugging Face Hub. Of the first are Tables 4, 10 and
    11, of all Tables 5 and 12."""
    tasks: tuple[str, ...] = partitions.FOUR
    """The tasks, in order: names of jaxarith data check, or NAME=FOLDER."""
    partition: tuple[str, ...] = ()
    """The partition that Tables 4 and 5 single out, MS-ER in the paper: clusters such
    as mnist,svhn eurosat,resisc45. By default that of Algorithm 1."""
    all_partitions: bool = True
    """Merge with all partitions; --no-all-partitions takes three, see above."""
    inner: tuple[str, ...] = partitions.INNER
    """The inner merges of Tables 4 and 10. MTL and Tangent train every cluster."""


def evaluated(
    setup: options.Setup, taus: Taus, linearized: bool, coefs, split: str
) -> np.ndarray:
    """Mean accuracy in percent at each of n sets of coefficients, `[n]`."""
    found = [
        scores.accuracies(setup, taus, getattr(task, split), linearized, coefs)
        for task in tqdm(setup.tasks, desc=f"bases addition, {split}", unit="task")
    ]
    return 100 * np.mean(found, axis=0)


def added(
    setup: options.Setup,
    bases: Sequence[Tree],
    clusters: Sequence[tuple[int, ...]],
    several: Sequence[partitions.Partition],
    linearized: bool,
) -> list[tuple[float, float]]:
    """Task Arithmetic over the bases of each partition: accuracy and coefficient.

    All partitions share one pass over the validation data and one over the test data.
    """
    rows = np.zeros((len(several), len(clusters)))
    for row, partition in zip(rows, several, strict=True):
        row[[clusters.index(partitions.key(members)) for members in partition]] = 1
    coefs = scores.coefs_of(setup.options, scores.COEFS)
    grid = (coefs[:, None, None] * rows).reshape(-1, len(clusters))
    curves = evaluated(setup, bases, linearized, grid, "validation")
    best = coefs[curves.reshape(len(coefs), -1).argmax(axis=0)]
    found = evaluated(setup, bases, linearized, best[:, None] * rows, "test")
    return [(float(a), float(c)) for a, c in zip(found, best, strict=True)]


def merged_twice(
    setup: options.Setup,
    bases: Sequence[Tree],
    clusters: Sequence[tuple[int, ...]],
    several: Sequence[partitions.Partition],
    outer: str,
) -> list[tuple[float, None]]:
    """An outer merge without data, of the bases of each partition: test accuracies."""
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
        found += evaluated(setup, taus, False, np.eye(len(taus)), "test").tolist()
        progress.update(len(taus))
    progress.close()
    return [(accuracy, None) for accuracy in found]


def chosen_partition(setup: options.Setup, config: Config) -> partitions.Partition:
    """The given partition, or that of Algorithm 1."""
    if config.partition:
        return partitions.given_partition(config.partition, setup.names)
    return partitions.found_partition(vectors.vectors(setup, "nonlinear"))


def several_of(config: Config, count: int, chosen) -> list[partitions.Partition]:
    """The partitions that are merged, each once."""
    if config.all_partitions:
        return partitions.partitions(count)
    ends = [list(range(count))], [[i] for i in range(count)]
    unique = {partitions.frozen(own): own for own in (ends[0], chosen, ends[1])}
    found = list(unique.values())
    # In seconds: a cluster of all tasks is another shape of every merge.
    return found[1:] if config.smoke else found


def rows_of(
    setup: options.Setup, config: Config, several: Sequence, is_first: bool
) -> list[dict]:
    """The rows of one model, in the order of the tables and of their columns."""
    clusters = partitions.clusters_of(several)
    inner = list(config.inner) if is_first else []
    plan = [("10", name, "Task Arithmetic") for name in inner]
    if is_first:
        plan += [("11", "Mean", name) for name in partitions.DATALESS]
    plan += [("12", name, name) for name in partitions.DATALESS]
    names = partitions.letters(setup.titles)
    cells: dict = {}  # Mean over Mean is in two tables
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
    """A table of the paper on its side: a row for every partition, ours beside theirs.

    Published cells stand beside partitions that the paper has, by their label.
    """
    labels = [
        partitions.label(partition, "MSER") for partition in partitions.partitions(4)
    ]
    own = [row for row in rows if (row["model"], row["table"]) == (model, table)]
    found: dict[str, dict] = {}
    for row in own:
        line = found.setdefault(row["label"], {"partition": row["label"]})
        cells = PUBLISHED.get((table, model, row["merge"]), [None] * len(labels))
        theirs = dict(zip(labels, cells, strict=True)).get(row["label"])
        line |= {row["merge"]: row["abs"], f"{row['merge']}, published": theirs}
    return list(found.values())


def summary(
    rows: Sequence[Mapping], chosen: partitions.Partition, averaged: bool
) -> list[dict]:
    """Table 4: the partition that is singled out, and the averages of Table 10.

    Without averages where not all partitions were merged.
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
    """Runs the tables; returns what `report.json` holds."""
    config = options.smoke(config)
    names = partitions.names_of(config)
    if len(names) < 2:
        raise ValueError(f"at least two tasks are merged; got {names}.")
    partitions.check_inner(config.inner)
    if config.partition:
        partitions.given_partition(config.partition, names)  # before anything is loaded
    if config.all_partitions:  # --no-all-partitions takes three
        partitions.check_count(len(names))
    if config.smoke:
        config = dataclasses.replace(config, all_partitions=False)
    runs.start(config)
    rows: list[dict] = []
    chosen = None
    for setup in options.setups(config, config.models, control=False):
        # Of the first model, so that one partition is compared over all.
        is_first = chosen is None
        chosen = chosen or chosen_partition(setup, config)
        several = several_of(config, len(setup.tasks), chosen)
        rows += rows_of(setup, config, several, is_first)
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
    columns = list(table_4[0])[1:]  # the averages, or not, and the bases
    theirs = {name: values[-len(columns) :] for name, values in TABLE_4.items()}
    shown = {
        f"Table 4: mean accuracy over partitions, and that of {natural}, percent; Task "
        "Arithmetic is the outer merge.": tables.beside(
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
    written = {k: tables.markdown(lines, digits=2) for k, lines in shown.items()}
    title = "Addition of bases, all partitions (bases paper, Tables 4, 5, 10, 11, 12)"
    return tables.write(config.out, title, written, results)


if __name__ == "__main__":
    script.run(Config, main)
