"""Table 11 and Figure 3: accuracy by the number of tasks, and by the coefficient.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: section 4.5, 8.6.

    python -m experiments.awd.figure3_number_of_tasks --data-dir DATA
    python -m experiments.awd.figure3_number_of_tasks --tasks a=A b=B c=C d=D e=E \\
        --model MODEL --out runs/digits

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, ViT-B/32, mean test accuracy in percent over eight subsets of each size:

    method               2     3     4     5     6     7     8
    Individual           93.0  90.6  92.5  90.1  91.5  91.4  90.6
    Task Arithmetic      91.8  84.1  82.3  77.1  75.7  72.6  69.1
    Ties-Merging         92.6  85.6  83.9  79.2  77.6  75.1  72.4
    AWD Task Arithmetic  92.4  85.7  85.1  80.6  79.7  77.1  75.2

Figure 3a is this table with 95 % confidence intervals. Figure 3b: for λ up to 0.2 AWD
equals Task Arithmetic, for larger λ it is better.

For the paper's eight tasks the subsets are those of the paper's lists, unchanged. The
lists for two, three, five and six tasks have one set twice, in another order, and the
list for seven tasks has five different sets. For other tasks all subsets of each size
are used; if there are more than eight, eight are drawn with the seed. λ out of 0, 0.1,
…, 1 and α of AWD are chosen for each subset on its validation data. The intervals
assume Student's t and independent subsets; but subsets share tasks, so they are not
independent.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import stats
from tqdm import tqdm

from experiments.awd import disentangled, solving
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import plots, task_vectors
from jaxarith.typing import Taus

COEFS = np.linspace(0, 1, 11)
METHODS = ("Individual", "Task Arithmetic", "Ties-Merging", "AWD Task Arithmetic")
BESIDE = ("cosine with sum", "effective λ")  # averaged over the subsets
PUBLISHED = tables.published_by_column(__doc__, "method")
# Subsets of two to seven tasks, from Appendix 8.6.
SUBSETS = """
dtd gtsrb, gtsrb svhn, gtsrb sun397, svhn sun397, svhn gtsrb, svhn eurosat, svhn
mnist, mnist cars

mnist svhn sun397, mnist sun397 svhn, dtd gtsrb sun397, gtsrb eurosat cars, cars
gtsrb dtd, mnist resisc45 svhn, svhn mnist dtd, resisc45 sun397 eurosat

eurosat svhn cars sun397, mnist resisc45 eurosat gtsrb, eurosat cars resisc45 mnist,
dtd sun397 gtsrb eurosat, sun397 eurosat cars resisc45, resisc45 mnist gtsrb sun397,
resisc45 svhn gtsrb mnist, svhn gtsrb cars resisc45

dtd svhn gtsrb sun397 eurosat, dtd gtsrb mnist resisc45 sun397, svhn mnist gtsrb
resisc45 cars, dtd eurosat cars mnist resisc45, eurosat gtsrb mnist cars resisc45,
mnist cars sun397 dtd svhn, mnist sun397 resisc45 svhn dtd, svhn dtd cars sun397
mnist

gtsrb resisc45 dtd mnist svhn sun397, eurosat gtsrb cars mnist dtd resisc45, mnist
sun397 svhn resisc45 eurosat dtd, dtd mnist resisc45 svhn gtsrb sun397, svhn
resisc45 eurosat mnist gtsrb dtd, mnist dtd eurosat cars sun397 gtsrb, dtd cars svhn
sun397 eurosat mnist, svhn sun397 resisc45 gtsrb eurosat mnist

gtsrb mnist cars resisc45 svhn dtd eurosat, cars gtsrb mnist svhn sun397 eurosat
resisc45, cars mnist sun397 dtd eurosat gtsrb svhn, gtsrb sun397 eurosat cars
resisc45 dtd mnist, svhn cars gtsrb mnist sun397 eurosat dtd, eurosat gtsrb dtd
resisc45 svhn mnist sun397, mnist svhn gtsrb resisc45 eurosat dtd cars, eurosat
mnist gtsrb dtd resisc45 svhn sun397
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, options.OneModel):
    tasks: tuple[str, ...] = disentangled.TASKS


def subsets_of(names: Sequence[str], *, seed: int, largest: int = 8) -> list[tuple]:
    """Returns subsets of two and more tasks: the paper's, or `largest` of each size.

    Example:
      >>> subsets_of(["a", "b", "c"], seed=0)
      [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    if sorted(names) == sorted(disentangled.TASKS):
        full = SUBSETS.replace("cars", "stanford_cars").replace("\n\n", ",")
        listed = (tuple(text.split()) for text in " ".join(full.split()).split(","))
        return [*listed, tuple(disentangled.TASKS)]
    rng, found = np.random.default_rng(seed), []
    for size in range(2, len(names) + 1):
        subsets = list(itertools.combinations(names, size))
        if len(subsets) > largest:
            drawn = rng.choice(len(subsets), largest, replace=False)
            subsets = [subsets[i] for i in sorted(drawn)]
        found += subsets
    return found


def interval(values: Sequence[float]) -> float:
    """Returns half the 95 % confidence interval of a mean; 0 for a single value.

    Example:
      >>> print(round(interval([1.0, 2.0, 3.0]), 3))
      2.484
    """
    count = len(values)
    if count < 2:
        return 0.0
    return float(stats.t.ppf(0.975, count - 1) * stats.sem(values))


def sums_of(setup: setups.Setup, taus: Taus, how: solving.Options) -> dict[str, dict]:
    """Returns the candidate merged vectors at λ = 1, by method."""
    return {
        "Task Arithmetic": {"": task_vectors.add(taus)},
        "Ties-Merging": {"": disentangled.ties(setup, taus)},
        "AWD Task Arithmetic": disentangled.sums(setup, taus, how),
    }


def measured(
    setup: setups.Setup, taus, how: solving.Options, singles: dict[str, float]
) -> list[dict]:
    """Returns the rows of one subset, the tasks of `setup`."""
    tasks = {"tasks": setup.names, "number": len(setup.tasks)}
    mean = 100 * float(np.mean([singles[name] for name in setup.names]))
    none = dict.fromkeys(("alpha", *BESIDE))
    rows = [tasks | {"method": "Individual", "mean": mean} | none]
    coefs = scores.coefs_of(setup.options, COEFS)
    for method, sums in sums_of(setup, taus, how).items():
        found = disentangled.searched(setup, sums, coefs)
        row = tasks | {"method": method, "mean": scores.means(found.test)}
        row |= {"coef": found.coef} | none
        if len(sums) > 1:
            row["alpha"] = float(found.name)
            row |= disentangled.beside_sum(taus, sums[found.name], found.coef)
        rows.append(row)
    return rows


def by_number(rows: Sequence[dict]) -> list[dict]:
    """Returns the mean over subsets by size and method, with its interval."""
    found = []
    numbers = sorted({row["number"] for row in rows})
    for number, method in itertools.product(numbers, METHODS):
        chosen = [
            row for row in rows if (row["number"], row["method"]) == (number, method)
        ]
        own = [row["mean"] for row in chosen]
        row = {"number": number, "method": method, "mean": float(np.mean(own))}
        row |= {"± 95 %": interval(own), "subsets": len(own)}
        for name in BESIDE:
            values = [line[name] for line in chosen]
            row[name] = None if None in values else float(np.mean(values))
        found.append(row)
    return found


def by_coef(
    setup: setups.Setup, taus, how: solving.Options, alpha: float
) -> dict[str, list[float]]:
    """Returns, for Figure 3b, mean test accuracy of all tasks at each λ, by method."""
    coefs = scores.coefs_of(setup.options, COEFS)
    sums = sums_of(setup, taus, how)
    merged = [own.get(f"{alpha:g}") or own[""] for own in sums.values()]
    units = np.eye(len(merged))
    rows = np.concatenate([np.outer(coefs, unit) for unit in units])
    means = 100 * scores.on_all(setup, merged, "test", rows).mean(axis=1)
    parts = np.split(means, len(merged))
    return {
        method: list(map(float, own)) for method, own in zip(sums, parts, strict=True)
    }


def draw(config: Config, means: Sequence[dict], curves: dict):
    """Draws Figures 3a and 3b."""
    lines = {}
    for method in METHODS[1:]:
        own = [row for row in means if row["method"] == method]
        fields = ("number", "mean", "± 95 %")
        lines[method] = tuple([row[name] for row in own] for name in fields)
    labels = {"y": "mean test accuracy, %", "interval": "95 % confidence of the mean"}
    plots.bands(config.out / "figure3a.png", lines, x="number of tasks", **labels)
    coefs = list(map(float, scores.coefs_of(config, COEFS)))
    lines = {method: (coefs, own) for method, own in curves.items()}
    file = config.out / "figure3b.png"
    plots.curves(file, lines, x="coefficient λ", y="mean test accuracy, %")


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config)
    if len(config.tasks) < 2:
        raise ValueError(f"--tasks names {config.tasks}; expected two or more.")
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    taus = dict(zip(setup.names, vectors.vectors(setup, "nonlinear"), strict=True))
    tasks = {task.name: task for task in setup.tasks}
    singles = {
        name: scores.accuracies(setup, [tau], tasks[name].test, False, [[1.0]])[0]
        for name, tau in tqdm(taus.items(), desc="single models", unit="task")
    }
    once, rows = {}, []  # a set that the paper lists twice is measured once
    for subset in tqdm(subsets_of(setup.names, seed=config.seed), unit="subset"):
        names = frozenset(subset)
        if names not in once:
            own = setup._replace(tasks=[tasks[name] for name in subset])
            once[names] = measured(
                own, [taus[name] for name in subset], config, singles
            )
        rows += once[names]
    means = by_number(rows)
    alpha = rows[-1]["alpha"]  # the value for all tasks
    curves = by_coef(setup, list(taus.values()), config, alpha)
    if runs.is_first():
        draw(config, means, curves)
    is_paper = setup.title == "ViT-B-32" and (
        sorted(setup.names) == sorted(disentangled.TASKS) or config.smoke
    )
    beside = tables.beside(
        means,
        PUBLISHED if is_paper else {},
        keys=["number", "method", "± 95 %", "subsets"],
        values=["mean"],
        published_keys=["number", "method"],
    )
    results = {
        "rows": means,
        "subsets": rows,
        "coefs": list(map(float, scores.coefs_of(config, COEFS))),
        "alpha": alpha,
        "curves": curves,
    }
    caption = f"{setup.title}: mean test accuracy over subsets of the tasks, percent."
    names = ("number", "method", *BESIDE)
    compared = [{name: row[name] for name in names} for row in means if row[BESIDE[0]]]
    table = {
        caption: beside,
        "AWD's merged vector beside the plain sum of the same weights, mean over "
        "subsets.": tables.markdown(compared, digits=6),
    }
    title = "Accuracy by the number of tasks (AWD paper, Table 11 and Figure 3)"
    note = f"figure3a.png shows this table; figure3b.png all tasks, with α = {alpha:g}."
    return tables.write(config.out, title, table, results, note)


if __name__ == "__main__":
    script.run(Config, main)
