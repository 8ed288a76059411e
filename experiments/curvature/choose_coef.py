"""Chooses the weight λ of a penalty by the validation accuracy of the sum.

    python -m experiments.curvature.choose_coef --method curvature --data-dir DATA
    python -m experiments.curvature.choose_coef --method tau_jp_cyclic \\
        --coefs 0.001 0.01 0.1 --choose-on stanford_cars --data-dir DATA

For every candidate λ, the script trains a vector of every task and adds them at
coefficient 1, for which the penalty is made. It chooses the λ with the best mean
accuracy of the sum on validation data; the first wins if several are equal. With
--choose-on only the accuracy of that task decides: the τJp paper chose among 0.001,
0.01 and 0.1 on Cars. No test data are used. The report also has the accuracy of the
vectors alone, which falls as λ grows.

Work that does not depend on λ is done once: factors are measured once for all
candidates, and validation images are read once. For linearised models the images also
pass through the pre-trained model only once. During evaluation the devices hold two
vectors per candidate.

The bank stores the vectors of each candidate, as BANK/<model>/<method>_coef_<λ>. Other
scripts with the same λ read them from there. report.json has `chosen`: the option to
set, and its value.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, raw_tasks, scores, setups, vectors
from jaxarith import plots, task_vectors
from jaxarith.typing import Taus

Method = Literal[
    vectors.Curved,
    "tau_jp_cyclic",
    "tau_jp_mixed",
    "tau_jp_strict",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    method: Method = "curvature"
    """The method; λ is the weight of its penalty."""
    coefs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Candidate values of λ."""
    choose_on: str | None = None
    """The task whose accuracy decides; by default the mean over all tasks."""


def chosen_on(config: Config) -> str | None:
    """Returns the name of the task that decides, or None for the mean."""
    return config.choose_on and raw_tasks.name_of(config.choose_on)


def check(config: Config) -> None:
    """Raises a ValueError for wrong candidates, or a task that is not in --tasks."""
    possible = all(0 < coef < float("inf") for coef in config.coefs)  # excludes NaN
    if not possible or len(set(config.coefs)) < len(config.coefs):
        raise ValueError(
            f"--coefs {config.coefs}: expected numbers above 0, each only once. "
            "Without a penalty the method is linear."
        )
    names = [raw_tasks.name_of(spec) for spec in config.tasks]
    if chosen_on(config) not in (None, *names):
        raise ValueError(
            f"--choose-on {config.choose_on} is not among --tasks {', '.join(names)}. "
            "Name one of them."
        )


def candidates(
    setup: setups.Setup, method: vectors.Method, coefs: Sequence[float]
) -> list[list]:
    """Returns the vectors of all tasks for each λ."""
    found = []
    for coef in coefs:
        changed: Any = {vectors.coef_option(method): coef}
        own = setup._replace(options=dataclasses.replace(setup.options, **changed))
        folder = vectors.candidate(method, coef)
        found.append(vectors.of_tasks(own, method, setup.tasks, folder=folder))
    return found


def validation_accuracies(
    setup: setups.Setup,
    found: Sequence[Taus],
    chosen: Sequence[setups.Task],
    *,
    linearized: bool,
) -> np.ndarray:
    """Measures the sums, and the vectors alone, on some of the tasks.

    Args:
      setup: the model.
      found: for each of n candidates, the vectors of all tasks.
      chosen: k of the tasks.
      linearized: whether the vectors belong to the tangent-space model.

    Returns:
      Accuracies `[2, n, k]`: first those of the sums, then those of single vectors.
    """
    sums = [task_vectors.add(taus) for taus in found]
    columns = []
    for task in tqdm(chosen, desc="validation", unit="task"):
        number = setup.names.index(task.name)
        alone = [taus[number] for taus in found]
        rows = np.eye(2 * len(found))
        taus, split = [*sums, *alone], task.validation
        both = scores.accuracies(setup, taus, split, linearized, rows)
        columns.append(both.reshape(2, -1))
    return np.stack(columns, axis=-1)


def rows_of(coefs: Sequence[float], accuracies: np.ndarray) -> list[dict]:
    """Returns a row for each λ, from the result of `validation_accuracies`."""
    return [
        {
            "λ": coef,
            "sum": scores.means(total),
            "normalised": scores.normalized(total, alone),
            "alone": scores.means(alone),
        }
        for coef, total, alone in zip(coefs, *accuracies, strict=True)
    ]


def draw(config: Config, rows: Sequence[dict]) -> None:
    """Draws both accuracies by the logarithm of λ."""
    rows = sorted(rows, key=lambda row: row["λ"])
    places = [float(np.log10(row["λ"])) for row in rows]
    labels = {"sum": "sum at coefficient 1", "alone": "each vector alone"}
    plots.curves(
        config.out / "choose_coef.png",
        {
            label: (places, [row[name] for row in rows])
            for name, label in labels.items()
        },
        x="log10 of the weight λ",
        y="mean validation accuracy, %",
    )


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, coefs=config.coefs[:2])
    check(config)
    runs.start(config)
    setup = setups.load(config, config.model)
    decides = [name] if (name := chosen_on(config)) else setup.names
    chosen = [task for task in setup.tasks if task.name in decides]
    method, coefs = config.method, config.coefs
    found = candidates(setup, method, coefs)
    linearized = vectors.is_linearized(method)
    accuracies = validation_accuracies(setup, found, chosen, linearized=linearized)
    rows = rows_of(coefs, accuracies)
    best = max(rows, key=lambda row: row["sum"])["λ"]  # the first of equal ones
    option = vectors.coef_option(method)
    if runs.is_first():
        draw(config, rows)
    on = ", ".join(task.title for task in chosen)
    return tables.write(
        config.out,
        f"The weight of the penalty of {method}",
        {f"{setup.title}: validation accuracy on {on}, percent.": with_lambda(rows)},
        {
            "rows": rows,
            "chosen": {"method": method, "option": option, "coef": best},
        },
        f"Chosen: --{option.replace('_', '-')} {best:g}{at_the_end(coefs, best)}.",
    )


def at_the_end(coefs: Sequence[float], best: float) -> str:
    """Returns a hint if the best λ may lie outside the candidates, else "".

    Example:
      >>> at_the_end([0.1, 1.0, 10.0], 0.1)
      ', the smallest candidate: try smaller ones'
    """
    if best == min(coefs):
        return ", the smallest candidate: try smaller ones"
    if best == max(coefs):
        return ", the largest candidate: try larger ones"
    return ""


def with_lambda(rows: Sequence[dict]) -> list[dict]:
    """Returns the rows with λ as text, so that it is not rounded."""
    return [row | {"λ": f"{row['λ']:g}"} for row in rows]


if __name__ == "__main__":
    script.run(Config, main)
