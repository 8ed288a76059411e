r"""RegMean: linear layers whose outputs are closest to the outputs of all models.

Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of
Language Models. ICLR 2023. arXiv:2212.09849.

With the inputs X_i of a linear layer in model i and their Gram matrix G_i = X_iᵀX_i,

.. math:: W = \Big(\sum_i \tilde G_i\Big)^{-1} \sum_i \tilde G_i W_i, \qquad
          \tilde G_i = \alpha G_i + (1-\alpha)\,\mathrm{diag}(G_i),

minimises :math:`\sum_i \|X_i W - X_i W_i\|^2` for α = 1. All other parameters are
averaged. The merge is the same for task vectors. It is solved here as their mean plus a
correction, :math:`\bar\tau + (\sum_i \tilde G_i)^{-1} \sum_i \tilde G_i
(\tau_i - \bar\tau)`, which loses the fewest digits.

For inputs that never occur, the weights become the mean of the models. LOT (Sun et al.
NeurIPS 2025. arXiv:2505.23859) is a regression on the task vectors themselves,

.. math:: \tau = \Big(\sum_i G_i\Big)^{+} \sum_i G_i \tau_i.

For inputs that never occur, it keeps the pre-trained weights; else it is the same. Its
authors also solve for the scales of normalisation layers, from their inputs. Here those
are averaged with all other parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _grams, _leaves, _matrices
from jaxarith.typing import Coef, Params, Taus

On = Literal["models", "taus"]


def regmean(
    params_0: Params,
    taus: Taus,
    grams: Sequence[Mapping[str, jax.Array]],
    *,
    on: On = "models",
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    coef: Coef = 1.0,
) -> Params:
    r"""Merges linear layers by regression on their inputs, and averages the rest.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      grams: for every task, the mean of :math:`x x^\top` over the inputs of the linear
        layers of its model: `[in, in]` by the path of a kernel `[in, out]`. See
        `capture.input_grams`.
      on: target of the regression. "models" is RegMean; "taus" with `off_diagonal=1`
        and `ridge=0` is LOT.
      off_diagonal: the factor α of the off-diagonal entries, in [0, 1]. The paper uses
        0.9 in most settings; fusion_bench uses 0.95 for CLIP and 0.6 for GPT-2.
      ridge: a number that is added to the diagonal of the sum of Gram matrices, in
        units of the mean of this diagonal. It pulls the weights towards the mean of the
        models. With α = 1 and few samples, float32 needs about 1e-4. With on="taus" it
        pulls towards zero, and ridge=0 uses the pseudo-inverse. This treats eigenvalues
        up to 1e-6 of the largest as zero, or up to 1e-12 if the Gram matrices are
        float64.
      coef: the coefficient of the merged vector: one number, or one by path. RegMean
        has no such coefficient; LOT has 1.2 for ViT-B/32 and 1.5 for ViT-L/14.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a wrong number of sets of Gram matrices, a matrix that only some tasks
        have or that does not fit, a singular sum, an unknown `on`, α or `ridge` out of
        range, several coefficients, no task vector, one that does not fit, or
        non-finite values. Under `jit` a singular sum is not detected, and its leaf is
        NaN or infinite.

    Example:
      >>> params_0 = {"kernel": jnp.zeros((2, 1))}
      >>> taus = [{"kernel": jnp.array([[1.0], [3.0]])}, {"kernel": jnp.zeros((2, 1))}]
      >>> grams = [{"kernel": jnp.diag(jnp.array([1.0, 2.0]))}, {"kernel": jnp.eye(2)}]
      >>> print(regmean(params_0, taus, grams)["kernel"].round(3))
      [[0.5]
       [2. ]]
    """
    _leaves.one_of(on, On, "on")
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal is {off_diagonal}; it must be in [0, 1].")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it must not be negative.")
    _leaves.check(params_0, taus)
    rows = _grams.aligned(params_0, taus, grams, is_in_out=lambda path: True)
    merged = _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        rows,
        off_diagonal,
        ridge,
        _leaves.vector_coef(coef, taus),
        on=on,
        inverse=on == "taus" and ridge == 0,
    )
    try:
        solved = [path for path, of_tasks in rows.items() if of_tasks]
        tree.check_finite(tree.restrict(merged, solved), "solution")
    except ValueError as error:
        raise ValueError(f"singular Gram matrices; raise ridge: {error}") from error
    return merged


@_leaves.leaf_function(static=("on", "inverse"), whole=True)
def _merge_leaf(leaf_0, taus, grams, off_diagonal, ridge, coef, on, inverse):
    if not grams:
        return leaf_0 + coef.astype(leaf_0.dtype) * (sum(taus) / len(taus))
    # In float64 if JAX has it on: the condition number of Gram matrices is often above
    # 1e6.
    dtype = jnp.promote_types(leaf_0.dtype, jnp.result_type(float))
    taus = [tau.astype(dtype) for tau in taus]
    start = sum(taus) / len(taus) if on == "models" else jnp.zeros_like(taus[0])
    shrunk = [_shrink(gram.astype(dtype), off_diagonal) for gram in grams]
    total = tree.total(shrunk)
    target = tree.total(
        _matrices.dot(gram, tau - start) for gram, tau in zip(shrunk, taus, strict=True)
    )
    if inverse:
        cutoff = 1e-12 if jnp.result_type(*grams) == jnp.float64 else 1e-6
        return leaf_0 + coef * _matrices.times_inverse(target.T, total, cutoff).T
    # The ridge adds nothing to `target`: Σ_i (τ_i - mean) = 0, or it pulls to zero.
    scale = jnp.trace(total) / len(total)
    total += jnp.where(scale > 0, ridge * scale, 1) * jnp.eye(len(total), dtype=dtype)
    correction = jax.scipy.linalg.solve(total, target, assume_a="pos")
    return leaf_0 + coef * start + coef * correction


def _shrink(gram, off_diagonal):
    return gram * jnp.where(jnp.eye(len(gram), dtype=bool), 1, off_diagonal)
