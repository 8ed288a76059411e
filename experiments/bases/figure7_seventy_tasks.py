"""Figures 7 and 8 (bases paper): seventy language tasks in clusters, merged by them.

Zeng et al. Efficient Model Editing with Task Vector Bases: A Theoretical Framework and
Scalable Approach. arXiv:2502.01015: section 6.4.1, Appendix D.3.

    python -m experiments.bases.figure7_seventy_tasks --data-dir DATA
    python -m experiments.bases.figure7_seventy_tasks --tasks MR=mr.txt QNLI RTE \\
        --prompt 'MR={text} It was {mask}.|0:terrible,1:great' --ks 1 2 --shown-ks 2

Data: the datasets of the paper's list, from the Hugging Face Hub but for SUBJ, CR, MPQA
and MR, which are files of LM-BFF's datasets.tar, unpacked in DATA; or any files.
`jaxarith/data/prompt_sources.json` says how each is read, and
`experiments.common.language.prompted` how RoBERTa-base is fine-tuned; it was not tried
against the Hub. Seventy vectors of the blocks take 24 GB of host memory and of the
bank's disk. Up to 32 merged models are evaluated on all test data; --samples bounds it.

Figure 7: the cosines of all task vectors, ordered by spectral clusters, with the k of
the largest eigengap and with k = 10. Figure 8: the mean accuracy of the mean of the
clusters' means, with the clusters and with five random partitions, by their number k.

Published: the eigengap gives k = 3, with clusters of one sentence and multiple choice,
of two sentences, and of texts by humans or machines. The lines are a plot only: k = 3
is best and above k = 1, random partitions are all below k = 1, and "far below" them are

    model          mean accuracy
    Pre-trained    42.15
    Majority vote  40.47

What the paper leaves open, and what we take:

- The list has 72 tasks, of which the paper keeps the 70 whose own model is better than
  a majority vote; so do we, on the test part. --keep-all keeps the others.
- Which k: those of the first version of its code, 1, 3, 5, 10, 15, 20, and 70.
- A majority vote is here for the most frequent class of the whole training split. The
  authors' code votes for one of the classes of the balanced few samples, at random.
- A random partition gives one task to every group, and the others to any; the
  authors' code gives all to any, and may leave a group empty.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from experiments.common import planning, runs, script, tables
from experiments.common.language import prompted, prompted_plan
from jaxarith import merge, plots, task_vectors
from jaxarith.data import prompt_sources
from jaxarith.merge.bases import cluster, eigengap
from jaxarith.typing import Taus, Tree

LIST = tuple(name for name in prompt_sources.sources() if name != "QQP")
PUBLISHED = tables.published(__doc__, "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompted.Options):
    """Figures 7 and 8 (bases paper): cluster seventy language tasks, and merge them."""

    tasks: tuple[str, ...] = LIST
    """The tasks, in order: names of the paper's list (Appendix D.3), or files with
    labelled texts, NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST."""
    ks: tuple[int, ...] = (1, 3, 5, 10, 15, 20, 70)
    """Numbers of clusters of Figure 8; a larger one than that of the tasks is a cluster
    of each."""
    shown_ks: tuple[int, ...] = (0, 10)
    """Numbers of clusters of Figure 7; 0 is the one that the eigengap gives."""
    partitions: int = 5
    """Random partitions for every number of clusters."""
    keep_all: bool = False
    """Keep tasks whose own model is not better than a majority vote."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    # The tiny model learns nothing, and no task would be kept.
    config = prompted.smoke(
        config, ks=(1, 2), shown_ks=(0, 2), partitions=2, keep_all=True
    )
    if len(config.tasks) < 3:
        raise ValueError(f"{len(config.tasks)} tasks; clusters need at least three.")
    if not config.ks or min(config.ks) < 1 or min(config.shown_ks, default=0) < 0:
        raise ValueError(f"--ks {config.ks} and --shown-ks {config.shown_ks}.")
    if record := planning.recorder():
        plan(config, record)
        return {}
    setup = prompted.load(config)
    taus = prompted.vectors(setup)
    tasks = measured(setup, taus)
    kept = [
        i
        for i, task in enumerate(tasks)
        if config.keep_all or task["fine-tuned"] > task["majority vote"]
    ]
    left_out = [setup.names[i] for i in range(len(tasks)) if i not in kept]
    if len(kept) < 3:
        raise ValueError(
            f"{len(kept)} tasks whose own model is better than a majority vote; "
            "clusters need three. Train for longer, or say --keep-all."
        )
    setup = setup._replace(tasks=[setup.tasks[i] for i in kept])
    taus, tasks = [taus[i] for i in kept], [tasks[i] for i in kept]
    cosines = np.asarray(task_vectors.cosine_matrix(taus), float)
    best_k = eigengap(cosines)
    shown = {k or best_k: cluster(cosines, k or best_k) for k in fitting(config, kept)}
    rows = merged(setup, taus, cosines, config)
    means = {
        name: float(np.mean([task[key] for task in tasks]))
        for name, key in (
            ("Pre-trained", "pre-trained"),
            ("Majority vote", "majority vote"),
            ("Individual", "fine-tuned"),
        )
    }
    if runs.is_first():
        figures(config.out, setup, cosines, shown, rows, means)
    results = {
        "tasks": tasks,
        "left out": left_out,
        "eigengap": best_k,
        "clusters": {
            str(k): [[setup.names[i] for i in members] for members in found]
            for k, found in shown.items()
        },
        "cosines": cosines.tolist(),
        "rows": rows,
        "means": means,
    }
    write(config, results)
    return results


def plan(config: Config, record: planning.Recorder):
    """Notes the vectors, and the passes over all test parts."""
    sizes = prompted_plan.vectors(record, config)
    count = len(config.tasks)
    numbers = {min(k, count) for k in config.ks}
    merges = sum(1 + (k not in (1, count)) * config.partitions for k in numbers)
    record.evaluate(sizes.full, (2 + merges) * sizes.tests)


def fitting(config: Config, kept: Sequence[int]) -> list[int]:
    return [k for k in config.shown_ks if k <= len(kept)]


def measured(setup: prompted.Setup, taus: Taus) -> list[dict]:
    """Accuracies on every task, in percent: a plain row of each."""
    before = prompted.scores(setup, setup.params_0, "test")
    rows = []
    progress = tqdm(setup.tasks, desc="single models", unit="task")
    for task, tau, zero_shot in zip(progress, taus, before, strict=True):
        own = task_vectors.apply(setup.params_0, tau)
        rows.append(
            {
                "task": task.name,
                "majority vote": 100 * task.majority,
                "pre-trained": 100 * float(zero_shot),
                "fine-tuned": 100 * prompted.score(setup, task, own, "test"),
            }
        )
    return rows


def merged(setup: prompted.Setup, taus: Taus, cosines, config: Config) -> list[dict]:
    """The mean accuracy of Mean after Mean, a row for every number of clusters."""
    rng = np.random.default_rng(config.seed)

    def accuracy(clusters):
        edited = mean_of_means(setup.params_0, taus, clusters)
        return 100 * float(np.mean(prompted.scores(setup, edited, "test")))

    rows = []
    numbers = sorted({min(k, len(taus)) for k in config.ks})
    for k in tqdm(numbers, desc="partitions", unit="k"):
        # With one cluster, or as many as tasks, all partitions are the same.
        count = 0 if k in (1, len(taus)) else config.partitions
        found = accuracy(cluster(cosines, k))
        others = [
            accuracy(random_partition(rng, len(taus), k)) for _ in range(count)
        ] or [found]
        rows.append(
            {
                "k": k,
                "bases": found,
                "random partitions": others,
                "random, mean": float(np.mean(others)),
                "random, best": float(np.max(others)),
            }
        )
    return rows


def mean_of_means(params_0, taus: Taus, clusters: Sequence[Sequence[int]]) -> Tree:
    """The average of the averages of every cluster's models, in one pass.

    A task's weight is one over the number of clusters and the size of its own.
    """
    weights = np.zeros(len(taus))
    for members in clusters:
        weights[list(members)] = 1 / (len(clusters) * len(members))
    return merge.task_arithmetic(params_0, taus, coef=weights.astype(np.float32))


def random_partition(rng: np.random.Generator, tasks: int, k: int) -> list[list[int]]:
    """k groups of the tasks at random, none of which is empty.

    Example:
      >>> found = random_partition(np.random.default_rng(0), 5, 3)
      >>> len(found), sorted(sum(found, []))
      (3, [0, 1, 2, 3, 4])
    """
    # First one task for every group, so that no labelling has to be thrown away.
    labels = np.concatenate([np.arange(k), rng.integers(k, size=tasks - k)])
    labels = rng.permutation(labels)
    return [np.flatnonzero(labels == label).tolist() for label in range(k)]


def figures(out, setup, cosines, shown, rows, means):
    plots.clustered(
        out / "figure7.png",
        cosines,
        {f"k = {k}": found for k, found in shown.items()},
        setup.names,
        value="cosine of task vectors",
    )
    ks = [row["k"] for row in rows]
    lines = {
        "bases (spectral clusters)": [[row["bases"]] for row in rows],
        "random partitions (mean and range)": [
            row["random partitions"] for row in rows
        ],
    }
    plots.repeated(
        out / "figure8.png",
        ks,
        lines,
        {name: means[name] for name in PUBLISHED},
        x="number of bases k",
        y="mean accuracy, percent",
    )


def write(config: Config, results: dict):
    """Writes report.json and report.md."""
    shown = [
        {name: value for name, value in row.items() if name != "random partitions"}
        for row in results["rows"]
    ]
    rows = [{"model": name, "accuracy": x} for name, x in results["means"].items()]
    theirs = PUBLISHED if config.smoke or config.tasks == LIST else {}
    beside = tables.beside(rows, theirs, keys=["model"], values=["accuracy"])
    captions = {
        "Figure 8: mean accuracy in percent by the number of bases.": tables.markdown(
            shown, digits=2
        ),
        "Mean accuracy in percent without a merge.": tables.markdown(beside, digits=2),
        "Every task, in percent.": tables.markdown(results["tasks"]),
    }
    parts = [f"The eigengap gives k = {results['eigengap']}; published: 3."]
    for k, found in results["clusters"].items():
        groups = "; ".join(", ".join(members) for members in found)
        parts.append(f"Clusters with k = {k}: {groups}.")
    if results["left out"]:
        names = ", ".join(results["left out"])
        parts.append(f"Not better than a majority vote, and left out: {names}.")
    title = "Seventy language tasks (bases, Figures 7 and 8)"
    tables.write(config.out, title, captions, results, "\n\n".join(parts))


if __name__ == "__main__":
    script.run(Config, main)
