"""What the AWD paper's tables lack: later merges, and the simplest rivals of AWD.

Merges with the library's defaults, at the coefficients of their papers: TSV-M and WUDI
at 1, Iso-C, Iso-CTS, DC-Merge and ESM at the best of 0.1, 0.2, …, 3 on validation data,
PCB-Merging at that of 0.8, 0.9, …, 1.3. ESM looks at 32 validation images of a task
without their labels, the others at none. "WUDI, spectral filter" is the closed form
along as many directions as the participation ratio says. Published, mean test accuracy
in percent on the same eight tasks:

    merge        source            ViT-B-32  ViT-B-16  ViT-L-14
    TSV-M        arXiv:2606.19164  85.9      89.0      93.0
    Iso-C        arXiv:2606.19164  86.3      90.6      94.2
    Iso-CTS      arXiv:2606.19164  86.2      91.1      94.7
    DC-Merge     arXiv:2606.19164  87.1      90.8      94.3
    ESM          arXiv:2606.19164  88.6      91.6      94.7
    WUDI         WUDI's README     85.2      -         92.6
    PCB-Merging  WUDI's README     76.3      -         87.5

arXiv:2606.19164 is the paper of ESM, which ran other papers' merges on the checkpoints
of TSV-M's, whose individual models have 92.8, 94.6 and 95.8. WUDI's README has the
checkpoints of the AWD paper's tables.

AWD merges the weights of the linear layers alone. What it gains over their plain sum,
and what K scalars can gain at all, two rows say:

- "Task Arithmetic, linear weights": their plain sum, at the λ of 0.3, …, 1 that is best
  on validation data.
- "K weights searched": a coefficient for every task by coordinate ascent on mean
  validation accuracy, on the same weights. It starts at the λ of the row above for all
  tasks; in each of at most three sweeps it visits the tasks in order and moves the
  coefficient of one to the best of 0, 0.1, …, 1 if that is better than where it is.

And AWD of other vectors, beside their plain sum: those of fine-tuning the attention
weights alone (linear-layers paper, paradigm 1), and linearised ones with the cyclic τJp
penalty, whose merges are evaluated in the tangent space.
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
MERGES: dict[str, tuple[Callable, Numbers]] = {  # with the coefficients to try
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
ESM = "ESM"  # looks at images
PUBLISHED = tables.published_by_column(__doc__, "merge", "source")
PLAIN, SEARCHED = "Task Arithmetic, linear weights", "K weights searched"
TENTHS = np.linspace(0, 1, 11)
SWEEPS = 3


def published(title: str) -> dict[str, tuple[float, str]]:
    """By merge, the mean accuracy on a model that another paper prints, and which."""
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
    """A coefficient for every task by coordinate ascent, as the module describes it.

    It is `evaluate.search_per_task`, but all candidates of a task are one call, so that
    they share a pass over the images.

    Args:
      values: what is maximised at rows of coefficients, `[n, K] -> [n]`.
      tasks: K.
      start: the coefficient of all tasks at first.
      candidates: the values that every coefficient may take.

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
            chosen = rows[np.argmax(values(rows))]  # of equals where it is
        if np.array_equal(chosen, before):
            break
    return chosen


def weights_searched(
    setup: setups.Setup, parts: Taus, start: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients that `ascent` finds on validation data, and test accuracies, `[T]`.

    Args:
      setup: the model and the tasks.
      parts: a vector of every task.
      start: the coefficient of all tasks at first.
    """

    def means(rows):
        return scores.on_all(setup, parts, "validation", rows).mean(axis=1)

    candidates = scores.coefs_of(setup.options, TENTHS)
    weights = ascent(means, len(parts), start, candidates)
    return weights, scores.on_all(setup, parts, "test", weights[None])[0]


def rows_of(
    setup: setups.Setup, taus: Taus, how: solving.Options, others: Sequence[Other]
) -> list[dict]:
    """The rows of one model.

    Args:
      setup: the model and the tasks.
      taus: the vectors of ordinary fine-tuning.
      how: options of the script.
      others: the methods whose vectors AWD merges too.
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
    """The tables of a model."""
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
        f"{title}: what was searched.": tables.markdown(chosen, digits=6),
    }
