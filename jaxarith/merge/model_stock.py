r"""Model Stock: interpolates from the pre-trained model to the mean, based on angles.

Jang, Yun, Han. Model Stock: All we need is just a few fine-tuned models. ECCV 2024.
arXiv:2403.19522.

.. math:: \theta = t\,\bar\theta + (1 - t)\,\theta_0, \qquad
          t = \frac{N \cos\varphi}{1 + (N - 1)\cos\varphi},

separately in every layer. φ is the angle between two of the N task vectors. The paper
assumes the same angle for all pairs. If the angles differ, cos φ is the mean over the
pairs, as in mergekit and fusion_bench.
"""

import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus


def model_stock(params_0: Params, taus: Taus, *, coef: Coef = 1.0) -> Params:
    """Approximates the center of all fine-tuned models of one task from a few of them.

    Every leaf counts as a layer. The geometry of the paper does not allow a mean cosine
    below zero. Here it counts as zero, and the leaf stays at its pre-trained value.
    Otherwise the formula would leave the segment from θ₀ to the mean. It has no bound
    as cos φ falls to -1/(N - 1), its value for two numbers of opposite sign.

    Args:
      params_0: pre-trained parameters.
      taus: N ≥ 2 task vectors. A missing leaf counts as zero, and a zero leaf is
        orthogonal to all others.
      coef: the coefficient of the merged vector: one number, or one by path. The paper
        has no such coefficient.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: fewer than two task vectors, one that does not fit, non-finite values,
        or several coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([5.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}]
      >>> print(model_stock(params_0, taus)["w"])  # cos φ = 0.6, t = 0.75
      [3.  1.5]
    """
    _leaves.check(params_0, taus, least=2)
    return _leaves.fold(_merge_leaf, params_0, taus, _leaves.vector_coef(coef, taus))


@_leaves.leaf_function(whole=True)
def _merge_leaf(leaf_0, taus, coef):
    count = len(taus)
    cosines = tree.cosine(tree.gram(taus))
    pairs = [cosines[i, j] for i in range(count) for j in range(i)]
    cosine = jnp.clip(sum(pairs) / len(pairs), 0, 1)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return leaf_0 + coef * (ratio / count) * sum(taus)
