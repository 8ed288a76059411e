r"""Top-k: the mean of the largest entries of the task vectors.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015, appendix C.5. It is
based on the dataless masks of He et al., Localize-and-Stitch, arXiv:2408.13656.

.. math:: \theta_0 + \lambda \sum_t \frac{\gamma_t}{T} \odot \tau_t,

The mask γ_t is 1 for the entries of τ_t with the largest magnitudes, and else 0.
"""

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.ties import trim, trim_thresholds
from jaxarith.typing import Coef, Params, Taus


def topk(
    params_0: Params, taus: Taus, *, density: float = 0.05, coef: Coef = 1.0
) -> Params:
    """Averages task vectors trimmed to their largest entries.

    It trims as TIES does: each task has one threshold over its whole vector, and
    entries at the threshold are kept. Unlike TIES, it divides an entry by the number of
    tasks T, not by the number of tasks that keep the entry.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero. `density` is a share of all
        entries of the leaves that at least one task vector has.
      density: the share of entries of every task vector that is kept, in (0, 1].
      coef: the coefficient λ: one number, one per task `[T]`, or either by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `density` out of range, no task vector, one that does not fit,
        non-finite values, or a wrong number of coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> params_0 = {"w": jnp.zeros(4)}
      >>> taus = [{"w": jnp.array([4.0, 1.0, 2.0, 0.5])}, {"w": jnp.arange(4.0)}]
      >>> print(topk(params_0, taus, density=0.25)["w"])
      [2.  0.  2.  1.5]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    _leaves.check(params_0, taus)
    coefs = _leaves.task_coefs(coef, taus)
    thresholds = trim_thresholds(tree.aligned(taus), density)
    return _leaves.fold(_merge_leaf, params_0, taus, thresholds, coefs)


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, thresholds, coefs):
    kept = trim(taus, thresholds)
    total = sum(coef * tau for coef, tau in zip(coefs, kept, strict=True))
    return leaf_0 + total / len(taus)
