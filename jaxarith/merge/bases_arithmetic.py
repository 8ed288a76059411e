r"""Arithmetic with task vector bases: forgetting, and tasks not seen before.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015.

Table 1 defines three operations with bases :math:`B_1, \ldots, B_m`. Addition is any
merge of the bases. Negation makes the model forget task i. Generalization fits a task i
that is out of distribution. Both use the bases that are similar to i:

.. math:: \theta = \theta_0 - \alpha\tau_{B_j}, \quad j = \arg\max_j
          \cos(\tau_i, \tau_{B_j}), \qquad
          \theta = \mathrm{merge}_\mathrm{out}(\theta_0,
          \{\tau_{B_j} : \cos(\tau_i, \tau_{B_j}) > \beta\}).

A few training steps, or even one, are enough for the task vector τ_i in the cosines.
The paper states no threshold β; its experiments take the most similar basis.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.greedy_soup import checked_score
from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.typing import Coef, Params, Tree


def bases_negation(
    params_0: Params, vectors: Sequence[Tree], tau: Params, *, coef: Coef = 1.0
) -> Params:
    """Subtracts the basis vector that is most similar to a task vector.

    Args:
      params_0: pre-trained parameters.
      vectors: m basis vectors, for example from `basis_vectors`.
      tau: the task vector of the task to forget; a few training steps are enough.
      coef: the coefficient α: one number, or one by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: no basis vector, one that does not fit, non-finite values, or no basis
        with a positive cosine. In the last case `tau` is zero, or orthogonal or opposed
        to every basis, so subtracting a basis would not forget the task. Inside `jit`
        the cosines are not known, and there is no such error: the basis with the
        largest cosine is subtracted, or the first one if all cosines are zero.

    Example:
      >>> vectors = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> tau = {"w": jnp.array([0.1, 0.9])}
      >>> print(bases_negation({"w": jnp.zeros(2)}, vectors, tau, coef=0.5)["w"])
      [ 0. -1.]
    """
    _leaves.check(params_0, vectors)
    _leaves.check(params_0, [tau])
    scale = _leaves.vector_coef(coef, vectors)
    cosines = similarities(vectors, tau)
    if not isinstance(cosines, Tracer) and not np.max(cosines) > 0:
        raise ValueError(
            f"no basis vector is similar to the task vector: the cosines are "
            f"{np.asarray(cosines).tolist()}; expected a positive one. Subtract the "
            "task vector itself."
        )
    nearest = jnp.argmax(cosines)
    return _leaves.fold(_subtract_one, params_0, vectors, nearest, scale)


@_leaves.leaf_function
def _subtract_one(leaf_0, vectors, which, coef):
    # `which` may be traced, so it cannot index the tuple.
    chosen = sum(jnp.where(which == i, leaf, 0) for i, leaf in enumerate(vectors))
    return leaf_0 - coef * chosen


def similarities(vectors: Sequence[Tree], tau: Params) -> jax.Array:
    """Returns the cosines of a task vector with each of m vectors, `[m]`."""
    rows = tree.aligned([tau, *vectors]).values()
    products = tree.total(_products(tree.gathered(row)) for row in rows)
    norms = tree.safe_sqrt(products[: len(vectors) + 1])
    scales = norms[0] * norms[1:]
    inner = products[len(vectors) + 1 :]
    return jnp.where(scales == 0, 0, inner / jnp.where(scales == 0, 1, scales))


@jax.jit
def _products(row):
    """Returns, for one leaf, ⟨x, x⟩ of tau and all vectors, then ⟨tau, x⟩ of these."""
    dtype = tree.wide_dtype(*row)
    tau, *vectors = (jnp.asarray(leaf, dtype) for leaf in row)
    squares = [x * x for x in (tau, *vectors)]
    return tree.sums([*squares, *(tau * x for x in vectors)])


class Generalization(NamedTuple):
    """A model for a task whose task vector is in none of the bases.

    Attributes:
      params: the best of the merged models, or `params_0` if no basis is similar.
      chosen: the indices of the similar bases.
      coef: the coefficient with the best score; 0 if no basis is similar.
      score: the score of `params`.
      vectors: the bases to keep: the given ones, plus `tau` if no basis is similar.
    """

    params: Params
    chosen: list[int]
    coef: float
    score: float
    vectors: list[Tree]


def bases_generalization(
    params_0: Params,
    vectors: Sequence[Tree],
    tau: Params,
    score: Callable[[Tree], float],
    *,
    outer: Callable[..., Tree] = task_arithmetic,
    threshold: float | None = None,
    coefs: Sequence[float] = tuple(np.linspace(0, 1, 21)),
) -> Generalization:
    """Merges the bases that are similar to a new task, with the best coefficient.

    Call it outside `jit`, because it scores one model for every coefficient.

    Args:
      params_0: pre-trained parameters.
      vectors: m basis vectors, for example from `basis_vectors`.
      tau: a task vector of the new task; a few training steps are enough.
      score: `score(params)` returns a number that is larger for a better model, for
        example the accuracy on validation data of the new task.
      outer: a merge with a coefficient, `outer(params_0, vectors, coef=α) -> params`.
      threshold: the cosine above which a basis is similar. None takes the most similar
        basis, even if its cosine is small.
      coefs: the candidates for α; if scores are equal, the first one wins.

    Returns:
      The model, the bases it was merged from, the coefficient, its score, and the
      bases to keep. If no basis is similar, the model is `params_0` and `tau` is added
      to the bases.

    Raises:
      ValueError: no basis vector, one that does not fit, non-finite values, no
        coefficient, or a score that is NaN.

    Example:
      >>> vectors = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> tau = {"w": jnp.array([0.1, 0.9])}
      >>> found = bases_generalization(
      ...     {"w": jnp.zeros(2)}, vectors, tau, lambda p: -abs(p["w"][1] - 1.0)
      ... )
      >>> found.chosen, found.coef
      ([1], 0.5)
    """
    _leaves.check(params_0, vectors)
    _leaves.check(params_0, [tau])
    if not len(coefs):
        raise ValueError("found no coefficient to try; give at least one in coefs.")
    cosines = np.asarray(similarities(vectors, tau))
    if threshold is None:
        chosen = [int(cosines.argmax())]
    else:
        chosen = np.flatnonzero(cosines > threshold).tolist()
    if not chosen:
        kept = [*vectors, tau]
        value = checked_score(score(params_0), "the pre-trained model")
        return Generalization(params_0, [], 0.0, value, kept)

    similar = [vectors[i] for i in chosen]

    def scored(coef):
        params = outer(params_0, similar, coef=coef)
        value = checked_score(score(params), f"the model with coefficient {coef}")
        return Generalization(params, chosen, coef, value, list(vectors))

    first, *others = map(float, coefs)
    best = scored(first)
    for coef in others:
        found = scored(coef)
        if found.score > best.score:
            best = found
    return best
