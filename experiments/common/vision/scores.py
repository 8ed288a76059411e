"""Measures task addition and negation as the vision papers do.

Coefficients are chosen on validation data, and results are measured on test data, as in
Ortiz-Jimenez et al. (2023) and the τJp paper (App. B.2).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common.vision import planned, setups, vectors
from jaxarith import evaluate, metrics, plots, task_vectors
from jaxarith.typing import Numbers, Taus, Tree

COEFS = np.linspace(0, 1, 21)
NEGATION_COEFS = np.linspace(0, 3, 31)
# Number of models at once: their features of one data set must fit into memory.
_TOGETHER = 32


class Addition(NamedTuple):
    """Test accuracies on every task, `[T]`.

    Attributes:
      zero_shot: accuracy of the pre-trained model.
      single: accuracy with only the task's own vector.
      at_one: accuracy with the sum of all vectors, at coefficient 1.
      searched: the same, at the coefficient that the search has chosen.
      search: the search on validation data.
    """

    zero_shot: np.ndarray
    single: np.ndarray
    at_one: np.ndarray
    searched: np.ndarray
    search: evaluate.Search

    def row(self, searched: bool) -> dict[str, float | None]:
        """Returns mean absolute and normalised accuracy in percent."""
        found = self.searched if searched else self.at_one
        return {"abs": means(found), "norm": normalized(found, self.single)}


def normalized(found: Numbers, single: Numbers) -> float | None:
    """Returns mean normalised accuracy in percent; None if a single accuracy is 0."""
    return 100 * metrics.normalized_accuracy(found, single) if all(single) else None


def coefs_of(config, coefs: np.ndarray) -> np.ndarray:
    """Returns the candidate coefficients; in a smoke run only a few of them."""
    return coefs[:: len(coefs) // 2] if config.smoke else coefs


def outputs(
    setup: setups.Setup,
    taus: Taus,
    dataset: setups.Dataset,
    linearized: bool,
) -> Callable[[np.ndarray], Sequence[np.ndarray] | np.ndarray]:
    """Returns a function from n sets of coefficients `[n, T]` to n features `[N, D]`.

    The tangent-space model reads the images only once. The network reads them once per
    call of the function, for all coefficients of the call.
    """
    model = (setup.apply_fn, setup.params_0, taus, dataset.batches)
    if linearized:
        planned.passes(setup, (1 + 2 * len(taus)) * dataset.size)
        at = evaluate.tangent(*model, mesh=setup.mesh)
        return lambda coefs: [at(c) for c in coefs]

    def found(coefs):
        planned.passes(setup, len(coefs) * dataset.size)
        return evaluate.sweep(*model, coefs, mesh=setup.mesh)

    return found


def accuracies(setup, taus, dataset, linearized, coefs) -> np.ndarray:
    """Returns the accuracy on a dataset at each of n sets of coefficients `[n, T]`."""
    at, coefs = outputs(setup, taus, dataset, linearized), np.asarray(coefs)
    parts = [coefs[i : i + _TOGETHER] for i in range(0, len(coefs), _TOGETHER)]
    progress = tqdm(parts, unit="part", leave=False, disable=len(parts) == 1)
    return np.array([dataset.accuracy(x) for part in progress for x in at(part)])


def on_all(
    setup: setups.Setup, taus: Taus, split: str, rows, *, linearized: bool = False
) -> np.ndarray:
    """Returns accuracies on every task at each of n rows of coefficients, `[n, T]`.

    Args:
      setup: the model and the T tasks.
      taus: the K vectors that are added.
      split: "validation" or "test".
      rows: coefficients `[n, K]`.
      linearized: whether the vectors belong to the tangent-space model.
    """
    progress = tqdm(setup.tasks, desc=f"all tasks, {split}", unit="task", leave=False)
    found = [
        accuracies(setup, taus, getattr(task, split), linearized, rows)
        for task in progress
    ]
    return np.array(found).T


def on_own(
    setup: setups.Setup,
    taus: Taus,
    split: str,
    coefs: Numbers = (1.0,),
    *,
    linearized: bool = False,
) -> np.ndarray:
    """Returns accuracies of every vector alone on its own task, `[n, T]`.

    Args:
      setup, split, linearized: as for `on_all`.
      taus: one vector per task.
      coefs: n coefficients.
    """
    rows = [[coef] for coef in coefs]
    progress = tqdm(setup.tasks, desc=f"own tasks, {split}", unit="task", leave=False)
    found = [
        accuracies(setup, [tau], getattr(task, split), linearized, rows)
        for task, tau in zip(progress, taus, strict=True)
    ]
    return np.array(found).T


def addition(
    setup: setups.Setup,
    taus: Taus,
    *,
    linearized: bool,
    merged: Tree | None = None,
) -> Addition:
    """Adds task vectors; searches their common coefficient in 0, 0.05, …, 1.

    Args:
      setup: the model and the tasks.
      taus: one vector per task.
      linearized: whether the vectors belong to the tangent-space model.
      merged: a merged vector that is added instead of their sum.
    """
    total = task_vectors.add(taus) if merged is None else merged
    coefs = coefs_of(setup.options, COEFS)

    def at(split, rows):  # a row has the coefficients of the sum and of the own vector
        progress = tqdm(setup.tasks, desc=f"addition, {split}", unit="task")
        found = [
            accuracies(setup, [total, tau], getattr(task, split), linearized, rows)
            for task, tau in zip(progress, taus, strict=True)
        ]
        return np.array(found).T

    *curve, single = at("validation", [*((c, 0) for c in coefs), (0, 1)])
    search = evaluate.search(
        lambda c: curve[int(np.flatnonzero(coefs == c)[0])],
        # Without normalisation if some single accuracy is 0.
        single if all(single) else np.ones(len(single)),
        coefs,
    )
    rows = [(0, 0), (0, 1), (1, 0), (search.coef, 0)]
    zero_shot, alone, at_one, searched = at("test", rows)
    return Addition(zero_shot, alone, at_one, searched, search)


def of_method(setup: setups.Setup, method: vectors.Method) -> Addition:
    """Adds the vectors of a method, see `addition`."""
    taus = vectors.vectors(setup, method)
    return addition(setup, taus, linearized=vectors.is_linearized(method))


def linearized_rows(
    setup: setups.Setup, names: Mapping[str, vectors.Method]
) -> list[dict]:
    """Adds the vectors of linearised methods, and returns rows of a table.

    Args:
      setup: the model and the tasks.
      names: dict from the names in the table to the methods.

    Returns:
      Two rows per method: at coefficient 1 and at the searched coefficient.
    """
    rows = []
    for name, method in names.items():
        found = of_method(setup, method)
        for coef in ("1.0", "searched"):
            row = {"model": setup.title, "method": name, "coefficient": coef}
            rows.append(row | found.row(coef == "searched"))
    return rows


def single_accuracies(setup: setups.Setup, method: vectors.Method) -> np.ndarray:
    """Returns test accuracy before and after fine-tuning on one task, % `[2, T]`."""
    taus = vectors.vectors(setup, method)
    linearized = vectors.is_linearized(method)
    return 100 * on_own(setup, taus, "test", (0.0, 1.0), linearized=linearized)


def joint_accuracies(setup: setups.Setup) -> np.ndarray:
    """Returns test accuracies of the multi-task model, `[T]`."""
    return on_all(setup, vectors.vectors(setup, "multi_task"), "test", [[1.0]])[0]


class Negation(NamedTuple):
    """Mean accuracies in percent on the subtracted tasks (targets) and on the control.

    Attributes:
      pretrained: `(target, control)` of the pre-trained model.
      at_one: `(target, control)` with one vector subtracted at coefficient 1, the mean
        over the vectors.
      searched: the same, at the coefficients found on validation data.
      kept: whether the control accuracy is above its limit, `(at_one, searched)`.
      coefs: the coefficient found for every task.
      accuracies: accuracies of every task, `[T, 2, 3]`: (target, control), then
        (pre-trained, coefficient 1, coefficient found).
    """

    pretrained: tuple[float, float]
    at_one: tuple[float, float]
    searched: tuple[float, float]
    kept: tuple[bool, bool]
    coefs: list[float]
    accuracies: np.ndarray


def negation(
    setup: setups.Setup,
    taus: Taus,
    *,
    linearized: bool,
    allowed: float = 0.95,
    coefs: np.ndarray = NEGATION_COEFS,
    largest: bool = False,
) -> Negation:
    """Subtracts each vector alone; searches its coefficient.

    The search considers the coefficients that keep 95 % of the control accuracy, and
    takes the one with the lowest accuracy on the task. Both are measured on validation
    data (τJp paper, B.2).

    Args:
      setup: the model, the tasks and the control.
      taus: one vector per task.
      linearized: whether the vectors belong to the tangent-space model.
      allowed: share of the control accuracy that must be kept.
      coefs: the candidate coefficients.
      largest: take the largest coefficient that keeps the control accuracy, and ignore
        the accuracy on the task (editing paper, B.1).
    """
    coefs = coefs_of(setup.options, coefs)

    def on_control(split, coefs_of_tasks):
        minus = [[-coef for coef in own] for own in coefs_of_tasks]
        return on_control_alone(setup, taus, split, minus, linearized=linearized)

    def on_target(split, task, tau, coefs):
        rows = [[-coef] for coef in coefs]
        return accuracies(setup, [tau], getattr(task, split), linearized, rows)

    controls = on_control("validation", [coefs] * len(taus))
    chosen, targets = [], []
    progress = tqdm(setup.tasks, desc="negation", unit="task")
    for task, tau, curve in zip(progress, taus, controls, strict=True):
        control = dict(zip(coefs, curve, strict=True))
        target_at = None
        if not largest:
            target = on_target("validation", task, tau, coefs)
            target_at = dict(zip(coefs, target, strict=True)).__getitem__
        search = evaluate.search_negation(
            control.__getitem__,
            lambda accuracy, limit=allowed * control[0.0]: accuracy >= limit,
            coefs,
            target_at=target_at,
        )
        chosen.append(search.coef)
        targets.append(on_target("test", task, tau, [0.0, 1.0, search.coef]))
    controls = on_control("test", [[0.0, 1.0, coef] for coef in chosen])
    found = np.stack([targets, controls], axis=1)  # [T, target and control, 3]
    means = 100 * np.mean(found, axis=0)  # [target and control, three coefficients]
    pretrained, at_one, searched = [(float(a), float(b)) for a, b in means.T]
    limit = allowed * pretrained[1]
    kept = (at_one[1] >= limit, searched[1] >= limit)
    return Negation(pretrained, at_one, searched, kept, chosen, found)


def on_control_alone(
    setup: setups.Setup,
    taus: Taus,
    split: str,
    coefs: Sequence[Numbers],
    *,
    linearized: bool = False,
) -> np.ndarray:
    """Measures the control with every vector alone, in one pass for all vectors.

    Args:
      setup, taus, split, linearized: as for `on_own`.
      coefs: n coefficients for each vector.

    Returns:
      The accuracies, `[T, n]`.
    """
    units = zip(np.eye(len(taus)), coefs, strict=True)
    rows = [coef * unit for unit, own in units for coef in own]
    dataset = getattr(setup.required_control, split)
    return accuracies(setup, taus, dataset, linearized, rows).reshape(len(taus), -1)


def searched(
    setup: setups.Setup,
    taus: Taus,
    rows: np.ndarray,
    coefs: np.ndarray,
    *,
    linearized: bool = False,
) -> list[tuple[float, float]]:
    """Measures n weighted sums of vectors, each at its best coefficient.

    Validation data choose the coefficients. All rows share one pass over the validation
    data and one over the test data.

    Args:
      setup, taus, linearized: as for `on_all`.
      rows: weights of the K vectors at coefficient 1, `[n, K]`.
      coefs: the candidate coefficients; the first wins if several are equal.

    Returns:
      For each row the mean test accuracy in percent, and the coefficient.
    """

    def means(split, rows):
        found = on_all(setup, taus, split, rows, linearized=linearized)
        return 100 * found.mean(axis=1)

    grid = (coefs[:, None, None] * rows).reshape(-1, len(taus))
    curves = means("validation", grid).reshape(len(coefs), -1)
    best = coefs[curves.argmax(axis=0)]
    found = means("test", best[:, None] * rows)
    return list(zip(found.tolist(), best.tolist(), strict=True))


def draw_cosines(
    file: Path, panels: Mapping[str, np.ndarray], titles: Sequence[str], **more: Any
):
    """Draws cosines `[T, T]` of task vectors, one panel per title."""
    labels: dict[str, Any] = {"rows": "task vector", "columns": "task vector"}
    labels |= {"value": "cosine"} | more
    plots.matrices(file, panels, titles, **labels)


def means(values: Numbers) -> float:
    """Returns the mean in percent."""
    return 100 * float(np.mean(values))
