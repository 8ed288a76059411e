r"""WUDI-Merging: the vector that interferes least with every task vector.

Cheng, Xiong, Wei, Zhu, Yuan. Whoever Started the Interference Should End It: Guiding
Data-Free Model Merging via Task Vectors. ICML 2025. arXiv:2503.08099.

For every linear layer, with weights [output, input], τ minimises

.. math:: L(\tau) = \sum_t \frac{1}{\|\tau_t\|_F^2}
          \bigl\|(\tau - \tau_t)\,\tau_t^\top\bigr\|_F^2

by Adam, which starts at :math:`\sum_t \tau_t` and stops early. The gradient of L is
:math:`2(\tau G - \sum_t \tau_t G_t)` with :math:`G = \sum_t G_t`,
:math:`G_t = \tau_t^\top \tau_t / \|\tau_t\|^2`. So a step costs one product with G for
any number of tasks. Gradient descent from :math:`\sum_t \tau_t` converges to the
minimum :math:`(\sum_t \tau_t G_t)\,G^+`.

The minimum overfits along the small eigenvalues of :math:`G = Q \Lambda Q^\top`.
Gradient descent that stops early changes little along them. In the limit of small
steps it also has a closed form (SWUDI: Wei et al. 2026, arXiv:2606.07289). After the
time s

.. math:: \tau(s) = \tau_0 + \Big(\sum_t \tau_t G_t - \tau_0 G\Big)\,
          Q \operatorname{diag}\Big(\frac{1 - e^{-s \lambda_k}}{\lambda_k}\Big) Q^\top,
          \qquad \tau_0 = \sum_t \tau_t,

Optionally, only the K leading eigenvectors are used. Without the weights
:math:`1 / \|\tau_t\|^2` the minimum is that of ACTMat (Hameed et al. 2026,
arXiv:2604.01329).

The authors' code for vision merges only the linear layers of the transformer blocks,
and keeps the pre-trained values of all other leaves; fusion_bench averages them.
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
    """Merges task vectors by WUDI-Merging, which needs no coefficient.

    A single task vector is the minimum, so it is returned unchanged.

    The minimum comes from the eigenvalues of the n×n Gram matrix over the inputs. They
    are the squared singular values of the task vectors set side by side. Directions
    whose singular value is below about √(nε) of the largest are lost in rounding; that
    is 1% in float32 for n = 1000. "closed" does not move along them.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. The paper
        has no such coefficient.
      solver: "adam" takes `steps` steps of Adam, as the authors do. "closed" takes the
        minimum, or the formula above for τ(s) if `time` or `rank` is given.
      steps: the number of steps of Adam.
      learning_rate: learning rate of Adam; an entry moves about this far in each step.
      time: for "closed", the time s of the gradient flow, 0 or more. In its units, the
        eigenvalues of a matrix sum to the number of tasks. 0 is the plain sum; None is
        infinite time.
      rank: for "closed", the number K of leading eigenvectors. Along the others the
        plain sum stays. "participation" takes, for each matrix, (Σ√λ)² / Σλ, rounded
        up. None takes all.
      weighting: "norm" uses the weights above. "none" is ACTMat, in which long task
        vectors count more.
      matrices: a regular expression for the whole paths of the 2-D leaves that are
        weights of linear layers; by default those without `embed` in their path. None
        takes all 2-D leaves.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output]; the others are [output, input]. None decides by the last name
        of a path: `kernel` and `w` (Flax, Haiku) are [input, output]; `weight` and
        `embedding` (PyTorch, Equinox) are [output, input]. It warns about other names.
      others: value of all other leaves: "pretrained" keeps those of `params_0`,
        "average" takes the mean of the models.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `solver`, `others` or `weighting`, a `time` or a `rank` out
        of range or without "closed", `matrices` matches none of the 2-D leaves, no leaf
        would be merged, no task vector, one that does not fit, or non-finite values.

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
            "the task vectors have no 2-D leaf (a Flax kernel, for example), and "
            "others='pretrained' keeps all other leaves, so nothing would be merged. "
            "Use others='average' to average them."
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
        raise ValueError(
            f'time and rank are for solver="closed"; found solver={solver!r}. Leave '
            "them out, or change the solver."
        )
    if time is not None and not 0 <= time < math.inf:
        raise ValueError(f"time is {time}; it must be 0 or more, and finite.")
    if rank in (None, "participation"):
        return
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f'rank is {rank!r}; it must be a whole number from 1, or "participation".'
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
    if len(taus) == 1:  # the loss is zero at a single task vector
        return leaf_0 + coef * taus[0]
    options = {"adam": adam, "kept": kept, "weighting": weighting}
    merge = functools.partial(_merge_matrices, **options)
    return leaf_0 + coef * _matrices.as_out_in(merge, taus, is_in_out)


def _merge_matrices(taus, adam, kept, weighting):
    """Returns the merged vector of matrices [output, input]."""
    start = tree.total(taus)

    def accumulate(sums, tau):
        square = jnp.sum(tau**2)
        zero = square == 0
        gram = _matrices.dot(tau.T, tau)
        if weighting == "norm":
            gram = gram * jnp.where(zero, 0, 1 / (square + zero))
        return (sums[0] + gram, sums[1] + _matrices.dot(tau, gram)), None

    # Memory holds one Gram matrix at a time, besides the sum.
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
    """Minimises by PyTorch's Adam; derivatives are finite if task vectors are zero."""

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
    """Returns the end of the gradient flow from `start`, along leading eigenvectors."""
    # The eigenvectors are constants for gradients, as in `_matrices.times_inverse`.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    values = jnp.maximum(values, 0)  # rounding can make them negative
    total = jnp.sum(values)
    resolved = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    if rank == "participation":
        roots = jnp.sqrt(values)
        rank = jnp.ceil(jnp.sum(roots) ** 2 / jnp.where(total > 0, total, 1))
    if rank is not None:
        resolved &= jnp.arange(len(values))[::-1] < rank  # eigh sorts them ascending
    divisors = jnp.where(resolved, values, 1)
    share = 1.0
    if time is not None:
        share = -jnp.expm1(-time * tasks * divisors / jnp.where(total > 0, total, 1))
    factors = jnp.where(resolved, share / divisors, 0)
    rest = _matrices.dot(right - _matrices.dot(start, gram), vectors)
    return start + _matrices.dot(rest * factors[None], vectors.T)
