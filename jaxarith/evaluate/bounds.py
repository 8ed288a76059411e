r"""How far the loss of an edited model can be from that of a fine-tuned one.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015, section 4.

The theorems suppose that every fine-tuned model :math:`\theta_i = \theta_0 + \tau_i` is
a stationary point of the loss :math:`\mathcal L_i` of its task, and that

.. math:: \mathcal L_i(\theta) - \mathcal L_i(\theta_i)
          \le \frac{L_i}{2}\|\theta - \theta_i\|^2

in magnitude, where it matters: on the way from :math:`\theta_i` to the models that are
compared with it. The paper takes L at :math:`\theta_i` (see `smoothness`), which is
enough for quadratic losses. For any other, L must be the largest on that way::

    move = task_vectors.difference(edited, params)
    max(
        smoothness.largest_eigenvalue(
            apply_fn, loss_fn, task_vectors.apply(params, move, c), batches, key=key
        ).smoothness
        for c in np.linspace(0, 1, 5)
    )

The losses themselves are those of `landscape.losses`.
"""

from typing import NamedTuple

import numpy as np

from jaxarith import tree
from jaxarith.typing import Taus, Tree


class Constants(NamedTuple):
    r"""What the bounds of addition and negation need to know of the task vectors.

    Attributes:
      c: :math:`C = \max_i \|\tau_i\|^2` (assumption 4.1).
      epsilon: :math:`\epsilon = \max_{i \ne j} |\cos(\tau_i, \tau_j)|` (assumption
        4.4); 0 of one vector.
    """

    c: float
    epsilon: float


def constants(taus: Taus) -> Constants:
    """C and ε of task vectors, the smallest that the assumptions allow.

    Args:
      taus: T task vectors.

    Raises:
      ValueError: there is none.

    Example:
      >>> constants([{"w": np.array([2.0, 0.0])}, {"w": np.array([-1.0, 0.0])}])
      Constants(c=4.0, epsilon=1.0)
    """
    if not taus:
        raise ValueError("the constants of no task vectors; give at least one.")
    gram = tree.gram(taus)
    cosines = np.abs(tree.cosine(gram))
    epsilon = np.max(cosines, where=~np.eye(len(taus), dtype=bool), initial=0)
    return Constants(float(gram.diagonal().max()), float(epsilon))


class Closest(NamedTuple):
    r"""What the bound of generalization needs to know of the task vectors.

    Attributes:
      nearest: i, the vector with the largest inner product with the target.
      c: C, the largest squared norm, the target among the vectors.
      beta: :math:`\beta = \langle\tau_\text{tar}, \tau_i\rangle / C` (assumption 4.5,
        which wants it positive).
    """

    nearest: int
    c: float
    beta: float


def closest(target: Tree, taus: Taus) -> Closest:
    """The task vector to generalize with: the merging scheme of the paper's proof.

    Args:
      target: the task vector of a task that is not among the others.
      taus: T task vectors.

    Raises:
      ValueError: there is none.

    Example:
      >>> taus = [{"w": np.array([0.0, 2.0])}, {"w": np.array([1.0, 0.0])}]
      >>> closest({"w": np.array([2.0, 0.0])}, taus)
      Closest(nearest=1, c=4.0, beta=0.5)
    """
    if not taus:
        raise ValueError("no task vector to generalize with; give at least one.")
    gram = np.asarray(tree.gram([target, *taus]))
    c = gram.diagonal().max()
    return Closest(int(gram[0, 1:].argmax()), float(c), float(gram[0, 1:].max() / c))


def addition(smoothness: float, c: float, epsilon: float) -> float:
    r"""The most that a merged model loses of task i: the theorem of addition.

    .. math:: \mathcal L_i\bigl(\theta_0 + \sum_j \alpha_j\tau_j\bigr)
              - \mathcal L_i(\theta_i) \le L_i C (1 + \epsilon), \qquad
              \alpha_j \ge 0,\ \sum_j \alpha_j = 1

    It is attained: by one other vector of the same norm at a cosine of -ε, where the
    loss is as steep as L allows. Coefficients that sum to more are not covered.
    Section 6.2 takes L = 1, C = 4 and ε = 0.2 for reasonable, as in the example.

    Args:
      smoothness: :math:`L_i`, or that of every task.
      c, epsilon: from `constants`.

    Example:
      >>> print(round(addition(1.0, *Constants(c=4.0, epsilon=0.2)), 4))
      4.8
    """
    return smoothness * c * (1 + epsilon)


def negation(smoothness: float, c: float, epsilon: float) -> float:
    r"""The most that task j loses when task i is forgotten: the theorem of negation.

    .. math:: \mathcal L_j(\theta_0 - \alpha_i\tau_i) - \mathcal L_j(\theta_0)
              \le L_j C \bigl(\tfrac32 + \epsilon\bigr), \qquad 0 \le \alpha_i \le 1

    It is not attained by quadratic losses, of which :math:`L_j C \sqrt{5 + 4\epsilon} /
    2` is the most. Where :math:`\theta_j` minimises its loss, the proof gives the bound
    of `addition`.

    Args:
      smoothness: :math:`L_j`, or that of every task.
      c, epsilon: from `constants`.

    Example:
      >>> negation(2.0, *Constants(c=4.0, epsilon=0.5))
      16.0
    """
    return smoothness * c * (1.5 + epsilon)


def generalization(smoothness: float, c: float, beta: float) -> float:
    r"""The most that a task loses by the vector of another: the theorem of OOD tasks.

    .. math:: \mathcal L_\text{tar}(\theta_0 + \tau_i)
              - \mathcal L_\text{tar}(\theta_\text{tar}) \le L_\text{tar} C (1 - \beta)

    for the vector i of `closest`. It is attained by vectors of one norm.

    Args:
      smoothness: :math:`L_\text{tar}`.
      c, beta: from `closest`.

    Example:
      >>> generalization(2.0, c=4.0, beta=0.5)
      4.0
    """
    return smoothness * c * (1 - beta)
