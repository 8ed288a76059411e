r"""ACE-Merging: a regression that uses task vectors in place of the layers' inputs.

Xu et al. ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation. CVPR
2026. arXiv:2603.02945. This follows the authors' code.

For every linear layer with weights [output, input], :math:`\tilde\tau_t` is
:math:`\tau_t` minus the mean of every column, and
:math:`\Sigma_t = \tilde\tau_t^\top \tilde\tau_t` replaces the covariance of the layer's
inputs. With :math:`\tilde\Sigma_t = \Sigma_t + \varepsilon 1`,

.. math:: \tau = \Big(\sum_t \tilde\tau_t \tilde\Sigma_t\Big)
          \Big(\sum_t \tilde\Sigma_t + C\Big)^{-1}, \qquad
          C_{ij} = \frac{1}{n} \sum_{k=1}^n \sum_t (\Sigma_t)_{kj}.

The tasks differ in size if :math:`\gamma = \operatorname{Var}_t(\log \|\tau_t\|^2) /
(\operatorname{Mean}_t \log \|\tau_t\|^2)^2` is above a threshold. Then every
:math:`\Sigma_t` and its ε are divided by the trace of :math:`\Sigma_t`, and C by the
mean of :math:`\|\tau_t\|^2`. Also, the top share of the singular directions of
:math:`\tau + \sum_t \tau_t (\Sigma_t - \operatorname{Mean}_k \tilde\Sigma_k)` is added
to τ. All of them have the mean of their singular values. Other leaves are averaged.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus

_FLOOR = 1e-12  # added to squared norms, as in the authors' code


def ace(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    eps: float = 0.01,
    switch: float = 0.3,
    share: float = 0.3,
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> Params:
    """Merges task vectors by ACE-Merging.

    The published accuracies were not checked with this function. The method has some
    properties that users should know:

    - The mean over outputs of every column is dropped, so a layer with one output does
      not move. C shortens the vector. So a single task vector is not returned as it is.
    - `eps` is absolute. If the squared norms of task vectors are far below `eps` times
      the number of inputs, the merge is the average of the centred vectors.
    - γ depends on the unit of the weights. It grows without bound if the mean of the
      logarithms is near zero. So `switch` has no absolute meaning: multiplying all task
      vectors by one number can change the branch.
    - C is not symmetric, so the solution needs a general solver.

    A task whose matrix is zero does not take part in the merge of this matrix. In the
    authors' code it has the largest weight if the tasks differ in size.

    Gradients treat singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path.
      eps: the number ε that is added to the diagonal of every covariance, above 0.
      switch: the threshold of γ, 0 or more. Above it covariances are normalised and
        singular directions are added. With `math.inf` this never happens.
      share: the share of the singular directions that are added, in (0, 1]; at least
        one is added.
      matrices: a regular expression for the whole paths of the 2-D leaves that are
        weights of linear layers; by default those without `embed` in their path. The
        others are averaged. None takes all 2-D leaves.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output]; the others are [output, input]. None decides by the last name
        of a path: `kernel` and `w` (Flax, Haiku) are [input, output]; `weight` and
        `embedding` (PyTorch, Equinox) are [output, input]. It warns about other names.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `eps`, `switch` or `share` out of range, `matrices` matches none of
        the 2-D leaves, several coefficients, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> taus = [{"weight": jnp.array([[2.0, 0.0], [-2.0, 0.0]])}]
      >>> print(ace({"weight": jnp.zeros((2, 2))}, taus, eps=4.0)["weight"])
      [[ 1.5  0. ]
       [-1.5  0. ]]
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; it must be above 0, and finite.")
    if not switch >= 0:
        raise ValueError(f"switch is {switch}; it must not be negative.")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be in (0, 1].")
    _leaves.check(params_0, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "ace")
    return _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        are_matrices,
        are_in_out,
        _leaves.vector_coef(coef, taus),
        eps,
        switch,
        share=share,
    )


@_leaves.leaf_function(static=("is_matrix", "is_in_out", "share"), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, is_in_out, coef, eps, switch, share):
    if not is_matrix:
        return leaf_0 + coef * (sum(taus) / len(taus))
    merge = functools.partial(_merge_matrices, eps=eps, switch=switch, share=share)
    return leaf_0 + coef * _matrices.as_out_in(merge, taus, is_in_out)


def _merge_matrices(taus, eps, switch, share):
    """Returns the merged vector of matrices [output, input]."""
    stacked = jnp.stack(taus)
    squares = jnp.sum(stacked**2, axis=(1, 2))
    count = jnp.maximum(jnp.sum(squares > 0), 1)
    normalised = _gamma(squares, count) > switch

    def add(sums, args):
        tau, square = args
        centred = tau - jnp.mean(tau, axis=0, keepdims=True)
        covariance = _matrices.dot(centred.T, centred)
        trace = jnp.trace(covariance) + _FLOOR
        unit = jnp.where(square > 0, jnp.where(normalised, 1 / trace, 1), 0)
        covariance, ridge = unit * covariance, unit * eps
        target = _matrices.dot(centred, covariance) + ridge * centred
        terms = covariance, ridge, target, _matrices.dot(tau, covariance)
        return jax.tree.map(jnp.add, sums, terms), None

    # Memory holds one covariance at a time, besides the sum.
    zero, inputs = jnp.zeros_like(taus[0]), taus[0].shape[1]
    zeros = jnp.zeros((inputs, inputs), zero.dtype), jnp.zeros((), zero.dtype)
    sums, _ = jax.lax.scan(add, (*zeros, zero, zero), (stacked, squares))
    covariance, ridge, target, moved = sums
    c = jnp.mean(covariance, axis=0, keepdims=True)
    c = jnp.where(normalised, c / (jnp.sum(squares) / count + _FLOOR), c)
    # If all vectors are zero there is no ridge, and the solution is zero.
    diagonal = jnp.where(ridge > 0, ridge, 1) * jnp.eye(inputs, dtype=zero.dtype)
    # The sum with C is regular. It is a multiple of 1, plus the product of (1 + a 11ᵀ)
    # and a matrix that has no negative eigenvalues.
    merged = jnp.linalg.solve((covariance + diagonal + c).T, target.T).T

    def with_directions():
        mean = (covariance + diagonal) / count
        residual = moved - _matrices.dot(tree.total(taus), mean)
        u, s, vt = _matrices.svd(merged + residual)
        kept = max(int(share * len(s)), 1)
        level = jnp.mean(s[:kept])
        return merged + level * _matrices.dot(u[:, :kept], vt[:kept])

    return jax.lax.cond(normalised, with_directions, lambda: merged)


def _gamma(squares, count):
    """Returns γ, the difference in size of the tasks that are not zero."""
    logs = jnp.log(squares + _FLOOR)
    mean = jnp.sum(jnp.where(squares > 0, logs, 0)) / count
    deviations = jnp.where(squares > 0, logs - mean, 0)
    variance = jnp.sum(deviations**2) / jnp.maximum(count - 1, 1)
    return variance / (mean**2 + _FLOOR)
