r"""MagMax: takes for every entry the change with the largest magnitude.

Marczak, Twardowski, Trzciński, Cygert. MagMax: Leveraging Model Merging for Seamless
Continual Learning. ECCV 2024. arXiv:2407.06322.

.. math:: \theta_0 + \lambda\,\tau, \qquad
          \tau^p = \tau_k^p \text{ with } k = \arg\max_t |\tau_t^p|
          \text{ for every entry } p.
"""

import functools

import jax.numpy as jnp

from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus


def magmax(params_0: Params, taus: Taus, *, coef: Coef = 0.5) -> Params:
    """Merges by maximum magnitude selection.

    The paper fine-tunes on one task after the other, and each run starts from the
    weights of the run before. It computes every task vector from the pre-trained
    weights.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient λ of the merged vector: one number, or one by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, or several
        coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([1.0, -3.0])}, {"w": jnp.array([-2.0, 2.0])}]
      >>> print(magmax(params_0, taus, coef=1.0)["w"])
      [-2. -3.]
    """
    _leaves.check(params_0, taus)
    return _leaves.fold(_merge_leaf, params_0, taus, _leaves.vector_coef(coef, taus))


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, coef):
    # The entry with the largest magnitude is either the largest or the smallest one. If
    # both have the same magnitude, the paper leaves the choice open. We take the
    # positive one, so the order of the tasks does not matter; the authors' code takes
    # the last one.
    high = functools.reduce(jnp.maximum, taus)
    low = functools.reduce(jnp.minimum, taus)
    return leaf_0 + coef * jnp.where(high >= -low, high, low)
