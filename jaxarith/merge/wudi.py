r"""WUDI-Merging: the vector that interferes least with every task vector.

Cheng, Xiong, Wei, Zhu, Yuan. Whoever Started the Interference Should End It: Guiding
Data-Free Model Merging via Task Vectors. ICML 2025. arXiv:2503.08099.

For every linear layer, with weights [output, input], τ minimises

.. math:: L(\tau) = \sum_t \frac{1}{\|\tau_t\|_F^2}
          \bigl\|(\tau - \tau_t)\,\tau_t^\top\bigr\|_F^2,

by Adam from :math:`\sum_t \tau_t`, stopped early. The gradient of L is
:math:`2(\tau G - \sum_t \tau_t G_t)` with :math:`G = \sum_t G_t`,
:math:`G_t = \tau_t^\top \tau_t / \|\tau_t\|^2`, so a step costs one product with G for
any number of tasks. The minimum itself, to which gradient descent from
:math:`\sum_t \tau_t` tends, is :math:`(\sum_t \tau_t G_t)\,G^+`.

Gradient descent that stops early keeps what the small eigenvalues of
:math:`G = Q \Lambda Q^\top` would overfit. Its limit of small steps has a solution too
(SWUDI: Wei et al. 2026, arXiv:2606.07289): after the time s

.. math:: \tau(s) = \tau_0 + \Big(\sum_t \tau_t G_t - \tau_0 G\Big)\,
          Q \operatorname{diag}\Big(\frac{1 - e^{-s \lambda_k}}{\lambda_k}\Big) Q^\top,
          \qquad \tau_0 = \sum_t \tau_t,

perhaps along the K leading eigenvectors alone. Without the weights
:math:`1 / \|\tau_t\|^2` the minimum is that of ACTMat (Hameed et al. 2026,
arXiv:2604.01329).

The authors' code for vision leaves all but the linear layers of the transformer blocks
at the pre-trained values; fusion_bench averages them.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus

Solver = Literal["adam", "closed"]
Others = Literal["pretrained", "average"]
Weighting = Literal["norm", "none"]
Rank = int | Literal["participation"] | None


def wudi(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    solver: Solver = "adam",
    steps: int = 300,
    learning_rate: float = 1e-5,
    time: float | None = None,
    rank: Rank = None,
    weighting: Weighting = "norm",
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
    others: Others = "pretrained",
) -> Params:
    """Merges task vectors by WUDI-Merging, which does without a coefficient.

    One task vector is the minimum and is given back.

    The minimum comes from the eigenvalues of the n×n Gram matrix over the inputs, the
    squares of singular values of the task vectors set side by side. Directions whose
    singular value is below about √(nε) of the largest, 1% in float32 for n = 1000, are
    lost in its rounding, and "closed" does not move along them.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. The paper
        has none.
      solver: "adam", the authors' `steps` of Adam, or "closed", which is the minimum,
        or the spectral filter where `time` or `rank` is given.
      steps: the number of steps of Adam.
      learning_rate: learning rate of Adam: about how far an entry moves in every step.
      time: for "closed", the time s of the gradient flow, 0 or more, in units in which
        the eigenvalues of a matrix sum to the number of tasks; 0 is the plain sum, and
        None is without end.
      rank: for "closed", the number K of leading eigenvectors, the others of which keep
        the plain sum; "participation" takes, for each matrix, (Σ√λ)² / Σλ, rounded up.
        None is all.
      weighting: "norm" as above, or "none" for ACTMat's, with which long task vectors
        count for more.
      matrices: a regular expression of the paths of the 2-D leaves that are weights of
        linear layers: by default those with no `embed` in their path. None is all 2-D
        leaves.
      in_out: a regular expression of the paths of matrices that are stored as [input,
        output]; the others are taken as [output, input]. None goes by the last name of
        a path: `kernel` and `w` are [input, output], as in Flax and Haiku, `weight` and
        `embedding` [output, input], as in PyTorch and Equinox; of others it warns.
      others: what all other leaves become: "pretrained", as in `params_0`, or
        "average".

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `solver`, `others` or `weighting`, a `time` or a `rank` out
        of range or without "closed", `matrices` matches none of the 2-D leaves, there
        is none and all others stay, no task vector, one that does not
        fit, or non-finite values.

    Example:
      >>> a, b = jnp.array([[2.0, 0], [0, 0]]), jnp.array([[0, 0], [0, 1.0]])
      >>> taus = [{"kernel": a}, {"kernel": b}]
      >>> print(wudi({"kernel": jnp.zeros((2, 2))}, taus)["kernel"])
      [[2. 0.]
       [0. 1.]]
    """
    _leaves.one_of(solver, Solver, "solver")
    _leaves.one_of(others, Others, "others")
    _leaves.one_of(weighting, Weighting, "weighting")
    _check_filter(solver, time, rank)
    _leaves.check(params_0, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    if others == "pretrained" and not any(are_matrices.values()):
        raise ValueError(
            "the task vectors have no 2-D leaf, such as a Flax kernel, and "
            "others='pretrained' leaves all other leaves as they are, so nothing would "
            "be merged; others='average' averages them."
        )
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "wudi")
    adam = (steps, learning_rate) if solver == "adam" else None
    kept = None if time is None and rank is None else (time, rank)
    return _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        are_matrices,
        are_in_out,
        _leaves.vector_coef(coef, taus),
        adam=adam,
        kept=kept,
        weighting=weighting,
        others=others,
    )


def _check_filter(solver, time, rank):
    if solver == "adam" and not time is rank is None:
        raise ValueError('time and rank are for solver="closed".')
    if time is not None and not 0 <= time < math.inf:
        raise ValueError(f"time is {time}; it must be 0 or more, and finite.")
    if rank in (None, "participation"):
        return
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f'rank is {rank!r}; it must be a number from 1, or "participation".'
        )


@_leaves.leaf_function(
    static=("is_matrix", "is_in_out", "adam", "kept", "weighting", "others"),
    whole=True,
)
def _merge_leaf(
    leaf_0, taus, is_matrix, is_in_out, coef, adam, kept, weighting, others
):
    if not is_matrix:
        mean = sum(taus) / len(taus)
        return leaf_0 + coef * mean if others == "average" else leaf_0
    if len(taus) == 1:  # the loss is zero there
        return leaf_0 + coef * taus[0]
    options = {"adam": adam, "kept": kept, "weighting": weighting}
    merge = functools.partial(_merge_matrices, **options)
    return leaf_0 + coef * _matrices.as_out_in(merge, taus, is_in_out)


def _merge_matrices(taus, adam, kept, weighting):
    """The merged vector of matrices [output, input]."""
    start = tree.total(taus)

    def accumulate(sums, tau):
        square = jnp.sum(tau**2)
        zero = square == 0
        gram = _matrices.dot(tau.T, tau)
        if weighting == "norm":
            gram = gram * jnp.where(zero, 0, 1 / (square + zero))
        return (sums[0] + gram, sums[1] + _matrices.dot(tau, gram)), None

    # One Gram matrix at a time besides the sum.
    inputs = start.shape[1]
    zeros = jnp.zeros((inputs, inputs), start.dtype), jnp.zeros_like(start)
    (gram, right), _ = jax.lax.scan(accumulate, zeros, jnp.stack(taus))
    if adam:
        return _adam(gram, right, start, *adam)
    if kept:
        return _filtered(gram, right, start, len(taus), *kept)
    cutoff = len(gram) * float(jnp.finfo(gram.dtype).eps)
    return _matrices.times_inverse(right, gram, cutoff)


def _adam(gram, right, start, steps, learning_rate):
    """PyTorch's Adam; its own gradients are finite where task vectors are zero."""

    def step(i, state):
        x, mean, square = state
        gradient = 2 * (_matrices.dot(x, gram) - right)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        length = tree.safe_sqrt(square / (1 - 0.999 ** (i + 1)))
        move = mean / (1 - 0.9 ** (i + 1)) / (length + 1e-8)
        return x - learning_rate * move, mean, square

    zeros = jnp.zeros_like(start)
    return jax.lax.fori_loop(0, steps, step, (start, zeros, zeros))[0]


def _filtered(gram, right, start, tasks, time, rank):
    """The gradient flow from `start`, along the leading eigenvectors."""
    # The eigenvectors are constants for gradients, as in `_matrices.times_inverse`.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    values = jnp.maximum(values, 0)  # rounding
    total = jnp.sum(values)
    resolved = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    if rank == "participation":
        roots = jnp.sqrt(values)
        rank = jnp.ceil(jnp.sum(roots) ** 2 / jnp.where(total > 0, total, 1))
    if rank is not None:
        resolved &= jnp.arange(len(values))[::-1] < rank  # eigenvalues rise
    divisors = jnp.where(resolved, values, 1)
    share = 1.0
    if time is not None:
        share = -jnp.expm1(-time * tasks * divisors / jnp.where(total > 0, total, 1))
    factors = jnp.where(resolved, share / divisors, 0)
    rest = _matrices.dot(right - _matrices.dot(start, gram), vectors)
    return start + _matrices.dot(rest * factors[None], vectors.T)
