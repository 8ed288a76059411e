r"""Bounds on the loss of an edited model, compared with a fine-tuned model.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015, section 4.

The theorems assume that every fine-tuned model :math:`\theta_i = \theta_0 + \tau_i` is
a stationary point of the loss :math:`\mathcal L_i` of its task, and that

.. math:: \mathcal L_i(\theta) - \mathcal L_i(\theta_i)
          \le \frac{L_i}{2}\|\theta - \theta_i\|^2

in magnitude, on the line from :math:`\theta_i` to every model that is compared with it.
The paper measures L at :math:`\theta_i` (see `smoothness`), which is enough for
quadratic losses. For any other loss, L must be the largest value on that line::

    move = task_vectors.difference(edited, params)
    max(
        smoothness.largest_eigenvalue(
            apply_fn, loss_fn, task_vectors.apply(params, move, c), batches, key=key
        ).smoothness
        for c in np.linspace(0, 1, 5)
    )

`landscape.losses` computes the losses themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge.bases import checked_partition, cluster
from jaxarith.typing import Array, Taus, Tree


class Constants(NamedTuple):
    r"""The constants of task vectors in the bounds of addition and negation.

    Attributes:
      c: :math:`C = \max_i \|\tau_i\|^2` (assumption 4.1).
      epsilon: :math:`\epsilon = \max_{i \ne j} |\cos(\tau_i, \tau_j)|` (assumption
        4.4); 0 for a single vector.
    """

    c: float
    epsilon: float


def constants(taus: Taus) -> Constants:
    """Returns the smallest C and ε that the assumptions allow for task vectors.

    Args:
      taus: T task vectors.

    Raises:
      ValueError: the list is empty.

    Example:
      >>> constants([{"w": np.array([2.0, 0.0])}, {"w": np.array([-1.0, 0.0])}])
      Constants(c=4.0, epsilon=1.0)
    """
    if not taus:
        raise ValueError("there are no task vectors to bound; give at least one.")
    return _constants(tree.gram(taus))


def _constants(gram):
    cosines = np.abs(tree.cosine(gram))
    epsilon = np.max(cosines, where=~np.eye(len(gram), dtype=bool), initial=0)
    return Constants(float(gram.diagonal().max()), float(epsilon))


class Closest(NamedTuple):
    r"""The constants of task vectors in the generalization bound.

    Attributes:
      nearest: i, the vector with the largest inner product with the target.
      c: C, the largest squared norm among the vectors and the target.
      beta: :math:`\beta = \langle\tau_\text{tar}, \tau_i\rangle / C` (assumption 4.5
        requires it to be positive).
    """

    nearest: int
    c: float
    beta: float


def closest(target: Tree, taus: Taus) -> Closest:
    """Finds the task vector to generalize with: the merge in the paper's proof.

    Args:
      target: the task vector of a task that is not among the others.
      taus: T task vectors.

    Raises:
      ValueError: `taus` is empty.

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
    r"""Bounds the increase of task i's loss in a merged model: the addition theorem.

    .. math:: \mathcal L_i\bigl(\theta_0 + \sum_j \alpha_j\tau_j\bigr)
              - \mathcal L_i(\theta_i) \le L_i C (1 + \epsilon), \qquad
              \alpha_j \ge 0,\ \sum_j \alpha_j = 1

    One other vector of the same norm at a cosine of -ε attains the bound, if the loss
    is as steep as L allows. Coefficients that sum to more than 1 are not covered.
    Section 6.2 calls L = 1, C = 4 and ε = 0.2 reasonable; the example has these values.

    Args:
      smoothness: :math:`L_i`, or the largest of all tasks.
      c, epsilon: from `constants`.

    Example:
      >>> print(round(addition(1.0, *Constants(c=4.0, epsilon=0.2)), 4))
      4.8
    """
    return smoothness * c * (1 + epsilon)


def negation(smoothness: float, c: float, epsilon: float) -> float:
    r"""Bounds the increase of task j's loss when task i is negated.

    .. math:: \mathcal L_j(\theta_0 - \alpha_i\tau_i) - \mathcal L_j(\theta_0)
              \le L_j C \bigl(\tfrac32 + \epsilon\bigr), \qquad 0 \le \alpha_i \le 1

    This is the negation theorem. Quadratic losses do not attain the bound: they
    increase by at most :math:`L_j C \sqrt{5 + 4\epsilon} / 2`. If :math:`\theta_j`
    minimises its loss, the proof gives the same bound as `addition`.

    Args:
      smoothness: :math:`L_j`, or the largest of all tasks.
      c, epsilon: from `constants`.

    Example:
      >>> negation(2.0, *Constants(c=4.0, epsilon=0.5))
      16.0
    """
    return smoothness * c * (1.5 + epsilon)


def generalization(smoothness: float, c: float, beta: float) -> float:
    r"""Bounds the increase of a task's loss with another task's vector.

    .. math:: \mathcal L_\text{tar}(\theta_0 + \tau_i)
              - \mathcal L_\text{tar}(\theta_\text{tar}) \le L_\text{tar} C (1 - \beta)

    for the vector i of `closest`. This is the theorem for OOD tasks. Vectors of equal
    norms attain the bound.

    Args:
      smoothness: :math:`L_\text{tar}`.
      c, beta: from `closest`.

    Example:
      >>> generalization(2.0, c=4.0, beta=0.5)
      4.0
    """
    return smoothness * c * (1 - beta)


class OfClusters(NamedTuple):
    r"""Bounds for clusters of task vectors; the clusters' means are the basis vectors.

    Attributes:
      addition: :math:`C(1 + \epsilon)`, with C and ε of the basis vectors.
      generalization: :math:`C(1 - \beta)` for the task that loses most when its nearest
        basis vector serves it; C is from the task vectors.
    """

    addition: float
    generalization: float


def of_clusters(gram: Array, clusters: Sequence[Sequence[int]]) -> OfClusters:
    """Computes the bounds of a partition into clusters, for a smoothness L of 1.

    Neither bound can choose the number of clusters K. The addition bound is smallest
    for K = 1: the mean of all vectors is not longer than the longest mean of a cluster,
    and ε is 0. The generalization bound is smallest for K = T: a task vector's inner
    product with a cluster's mean is not larger than with one of the cluster's members.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      clusters: a partition of `range(T)`.

    Raises:
      ValueError: the clusters are not a partition.

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
    """Finds the fewest clusters that serve every task nearly as well as its own vector.

    It tries `merge.bases.cluster` with K = 1, 2, … and returns the first clusters whose
    generalization bound exceeds the bound of T clusters by at most `tolerance` times C.
    This choice differs from `merge.bases.eigengap`. It needs a tolerance, because the
    bound itself is smallest for T clusters: see `of_clusters`. For two vectors of equal
    norms and cosine c in one cluster, the bound is C (1 - c) / 2.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      tolerance: 0 or more. The paper does not choose clusters this way and gives no
        value.
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
