r"""Task vector bases: clusters of similar task vectors, each merged into one.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015.

Algorithm 1: with the cosines :math:`M_{ij} = \cos(\tau_i, \tau_j)` and the ascending
eigenvalues λ of the Laplacian :math:`L = D - |M|`,

.. math:: k = \arg\max_{1 < i \le T-1} (\lambda_{i+1} - \lambda_i),

spectral clustering on |M| gives k clusters; a cluster with a cosine below a threshold
is split into its positive and its negative direction; an inner merge of every cluster
is a basis vector.

Clusters need only the Gram matrix of the task vectors, which is one pass over them.
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
    """Fewer vectors for many task vectors.

    Attributes:
      vectors: the m basis vectors, task vectors themselves, in float32 or better.
      clusters: the indices of the task vectors that each was merged from.
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
    """Merges the basis vectors of task vectors: the paper's addition.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
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

    Any merge of the basis vectors is the paper's addition, as `bases` does it.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      inner: a merge, `inner(params_0, taus) -> params`, which leaves other leaves than
        those of its task vectors as they are. It is called on every cluster, also on
        one of a single task.
      clusters: how many clusters there are, or a partition of `range(T)` that is used
        as it is. None takes the number from the eigengap, which needs T ≥ 3.
      negative: the threshold δ₁ in [-1, 0) below which a cosine splits a cluster that
        was found. None splits none: the paper calls it optional, and states no value.
      seed: seed of the clustering.

    Returns:
      The basis vectors, in the order of their first members, the clusters and the
      cosines. A basis vector has the leaves that its members have.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, clusters
        that are no partition, a number or threshold out of range, or a threshold
        beside a partition.
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
            f"negative is {negative}, but a partition is used as it is; pass the "
            "number of clusters, or negative=None."
        )
    else:
        found = checked_partition(clusters, len(taus))
    # A basis vector is a difference of models: it is rounded as they are, so they are
    # in float32 at least.
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
    """Spectral clustering of task vectors by their cosines (lines 3 to 13).

    It is scikit-learn's `SpectralClustering`, as in the authors' code.

    Args:
      cosines: `[T, T]`.
      clusters: how many. None takes the number from the eigengap.
      negative, seed: as for `basis_vectors`.

    Returns:
      The members of every cluster, ascending, in the order of the first members. It is
      more clusters than asked for where clusters are split.

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
        raise ValueError(f"{clusters} clusters of {tasks} task vectors.")
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
    """The number of clusters (line 3), by the largest gap from the second on.

    Args:
      cosines: `[T, T]`.

    Raises:
      ValueError: the cosines are not square, or T < 3, where there is no such gap.
    """
    affinity = np.abs(_host(cosines))
    if len(affinity) < 3:
        raise ValueError(
            f"{len(affinity)} task vectors have no eigengap; at least 3 do. Pass the "
            "number of clusters, or the clusters."
        )
    eigenvalues = np.linalg.eigvalsh(np.diag(affinity.sum(axis=1)) - affinity)
    return 2 + int(np.argmax(np.diff(eigenvalues)[1:]))


def _host(cosines):
    """The cosines as float64 NumPy, and exactly symmetric."""
    if isinstance(cosines, Tracer):
        raise ValueError("clusters cannot be found inside `jit`; pass a partition.")
    cosines = np.asarray(cosines, np.float64)
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
        raise ValueError(f"cosines of shape {list(cosines.shape)}; expected [T, T].")
    return (cosines + cosines.T) / 2


def _spectral(affinity, clusters, seed):
    """The members of every cluster, in the order of the first ones."""
    tasks = len(affinity)
    if clusters == 1:
        return [list(range(tasks))]
    if clusters == tasks:  # as many eigenvectors as that ARPACK does not find
        return [[i] for i in range(tasks)]
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise ImportError(
            "clustering task vectors needs scikit-learn: pip install scikit-learn, "
            'which the extra "jaxarith[demo]" includes. Or pass the clusters.'
        ) from error
    method = SpectralClustering(clusters, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Unrelated clusters are what is looked for, not an accident.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        labels = method.fit_predict(affinity)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(clusters)]
    return sorted(group for group in groups if group)


def checked_partition(clusters: Sequence[Sequence[int]], tasks: int) -> list[list[int]]:
    """The clusters as lists of integers, if every task is in exactly one of them."""
    listed = [[int(i) for i in members] for members in clusters]
    if sorted(i for members in listed for i in members) != list(range(tasks)) or [] in (
        listed
    ):
        raise ValueError(
            f"the clusters {listed} are no partition of the {tasks} tasks 0 to "
            f"{tasks - 1}: each must be in exactly one, and none may be empty."
        )
    return listed
