"""Searches for coefficients on held-out data: shared, per task, negation, external."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxarith import metrics
from jaxarith.typing import Numbers

# The papers' grids of coefficients.
TWENTIETHS = tuple(np.linspace(0, 1, 21))
TENTHS = tuple(np.linspace(0, 1, 11))
POSITIVE_TENTHS = tuple(np.linspace(0.1, 1, 10))


class Search(NamedTuple):
    """The result of a coefficient search.

    Attributes:
      coef: the chosen coefficient.
      coefs: the candidates, `[n]`.
      normalized: their mean normalised accuracies, `[n]`.
    """

    coef: float
    coefs: np.ndarray
    normalized: np.ndarray


def search(
    accuracies_at: Callable[[float], Numbers],
    single: Numbers,
    coefs: Numbers = TWENTIETHS,
) -> Search:
    """Finds the shared coefficient with the best mean normalised accuracy.

    Among equally good coefficients, the first wins: the smallest, if `coefs` ascend
    (protocol of Ortiz-Jimenez et al. 2023).

    Args:
      accuracies_at: returns the accuracy on every task at a coefficient, on validation
        data.
      single: accuracy of every task's own model on the same data.
      coefs: the candidates.

    Raises:
      ValueError: `coefs` is empty, or an accuracy is NaN.
    """
    if not len(coefs):
        raise ValueError("no coefficient to try; give at least one in coefs.")
    normalized = np.array(
        [metrics.normalized_accuracy(accuracies_at(c), single) for c in coefs]
    )
    if np.isnan(normalized).any():
        first = coefs[int(np.isnan(normalized).argmax())]
        raise ValueError(
            f"an accuracy at coefficient {first} is NaN; `accuracies_at` must return "
            "numbers."
        )
    best = int(normalized.argmax())
    return Search(float(coefs[best]), np.asarray(coefs, float), normalized)


class TaskSearch(NamedTuple):
    """The result of a search for one coefficient per task.

    Attributes:
      coefs: the chosen coefficients, `[T]`.
      normalized: the mean normalised accuracies at the best shared coefficient and
        after every sweep, `[1 + sweeps]`; they never decrease.
    """

    coefs: np.ndarray
    normalized: np.ndarray


def search_per_task(
    accuracies_at: Callable[[np.ndarray], Numbers],
    single: Numbers,
    coefs: Numbers = TWENTIETHS,
    *,
    sweeps: int = 10,
) -> TaskSearch:
    """Finds one coefficient per task by coordinate ascent from the best shared one.

    A sweep visits the tasks in order. It moves the coefficient of each task to the best
    candidate if that is an improvement, and keeps the other coefficients fixed. So the
    result is never worse than the result of `search` on the same data, though a grid
    over all tasks may contain a better one.

    It tries n shared coefficients, and T·n more in every sweep. With outputs from
    `forward`, each of them costs a pass over the data of every task; with outputs from
    `tangent`, it costs only the heads.

    Args:
      accuracies_at: returns the accuracy on every task at coefficients `[T]`, on
        validation data.
      single: accuracy of every task's own model on the same data, `[T]`.
      coefs: the n candidates of every coefficient.
      sweeps: the largest number of sweeps; a sweep that changes nothing is the last.

    Raises:
      ValueError: `coefs` is empty, or an accuracy is NaN.

    Example:
      >>> def accuracies_at(coefs):
      ...     return 1 - (coefs - np.array([0.3, 0.8])) ** 2
      >>> print(search_per_task(accuracies_at, [1.0, 1.0]).coefs)
      [0.3 0.8]
    """
    tasks = np.arange(len(single))
    shared = search(lambda c: accuracies_at(np.full(len(tasks), c)), single, coefs)
    chosen = np.full(len(tasks), shared.coef)
    normalized = [shared.normalized.max()]
    for _ in range(sweeps):
        best = normalized[-1]
        for task in tasks:
            found = search(
                lambda c, task=task: accuracies_at(np.where(tasks == task, c, chosen)),
                single,
                coefs,
            )
            if found.normalized.max() > best:
                best, chosen[task] = found.normalized.max(), found.coef
        normalized.append(best)
        if normalized[-1] == normalized[-2]:
            break
    return TaskSearch(chosen, np.array(normalized))


class NegationSearch(NamedTuple):
    """The result of a search for the coefficient of a negated task vector.

    Attributes:
      coef: the chosen coefficient.
      coefs: the candidates, `[n]`.
      controls: the control measure at each candidate, `[n]`.
    """

    coef: float
    coefs: np.ndarray
    controls: np.ndarray


def search_negation(
    control_at: Callable[[float], float],
    allowed: Callable[[float], bool],
    coefs: Numbers = TENTHS,
    *,
    target_at: Callable[[float], float] | None = None,
) -> NegationSearch:
    """Finds the coefficient for negating a vector, limited by a control measure.

    Without `target_at`, it is the largest coefficient that is allowed. Ilharco et al.
    (2023) require classifiers to keep 95 % of the pre-trained accuracy on a control
    task (section 3.1), and allow language models 0.5 more than the pre-trained
    perplexity (section 3.2). "Largest" is meant literally, as in both that paper and
    the τJp paper: a smaller candidate that is not allowed does not matter, because only
    the model with the chosen coefficient is used. The code of the τJp paper stops at
    the first candidate that is not allowed. The two differ only if the measure recovers
    at a larger coefficient. On image tasks, the τJp paper chooses the allowed
    coefficient that forgets most (App. B.2): use `target_at`.

    Args:
      control_at: returns the control measure of the model `θ0 - coef · τ`.
      allowed: returns whether a measure is within the limit. NaN is never allowed.
        Coefficient 0, which does not change the model, is always allowed.
      coefs: the candidates.
      target_at: returns the measure of what the model should forget. If it is given,
        the allowed coefficient with the smallest measure is chosen; in a tie, the
        smallest coefficient. NaN counts as infinite.

    Raises:
      ValueError: `coefs` is empty, or no candidate is allowed.

    Example:
      >>> perplexity_at = {0.0: 25.2, 0.5: 25.4, 1.0: 26.1}.__getitem__
      >>> search_negation(perplexity_at, lambda p: p <= 25.2 + 0.5, [0, 0.5, 1]).coef
      0.5
      >>> accuracy_at = {0.0: 0.6, 0.5: 0.58, 1.0: 0.5}.__getitem__
      >>> search_negation(accuracy_at, lambda a: a >= 0.95 * 0.6, [0, 0.5, 1]).coef
      0.5
    """
    if not len(coefs):
        raise ValueError("no coefficient to try; give at least one in coefs.")
    controls = np.array([control_at(c) for c in coefs], float)
    within = [
        float(c)
        for c, control in zip(coefs, controls, strict=True)
        if c == 0 or (not np.isnan(control) and allowed(control))
    ]
    if not within:
        raise ValueError(
            f"no candidate keeps the control measure within its limit: {controls} at "
            f"{np.asarray(coefs)}. Try smaller coefficients; 0 does not change the "
            "model."
        )
    if target_at is None:
        chosen = max(within)
    else:
        targets = [(np.nan_to_num(target_at(c), nan=np.inf), c) for c in within]
        chosen = min(targets)[1]
    return NegationSearch(chosen, np.asarray(coefs, float), controls)


@dataclasses.dataclass(frozen=True)
class ExternalSearch:
    """The result of a search among external task vectors.

    Attributes:
      index: the chosen vector; None if no vector improves the score.
      coef: its coefficient; 0 without a vector.
      scores: the scores of n vectors at m coefficients, `[n, m]`.
    """

    index: int | None
    coef: float
    scores: np.ndarray


def search_external(
    score_at: Callable[[int, float], float],
    count: int,
    coefs: Numbers = POSITIVE_TENTHS,
    *,
    baseline: float,
) -> ExternalSearch:
    """Finds the task vector, among many, that improves a fine-tuned model most.

    Ilharco et al. (2023, section 4.2) add the vectors of 427 public checkpoints, one at
    a time, to a model of the target task, and choose vector and coefficient by the
    score on held-out data (App. D.7). In a tie, the first vector and coefficient win.
    If no vector improves the score, no vector is chosen.

    Args:
      score_at: `score_at(index, coef)` returns the held-out score of the fine-tuned
        model with that vector added; larger is better.
      count: n, the number of vectors.
      coefs: the m candidates of the coefficient.
      baseline: the held-out score of the fine-tuned model alone.

    Raises:
      ValueError: `count` is below 1, `coefs` is empty, or a score is NaN.

    Example:
      >>> def score_at(index, coef):
      ...     return 0.9 - (coef - 0.5) ** 2 - 0.1 * abs(index - 1)
      >>> found = search_external(score_at, 3, [0.25, 0.5, 0.75], baseline=0.8)
      >>> print(found.index, found.coef, found.scores.shape)
      1 0.5 (3, 3)
    """
    if count < 1 or not len(coefs):
        raise ValueError(
            f"{count} vectors and {len(coefs)} coefficients; at least one of each is "
            "needed."
        )
    scores = np.array([[score_at(i, c) for c in coefs] for i in range(count)], float)
    if np.isnan(scores).any() or np.isnan(baseline):
        raise ValueError("a score or the baseline is NaN; both must be numbers.")
    index, best = map(int, np.unravel_index(scores.argmax(), scores.shape))
    if scores[index, best] <= baseline:
        return ExternalSearch(None, 0.0, scores)
    return ExternalSearch(index, float(coefs[best]), scores)
