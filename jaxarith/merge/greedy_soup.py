r"""Greedy soup: the mean of the fine-tuned models that help on held-out data.

Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time. ICML 2022. arXiv:2203.05482.

Recipe 1. Sort the models by held-out score, best first. Starting from
:math:`S = \{\theta_1\}`, for each further model i:

.. math:: \text{if } \mathrm{score}(\mathrm{mean}(S \cup \{\theta_i\})) \ge
          \mathrm{score}(\mathrm{mean}(S)) \text{ then } S \leftarrow S \cup
          \{\theta_i\}.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxarith.merge import _leaves
from jaxarith.merge.average import average
from jaxarith.typing import Params, Taus, Tree


class GreedySoup(NamedTuple):
    """A soup: a mean of fine-tuned models.

    Attributes:
      params: the mean of the models in the soup.
      taken: indices of their task vectors, in the order in which they were added.
      score: the score of `params`.
    """

    params: Params
    taken: tuple[int, ...]
    score: float


def greedy_soup(
    params_0: Params, taus: Taus, score: Callable[[Tree], float]
) -> GreedySoup:
    """Averages fine-tuned models; adds each one only if the soup does not get worse.

    It calls `score` 2T - 1 times and holds two models besides its arguments.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors of one task. A missing leaf counts as zero.
      score: `score(params)` returns a number that is larger for a better model, for
        example the accuracy on held-out data. It is called outside `jit`.

    Returns:
      The parameters of the soup, the indices of the task vectors in it, and its score.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, or a score
        that is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> taus = [{"w": jnp.array(3.0)}, {"w": jnp.array(0.5)}, {"w": jnp.array(2.0)}]
      >>> soup = greedy_soup({"w": jnp.array(0.0)}, taus, lambda p: -abs(p["w"] - 1.5))
      >>> print(soup.params, soup.taken)
      {'w': Array(1.25, dtype=float32)} (2, 1)
    """
    _leaves.check(params_0, taus)
    alone = [
        checked_score(score(average(params_0, [tau])), f"the model of task vector {i}")
        for i, tau in enumerate(taus)
    ]
    # The sort is stable: models with equal scores keep their order.
    first, *rest = sorted(range(len(taus)), key=lambda i: -alone[i])
    soup = GreedySoup(average(params_0, [taus[first]]), (first,), alone[first])
    for i in rest:
        taken = (*soup.taken, i)
        params = average(params_0, [taus[j] for j in taken])
        found = checked_score(score(params), f"the mean of {taken}")
        if found >= soup.score:
            soup = GreedySoup(params, taken, found)
        del params  # frees a rejected model before the next one is made
    return soup


def checked_score(score: Any, of: str) -> float:
    """Returns the result of a `score` function as a float.

    Raises:
      ValueError: the score is NaN.
    """
    value = float(score)
    if math.isnan(value):
        raise ValueError(
            f"the score of {of} is NaN; it must be a number, larger for a better model."
        )
    return value
