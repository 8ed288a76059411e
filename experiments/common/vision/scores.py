"""Task addition and negation as the vision papers measure them.

Coefficients are chosen on validation data and results are those on test data, as in
Ortiz-Jimenez et al. (2023) and Yoshida et al. (2025, App. B.2).
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
# Models at once, whose features of one data set must fit into memory together.
_TOGETHER = 32


class Addition(NamedTuple):
    """Accuracies on every task, `[T]`, on test data.

    Attributes:
      zero_shot: accuracy of the pre-trained model.
      single: accuracy of the model of the task's own vector.
      at_one: accuracy of all vectors added, at coefficient 1.
      searched: at the coefficient that was found on validation data.
      search: that search.
    """

    zero_shot: np.ndarray
    single: np.ndarray
    at_one: np.ndarray
    searched: np.ndarray
    search: evaluate.Search

    def row(self, searched: bool) -> dict[str, float | None]:
        """Mean absolute and normalised accuracy in percent."""
        found = self.searched if searched else self.at_one
        return {"abs": means(found), "norm": normalized(found, self.single)}


def normalized(found: Numbers, single: Numbers) -> float | None:
    """Mean normalised accuracy in percent; None where a single accuracy is zero."""
    return 100 * metrics.normalized_accuracy(found, single) if all(single) else None


def coefs_of(config, coefs: np.ndarray) -> np.ndarray:
    """The candidates; of a smoke run a few of them."""
    return coefs[:: len(coefs) // 2] if config.smoke else coefs


def outputs(
    setup: setups.Setup,
    taus: Taus,
    dataset: setups.Dataset,
    linearized: bool,
) -> Callable[[np.ndarray], Sequence[np.ndarray] | np.ndarray]:
    """Features `[N, D]` at each of n sets of coefficients `[n, T]`.

    The tangent-space model passes over the images once in all, the network once per
    call, for all its coefficients.
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
    """Accuracy on a dataset at each of n sets of coefficients `[n, T]`."""
    at, coefs = outputs(setup, taus, dataset, linearized), np.asarray(coefs)
    parts = [coefs[i : i + _TOGETHER] for i in range(0, len(coefs), _TOGETHER)]
    progress = tqdm(parts, unit="part", leave=False, disable=len(parts) == 1)
    return np.array([dataset.accuracy(x) for part in progress for x in at(part)])


def on_all(
    setup: setups.Setup, taus: Taus, split: str, rows, *, linearized: bool = False
) -> np.ndarray:
    """Accuracies on every task at each of n rows of coefficients, `[n, T]`.

    Args:
      setup: the model and the T tasks.
      taus: K vectors, which are added.
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
    """Accuracies of every vector alone on its own task, `[n, T]`.

    Args:
      setup, split, linearized: as for `on_all`.
      taus: a vector of every task.
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
    """Adds task vectors; searches their one coefficient in 0, 0.05, …, 1.

    Args:
      setup: the model and the tasks.
      taus: a vector of every task.
      linearized: whether they belong to the tangent-space model.
      merged: what a merge has made of them, to be added in place of their sum.
    """
    total = task_vectors.add(taus) if merged is None else merged
    coefs = coefs_of(setup.options, COEFS)

    def at(split, rows):  # `rows` are coefficients of the sum and of the task's own
        progress = tqdm(setup.tasks, desc=f"addition, {split}", unit="task")
        found = [
            accuracies(setup, [total, tau], getattr(task, split), linearized, rows)
            for task, tau in zip(progress, taus, strict=True)
        ]
        return np.array(found).T

    *curve, single = at("validation", [*((c, 0) for c in coefs), (0, 1)])
    search = evaluate.search(
        lambda c: curve[int(np.flatnonzero(coefs == c)[0])],
        # A task that its own vector does not learn at all is compared as it is.
        single if all(single) else np.ones(len(single)),
        coefs,
    )
    rows = [(0, 0), (0, 1), (1, 0), (search.coef, 0)]
    zero_shot, alone, at_one, searched = at("test", rows)
    return Addition(zero_shot, alone, at_one, searched, search)


def of_method(setup: setups.Setup, method: vectors.Method) -> Addition:
    """Addition of the vectors of a method."""
    taus = vectors.vectors(setup, method)
    return addition(setup, taus, linearized=vectors.is_linearized(method))


def linearized_rows(
    setup: setups.Setup, names: Mapping[str, vectors.Method]
) -> list[dict]:
    """Addition with methods of the tangent-space model: plain rows of a table.

    Args:
      setup: the model and the tasks.
      names: what the table calls each method.

    Returns:
      For each method a row at coefficient 1 and one at that of the search.
    """
    rows = []
    for name, method in names.items():
        found = of_method(setup, method)
        for coef in ("1.0", "searched"):
            row = {"model": setup.title, "method": name, "coefficient": coef}
            rows.append(row | found.row(coef == "searched"))
    return rows


def single_accuracies(setup: setups.Setup, method: vectors.Method) -> np.ndarray:
    """Test accuracy before and after fine-tuning on one task, in percent: `[2, T]`."""
    taus = vectors.vectors(setup, method)
    linearized = vectors.is_linearized(method)
    return 100 * on_own(setup, taus, "test", (0.0, 1.0), linearized=linearized)


def joint_accuracies(setup: setups.Setup) -> np.ndarray:
    """Test accuracies of the model of multi-task learning, `[T]`."""
    return on_all(setup, vectors.vectors(setup, "multi_task"), "test", [[1.0]])[0]


class Negation(NamedTuple):
    """Mean accuracies in percent on the tasks that are forgotten and on the control.

    Attributes:
      pretrained: `(target, control)` of the pre-trained model.
      at_one: model with a vector subtracted, the mean over the vectors.
      searched: at the coefficients that were found on validation data.
      kept: whether the control accuracy is above its limit, `(at_one, searched)`.
      coefs: the coefficient of every task.
      accuracies: for every task, `[T, 2, 3]`: on target and control; of the pre-trained
        model, at 1 and at the coefficient found.
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

    The coefficient is that with the lowest accuracy on the task among those that keep
    95 % of the control accuracy, both on validation data (τJp paper, B.2).

    Args:
      setup: the model, the tasks and the control.
      taus: a vector of every task.
      linearized: whether they belong to the tangent-space model.
      allowed: the share of the control accuracy that is to be kept.
      coefs: the candidates.
      largest: take the largest coefficient that keeps the control accuracy, as Ilharco
        et al. (2023, B.1), whatever the accuracy on the task.
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
    """Accuracies on the control with every vector alone, in one pass for all.

    Args:
      setup, taus, split, linearized: as for `on_own`.
      coefs: for each vector, n coefficients.

    Returns:
      `[T, n]`.
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
    """Merges by rows of weights, each at the coefficient that is best on validation
    data: mean test accuracies in percent, and the coefficients.

    All rows share one pass over the validation data and one over the test data.

    Args:
      setup, taus, linearized: as for `on_all`.
      rows: `[n, K]`, the weights of the K vectors at coefficient 1.
      coefs: the candidates; of equals the first is taken.
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
    """Draws cosines `[T, T]` of the tasks' vectors, by the title of a panel."""
    labels: dict[str, Any] = {"rows": "task vector", "columns": "task vector"}
    labels |= {"value": "cosine"} | more
    plots.matrices(file, panels, titles, **labels)


def means(values: Numbers) -> float:
    """The mean in percent, as the papers print it."""
    return 100 * float(np.mean(values))
