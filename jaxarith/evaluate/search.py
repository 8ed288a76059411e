"""Coefficient searches on held-out data: shared, per task, negation, external."""

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
    """The shared coefficient with the best mean normalised accuracy.

    The first of equals wins, which is the smallest where `coefs` ascend (protocol of
    Ortiz-Jimenez et al. 2023).

    Args:
      accuracies_at: accuracy on every task at a coefficient, on validation data.
      single: accuracy of every task's own model, on the same data.
      coefs: the candidates.

    Raises:
      ValueError: no candidate, or an accuracy that is NaN.
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
    """The result of a search of one coefficient per task.

    Attributes:
      coefs: the chosen coefficients, `[T]`.
      normalized: the mean normalised accuracies of the best shared coefficient and
        after every sweep, `[1 + sweeps]`; they never fall.
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
    """One coefficient per task by coordinate ascent, from the best shared coefficient.

    A sweep visits the tasks in order and moves the coefficient of each, the others
    fixed, to the best candidate if that is better than where it is. So the result is
    never worse than that of `search` on the same data, though a grid over all tasks may
    hold a better one.

    It tries n shared coefficients and T·n more per sweep. With outputs from `forward`
    each costs a pass over the data of every task, from `tangent` only the heads.

    Args:
      accuracies_at: accuracy on every task at coefficients `[T]`, on validation data.
      single: accuracy of every task's own model, on the same data, `[T]`.
      coefs: the n candidates of every coefficient.
      sweeps: the most sweeps; one that changes nothing is the last.

    Raises:
      ValueError: no candidate, or an accuracy that is NaN.

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
    """The result of a search for how far a task vector can be negated.

    Attributes:
      coef: the chosen coefficient.
      coefs: the candidates, `[n]`.
      controls: the control measure at each, `[n]`.
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
    """How far a vector can be negated before the model forgets what it should not.

    Without `target_at`, the largest coefficient that is allowed.
    Ilharco et al. (2023) allow classifiers 95 % of the pre-trained accuracy on a
    control task (section 3.1), and language models 0.5 more than the pre-trained
    perplexity (section 3.2). "Largest" is meant as printed, there and by Yoshida et al.
    (2025): a smaller candidate that is not allowed does not matter, for the model in
    use is the one of the chosen coefficient. The code of Yoshida et al. stops at the
    first that is not allowed; the two differ only where the measure comes back. On
    image tasks they choose, among those that are allowed, the one that forgets most
    (App. B.2): `target_at`.

    Args:
      control_at: the control measure of the model `θ0 - coef · τ`.
      allowed: whether a measure is within the limit. NaN never is; coefficient 0, which
        leaves the model as it is, always.
      coefs: the candidates.
      target_at: the measure of what is to be forgotten. With it the chosen coefficient
        is the one at which this is the smallest, and of equals the smallest, instead of
        the largest. Of NaN, it is taken to be infinite.

    Raises:
      ValueError: no candidate, or none is allowed.

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
            f"{np.asarray(coefs)}. Try smaller coefficients; 0 is the model as it is."
        )
    if target_at is None:
        chosen = max(within)
    else:
        targets = [(np.nan_to_num(target_at(c), nan=np.inf), c) for c in within]
        chosen = min(targets)[1]
    return NegationSearch(chosen, np.asarray(coefs, float), controls)


@dataclasses.dataclass(frozen=True)
class ExternalSearch:
    """The result of a search among task vectors of others.

    Attributes:
      index: the chosen vector; None where none is better than no vector.
      coef: its coefficient; 0 where there is none.
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
    """Which one of many task vectors improves a fine-tuned model most, and how much.

    Ilharco et al. (2023, section 4.2) add the vectors of 427 public checkpoints, one at
    a time, to a model of the target task, and choose vector and coefficient by the
    score on held-out data (App. D.7). The first of equals wins, and no vector wins over
    one that does not improve.

    Args:
      score_at: `score_at(index, coef)`, the held-out score of the fine-tuned model with
        that vector added; larger is better.
      count: n, the number of vectors.
      coefs: the m candidates of the coefficient.
      baseline: the held-out score of the fine-tuned model alone.

    Raises:
      ValueError: no vector or no candidate, or a score that is NaN.

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
