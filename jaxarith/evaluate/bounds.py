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

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge.bases import checked_partition, cluster
from jaxarith.typing import Array, Taus, Tree


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
    return _constants(tree.gram(taus))


def _constants(gram):
    cosines = np.abs(tree.cosine(gram))
    epsilon = np.max(cosines, where=~np.eye(len(gram), dtype=bool), initial=0)
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


class OfClusters(NamedTuple):
    r"""What the theorems say of clusters, whose means are the basis vectors.

    Attributes:
      addition: :math:`C(1 + \epsilon)`, with C and ε of the basis vectors.
      generalization: :math:`C(1 - \beta)` of the task that loses most when it is
        served by its nearest basis vector, with C of the task vectors.
    """

    addition: float
    generalization: float


def of_clusters(gram: Array, clusters: Sequence[Sequence[int]]) -> OfClusters:
    """The bounds of a partition into clusters, for a smoothness L of 1.

    Neither chooses the number of clusters K. That of addition is least for K = 1:
    the mean of all is not longer than the longest mean of a cluster, and ε is 0. That
    of generalization is least for K = T: a task vector's inner product with a mean is
    not larger than the largest one with a member.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      clusters: a partition of `range(T)`.

    Raises:
      ValueError: the clusters are no partition.

    Example:
      >>> of_clusters(np.eye(2), [[0, 1]])
      OfClusters(addition=0.5, generalization=0.5)
      >>> of_clusters(np.eye(2), [[0], [1]])
      OfClusters(addition=1.0, generalization=0.0)
    """
    gram = np.asarray(gram, np.float64)
    means = np.zeros((len(gram), len(clusters)))
    for k, members in enumerate(checked_partition(clusters, len(gram))):
        means[members, k] = 1 / len(members)
    served = gram @ means  # inner products of tasks and basis vectors
    found = _constants(means.T @ served)
    return OfClusters(
        addition(1.0, *found), float(gram.diagonal().max() - served.max(axis=1).min())
    )


def fewest_clusters(gram: Array, tolerance: float, *, seed: int = 0) -> list[list[int]]:
    """The fewest clusters that serve every task nearly as well as its own vector does.

    These are clusters of `merge.bases.cluster`, the first for K = 1, 2, … whose bound
    of generalization exceeds that of T clusters by at most `tolerance` times C. It is
    another choice than that of `merge.bases.eigengap`, and needs a tolerance, for the
    bound itself is least for T clusters: see `of_clusters`. With a pair of equal norms
    and cosine c in one cluster, the bound is C (1 - c) / 2.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      tolerance: 0 or more. The paper has no such choice, and states no value.
      seed: seed of the clustering.

    Raises:
      ValueError: the tolerance is negative, or the Gram matrix is not square.
      ImportError: scikit-learn is missing.

    Example:
      >>> gram = np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]])
      >>> fewest_clusters(gram, 0.1), fewest_clusters(gram, 0.01)
      ([[0, 1], [2]], [[0], [1], [2]])
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more.")
    gram = np.asarray(gram, np.float64)
    cosines = tree.cosine(jnp.asarray(gram))
    own = [[i] for i in range(len(gram))]
    limit = of_clusters(gram, own).generalization + tolerance * gram.diagonal().max()
    for count in range(1, len(gram)):
        found = cluster(cosines, count, seed=seed)
        if of_clusters(gram, found).generalization <= limit:
            return found
    return own
