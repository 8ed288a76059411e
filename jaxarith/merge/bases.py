r"""Task vector bases: clusters of similar task vectors, each merged into one.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015.

Algorithm 1: with the cosines :math:`M_{ij} = \cos(\tau_i, \tau_j)` and the ascending
eigenvalues λ of the Laplacian :math:`L = D - |M|`,

.. math:: k = \arg\max_{1 < i \le T-1} (\lambda_{i+1} - \lambda_i),

spectral clustering on |M| finds k clusters. A cluster with a cosine below a threshold
is split into its positive and its negative direction. An inner merge turns every
cluster into a basis vector.

The clusters need only the Gram matrix of the task vectors, and so one pass over them.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxarith import task_vectors, tree
from jaxarith.merge import _leaves
from jaxarith.merge.average import average
from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.typing import Array, Coef, Params, Taus, Tree


class Bases(NamedTuple):
    """A few basis vectors that replace many task vectors.

    Attributes:
      vectors: the m basis vectors. They are task vectors too, in float32 or better.
      clusters: for each basis vector, the indices of the task vectors merged into it.
      cosines: cosines of the task vectors, `[T, T]`.
    """

    vectors: list[Tree]
    clusters: list[list[int]]
    cosines: jax.Array


def bases(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    inner: Callable[[Tree, Sequence[Tree]], Tree] = average,
    outer: Callable[..., Tree] = task_arithmetic,
    clusters: int | Sequence[Sequence[int]] | None = None,
    negative: float | None = None,
    seed: int = 0,
) -> Params:
    """Merges the basis vectors of task vectors, which the paper calls addition.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the outer merge.
      inner, clusters, negative, seed: as for `basis_vectors`.
      outer: a merge of the basis vectors, `outer(params_0, vectors, coef=coef)`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: as for `basis_vectors` and `outer`.
      ImportError: scikit-learn is missing.

    Example:
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> taus = [{"w": jnp.array(w)} for w in ([4.0, 0, 0], [2.0, 0, 1], [0.0, 2, 0])]
      >>> print(bases(params_0, taus, coef=0.5)["w"])
      [1.5  1.   0.25]
    """
    found = basis_vectors(
        params_0, taus, inner=inner, clusters=clusters, negative=negative, seed=seed
    )
    return outer(params_0, found.vectors, coef=coef)


def basis_vectors(
    params_0: Params,
    taus: Taus,
    *,
    inner: Callable[[Tree, Sequence[Tree]], Tree] = average,
    clusters: int | Sequence[Sequence[int]] | None = None,
    negative: float | None = None,
    seed: int = 0,
) -> Bases:
    """Clusters task vectors and merges every cluster into a basis vector.

    Any merge of the basis vectors is the paper's addition; `bases` does both steps.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      inner: a merge, `inner(params_0, taus) -> params`. It must not change leaves that
        its task vectors do not have. It is called for every cluster, even for one with
        a single task.
      clusters: the number of clusters, or a partition of `range(T)`, which is used as
        it is. None takes the number from the eigengap, which needs T ≥ 3.
      negative: the threshold δ₁ in [-1, 0). A cluster that was found is split if it has
        a cosine below this threshold. None splits no cluster: the paper calls the
        split optional and states no value.
      seed: seed of the clustering.

    Returns:
      The basis vectors, in the order of their first members, the clusters and the
      cosines. A basis vector has the leaves that its members have.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, clusters
        that are not a partition, a number or threshold out of range, or both a
        partition and a threshold.
      ImportError: scikit-learn is missing.

    Example:
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> taus = [{"w": jnp.array(w)} for w in ([4.0, 0, 0], [2.0, 0, 1], [0.0, 2, 0])]
      >>> found = basis_vectors(params_0, taus)
      >>> print(found.clusters, found.vectors[0]["w"])
      [[0, 1], [2]] [3.  0.  0.5]
    """
    _leaves.check(params_0, taus)
    _check_negative(negative)
    cosines = tree.cosine(tree.gram(taus))
    if clusters is None or isinstance(clusters, int | np.integer):
        count = None if clusters is None else int(clusters)
        found = cluster(cosines, count, negative=negative, seed=seed)
    elif negative is not None:
        raise ValueError(
            f"negative is {negative}, but a given partition is not split. Pass the "
            "number of clusters, or negative=None."
        )
    else:
        found = checked_partition(clusters, len(taus))
    # A basis vector is a difference of models and has their rounding errors. So the
    # models must be float32 at least.
    wide = tree.map_with_path(_widened, params_0)
    vectors = []
    for members in found:
        chosen = [taus[i] for i in members]
        merged = tree.restrict(inner(wide, chosen), tree.aligned(chosen))
        vectors.append(task_vectors.difference(merged, wide))
    return Bases(vectors, found, cosines)


def _widened(_, leaf):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return leaf
    return jnp.asarray(leaf, tree.wide_dtype(leaf))


def cluster(
    cosines: Array,
    clusters: int | None = None,
    *,
    negative: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Clusters task vectors by their cosines (Algorithm 1, lines 3 to 13).

    It uses scikit-learn's `SpectralClustering`, as the authors' code does.

    Args:
      cosines: cosines of the task vectors, `[T, T]`.
      clusters: the number of clusters. None takes it from the eigengap.
      negative, seed: as for `basis_vectors`.

    Returns:
      The members of every cluster, ascending, in the order of the first members. If
      clusters are split, there are more than `clusters`.

    Raises:
      ValueError: the cosines are not square, or a number or threshold is out of range.
      ImportError: scikit-learn is missing.

    Example:
      >>> cluster(jnp.array([[1.0, -0.9, 0], [-0.9, 1, 0], [0, 0, 1]]), negative=-0.5)
      [[0], [1], [2]]
    """
    signed = _host(cosines)
    tasks = len(signed)
    _check_negative(negative)
    if clusters is None:
        clusters = eigengap(signed)
    if not 1 <= clusters <= tasks:
        raise ValueError(
            f"clusters is {clusters} for {tasks} task vectors; expected 1 to {tasks}."
        )
    found = []
    for members in _spectral(np.abs(signed), clusters, seed):
        within = signed[np.ix_(members, members)]
        if negative is None or within.min() >= negative:
            found.append(members)
        else:
            halves = _spectral(within - within.min(), 2, seed)
            found += [[members[i] for i in half] for half in halves]
    return sorted(found)


def _check_negative(negative):
    if negative is not None and not -1 <= negative < 0:
        raise ValueError(f"negative is {negative}; it must be in [-1, 0), or None.")


def eigengap(cosines: Array) -> int:
    """Returns the number of clusters: the place of the largest gap of eigenvalues.

    This is line 3 of Algorithm 1; the first gap does not count.

    Args:
      cosines: cosines of the task vectors, `[T, T]`.

    Raises:
      ValueError: the cosines are not square, or T < 3, which leaves no gap.
    """
    affinity = np.abs(_host(cosines))
    if len(affinity) < 3:
        raise ValueError(
            f"found {len(affinity)} task vectors; the eigengap needs at least 3. Pass "
            "the number of clusters, or the clusters."
        )
    eigenvalues = np.linalg.eigvalsh(np.diag(affinity.sum(axis=1)) - affinity)
    return 2 + int(np.argmax(np.diff(eigenvalues)[1:]))


def _host(cosines):
    """Returns the cosines in NumPy, as float64 and exactly symmetric."""
    if isinstance(cosines, Tracer):
        raise ValueError(
            "clusters cannot be computed inside `jit`; pass a partition as `clusters`."
        )
    cosines = np.asarray(cosines, np.float64)
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
        raise ValueError(
            f"the cosines have shape {list(cosines.shape)}; expected [T, T]."
        )
    return (cosines + cosines.T) / 2


def _spectral(affinity, clusters, seed):
    """Returns the members of every cluster, in the order of the first members."""
    tasks = len(affinity)
    if clusters == 1:
        return [list(range(tasks))]
    if clusters == tasks:  # ARPACK cannot find as many eigenvectors
        return [[i] for i in range(tasks)]
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise ImportError(
            "clustering task vectors needs scikit-learn: pip install scikit-learn, or "
            'install the extra "jaxarith[demo]". Or pass the clusters.'
        ) from error
    method = SpectralClustering(clusters, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # A graph that is not connected is fine: it has separate clusters.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        labels = method.fit_predict(affinity)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(clusters)]
    return sorted(group for group in groups if group)


def checked_partition(clusters: Sequence[Sequence[int]], tasks: int) -> list[list[int]]:
    """Returns the clusters as lists of integers.

    Raises:
      ValueError: a task is not in exactly one cluster, or a cluster is empty.
    """
    listed = [[int(i) for i in members] for members in clusters]
    if sorted(i for members in listed for i in members) != list(range(tasks)) or [] in (
        listed
    ):
        raise ValueError(
            f"the clusters {listed} are no partition of the {tasks} tasks 0 to "
            f"{tasks - 1}. Put each task in exactly one cluster, and leave none empty."
        )
    return listed
