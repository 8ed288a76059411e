"""Rows beyond the AWD paper's tables: later merges, and the simplest rivals of AWD.

Merges have the library's defaults and the coefficients of their papers. TSV-M and WUDI
use 1. Iso-C, Iso-CTS, DC-Merge and ESM use the best of 0.1, 0.2, …, 3 on validation
data, PCB-Merging the best of 0.8, 0.9, …, 1.3. ESM uses 32 unlabelled validation images
per task; the others use none. "WUDI, spectral filter" is the closed form; the
participation ratio sets its number of directions. Published, mean test accuracy in
percent on the same eight tasks:

    merge        source            ViT-B-32  ViT-B-16  ViT-L-14
    TSV-M        arXiv:2606.19164  85.9      89.0      93.0
    Iso-C        arXiv:2606.19164  86.3      90.6      94.2
    Iso-CTS      arXiv:2606.19164  86.2      91.1      94.7
    DC-Merge     arXiv:2606.19164  87.1      90.8      94.3
    ESM          arXiv:2606.19164  88.6      91.6      94.7
    WUDI         WUDI's README     85.2      -         92.6
    PCB-Merging  WUDI's README     76.3      -         87.5

arXiv:2606.19164 is the paper of ESM. It ran the merges of other papers on TSV-M's
checkpoints; their individual models have 92.8, 94.6 and 95.8. WUDI's README uses the
checkpoints of the AWD paper's tables.

AWD merges only the weights of the linear layers. Two rows show what AWD gains over
their plain sum, and what K scalars can gain at most:

- "Task Arithmetic, linear weights": their plain sum, at the best λ of 0.3, …, 1 on
  validation data.
- "K weights searched": one coefficient per task for the same weights, by coordinate
  ascent on mean validation accuracy. All start at the λ of the row above. Each of at
  most three sweeps visits the tasks in order, and moves a coefficient to the best of 0,
  0.1, …, 1 if that is better than its current value.

Further rows have AWD of other vectors, beside their plain sum: vectors with only the
attention weights trained (linear-layers paper, paradigm 1), and linearised vectors with
the cyclic τJp penalty, which are evaluated in the tangent space.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.awd import disentangled, solving
from experiments.common import tables
from experiments.common.vision import fitted, scores, setups, vectors
from jaxarith import merge, task_vectors
from jaxarith.typing import Numbers, Taus

Other = Literal["linear_layers_1", "tau_jp_cyclic"]
NAMES: dict[Other, str] = {
    "linear_layers_1": "attention weights",
    "tau_jp_cyclic": "linearised, τJp",
}
_TO_THREE = np.linspace(0.1, 3, 30)
MERGES: dict[str, tuple[Callable, Numbers]] = {  # (merge, coefficients to try)
    "TSV-M": (merge.tsv, (1.0,)),
    "Iso-C": (merge.iso_c, _TO_THREE),
    "Iso-CTS": (merge.iso_cts, _TO_THREE),
    "DC-Merge": (merge.dc_merge, _TO_THREE),
    "WUDI": (merge.wudi, (1.0,)),
    "WUDI, spectral filter": (
        functools.partial(merge.wudi, solver="closed", rank="participation"),
        (1.0,),
    ),
    "PCB-Merging": (merge.pcb, np.linspace(0.8, 1.3, 6)),
}
ESM = "ESM"  # the only one that needs images
PUBLISHED = tables.published_by_column(__doc__, "merge", "source")
PLAIN, SEARCHED = "Task Arithmetic, linear weights", "K weights searched"
TENTHS = np.linspace(0, 1, 11)
SWEEPS = 3


def published(title: str) -> dict[str, tuple[float, str]]:
    """Returns, by merge, the published mean accuracy on a model, and its source."""
    return {
        name: (value, source)
        for (model, name, source), (value,) in PUBLISHED.items()
        if model == title
    }


def ascent(
    values: Callable[[np.ndarray], np.ndarray],
    tasks: int,
    start: float,
    candidates: Numbers = TENTHS,
) -> np.ndarray:
    """Finds a coefficient for every task by coordinate ascent (see the module).

    It is like `evaluate.search_per_task`, but makes one call for all candidates of a
    task: they share a pass over the images.

    Args:
      values: function to maximise, from rows of coefficients `[n, K]` to `[n]`.
      tasks: number of tasks, K.
      start: initial coefficient of all tasks.
      candidates: possible values of a coefficient.

    Example:
      >>> ascent(lambda c: -np.sum((c - [0.3, 0.8]) ** 2, axis=1), 2, 0.5)
      array([0.3, 0.8])
    """
    chosen = np.full(tasks, start)
    for _ in range(SWEEPS):
        before = chosen
        for task in range(tasks):
            rows = np.tile(chosen, (len(candidates) + 1, 1))
            rows[1:, task] = candidates
            chosen = rows[np.argmax(values(rows))]  # if equal, the current value
        if np.array_equal(chosen, before):
            break
    return chosen


def weights_searched(
    setup: setups.Setup, parts: Taus, start: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `ascent`'s coefficients on validation data, and test accuracies, `[T]`.

    Args:
      setup: the model and the tasks.
      parts: one vector per task.
      start: initial coefficient of all tasks.
    """

    def means(rows):
        return scores.on_all(setup, parts, "validation", rows).mean(axis=1)

    candidates = scores.coefs_of(setup.options, TENTHS)
    weights = ascent(means, len(parts), start, candidates)
    return weights, scores.on_all(setup, parts, "test", weights[None])[0]


def rows_of(
    setup: setups.Setup, taus: Taus, how: solving.Options, others: Sequence[Other]
) -> list[dict]:
    """Returns the rows of one model.

    Args:
      setup: the model and the tasks.
      taus: the vectors of ordinary fine-tuning.
      how: options of the script.
      others: further methods; AWD merges their vectors too.
    """
    coefs, rows = disentangled.coefs(setup.options), []

    def add(method, accuracies, beside=None, **found):
        row = {"model": setup.title, "method": method, **setup.by_task(accuracies)}
        row |= {"mean": scores.means(accuracies), "coef": None, "alpha": None}
        row |= {"weights": None} | found
        rows.append(row | (beside or {"cosine with sum": None, "effective λ": None}))

    def add_merge(name, vector, candidates):
        found = disentangled.searched(setup, {"": vector}, candidates)
        add(name, found.test, coef=found.coef)

    progress = tqdm(MERGES.items(), desc="merges", unit="merge")
    for name, (method, candidates) in progress:
        model = method(setup.params_0, taus, coef=1.0)
        vector = task_vectors.difference(model, setup.params_0)
        add_merge(name, vector, candidates)
    add_merge(ESM, fitted.esm(setup, taus), _TO_THREE)
    parts = disentangled.linear_weights(taus)
    total = task_vectors.add(parts)
    plain = disentangled.searched(setup, {"": total}, coefs)
    beside = solving.beside_sum(total, total, plain.coef)
    add(PLAIN, plain.test, beside, coef=plain.coef)
    weights, test = weights_searched(setup, parts, plain.coef)
    beside = solving.beside_sum(solving.weighted_sum(parts, weights), total)
    add(SEARCHED, test, beside, weights=" ".join(f"{w:g}" for w in weights))
    for method in others:
        own = vectors.vectors(setup, method)
        given = {"linearized": vectors.is_linearized(method)}
        plain = disentangled.searched(
            setup, {"": task_vectors.add(own)}, coefs, **given
        )
        add(f"Task Arithmetic, {NAMES[method]}", plain.test, coef=plain.coef)
        sums = disentangled.sums(setup, own, how)
        found = disentangled.searched(setup, sums, coefs, **given)
        beside = disentangled.beside_sum(own, sums[found.name], found.coef)
        chosen = {"coef": found.coef, "alpha": float(found.name)}
        add(f"AWD, {NAMES[method]}", found.test, beside, **chosen)
    return rows


def shown(setup: setups.Setup, rows: Sequence[dict]) -> dict[str, str]:
    """Returns the tables of a model by caption."""
    known = published(setup.title)
    same = sorted(setup.names) == sorted(disentangled.TASKS) or setup.options.smoke
    lines = []
    for row in rows:
        value, source = known.get(row["method"], (None, None)) if same else (None, None)
        cells = {name: row[name] for name in ("method", *setup.names, "mean")}
        lines.append(cells | {"mean, published": value, "by": source})
    names = ("method", "coef", "alpha", "weights", "cosine with sum", "effective λ")
    chosen = [{name: row[name] for name in names} for row in rows]
    title = f"{setup.title}: not in the AWD paper"
    return {
        f"{title}. Test accuracy, percent.": tables.markdown(lines),
        f"{title}: searched values.": tables.markdown(chosen, digits=6),
    }
