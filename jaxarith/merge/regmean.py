r"""RegMean: linear layers whose outputs are closest to those of the models.

Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of
Language Models. ICLR 2023. arXiv:2212.09849.

With the inputs X_i of a linear layer in model i and their Gram matrix G_i = X_iᵀX_i,

.. math:: W = \Big(\sum_i \tilde G_i\Big)^{-1} \sum_i \tilde G_i W_i, \qquad
          \tilde G_i = \alpha G_i + (1-\alpha)\,\mathrm{diag}(G_i),

minimises :math:`\sum_i \|X_i W - X_i W_i\|^2` for α = 1. All other parameters are
averaged. The merge is the same for task vectors, and is solved here as the mean of
those and a correction, :math:`\bar\tau + (\sum_i \tilde G_i)^{-1} \sum_i \tilde G_i
(\tau_i - \bar\tau)`, which loses the fewest digits.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _grams, _leaves
from jaxarith.typing import Params, Taus


def regmean(
    params_0: Params,
    taus: Taus,
    grams: Sequence[Mapping[str, jax.Array]],
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Params:
    r"""Merges linear layers by regression on their inputs, and averages the rest.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      grams: for every task, the mean of :math:`x x^\top` over the inputs of its model's
        linear layers: `[in, in]` by the path of a kernel `[in, out]`. See
        `capture.input_grams`.
      off_diagonal: the factor α of the off-diagonal entries, in [0, 1]. The paper takes
        0.9 in most settings; fusion_bench 0.95 for CLIP and 0.6 for GPT-2.
      ridge: what is added to the diagonal of the sum of Gram matrices, in units of its
        mean. It pulls towards the mean of the models, which is what inputs that never
        occur get. With α = 1 and few samples, float32 needs 1e-4 or so.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not one set of Gram matrices per task, a matrix that not all tasks
        have or that does not fit, a singular sum, α out of range, no task vector, one
        that does not fit, or non-finite values. Under `jit` a singular sum is not
        detected and its leaf is NaN or infinite.

    Example:
      >>> params_0 = {"kernel": jnp.zeros((2, 1))}
      >>> taus = [{"kernel": jnp.array([[1.0], [3.0]])}, {"kernel": jnp.zeros((2, 1))}]
      >>> grams = [{"kernel": jnp.diag(jnp.array([1.0, 2.0]))}, {"kernel": jnp.eye(2)}]
      >>> print(regmean(params_0, taus, grams)["kernel"].round(3))
      [[0.5]
       [2. ]]
    """
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal is {off_diagonal}; it must be in [0, 1].")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it must not be negative.")
    _leaves.check(params_0, taus)
    rows = _grams.aligned(params_0, taus, grams, is_in_out=lambda path: True)
    merged = _leaves.fold(_merge_leaf, params_0, taus, rows, off_diagonal, ridge)
    try:
        solved = [path for path, of_tasks in rows.items() if of_tasks]
        tree.check_finite(tree.restrict(merged, solved), "solution")
    except ValueError as error:
        raise ValueError(f"singular Gram matrices; raise ridge: {error}") from error
    return merged


@_leaves.leaf_function(whole=True)
def _merge_leaf(leaf_0, taus, grams, off_diagonal, ridge):
    if not grams:
        return leaf_0 + sum(taus) / len(taus)
    # In float64 where that is on: the condition of Gram matrices is often past 1e6.
    dtype = jnp.promote_types(leaf_0.dtype, jnp.result_type(float))
    taus = [tau.astype(dtype) for tau in taus]
    mean = sum(taus) / len(taus)
    shrunk = [_shrink(gram.astype(dtype), off_diagonal) for gram in grams]
    total = tree.total(shrunk)
    target = sum(
        jnp.dot(gram, tau - mean, precision="highest")
        for gram, tau in zip(shrunk, taus, strict=True)
    )
    # The ridge adds nothing on this side: Σ_i (τ_i - mean) = 0.
    scale = jnp.trace(total) / len(total)
    total += jnp.where(scale > 0, ridge * scale, 1) * jnp.eye(len(total), dtype=dtype)
    correction = jax.scipy.linalg.solve(total, target, assume_a="pos")
    return leaf_0 + mean + correction


def _shrink(gram, off_diagonal):
    return gram * jnp.where(jnp.eye(len(gram), dtype=bool), 1, off_diagonal)
