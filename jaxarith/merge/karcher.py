r"""Karcher mean: the Riemannian mean of the models on the sphere, tensor by tensor.

Karcher. Riemannian center of mass and mollifier smoothing. Communications on Pure and
Applied Mathematics 30, 1977. Merging by the Karcher mean has no paper; this is
mergekit's `karcher`.

The mean m of the directions :math:`u_i = \theta_i / \|\theta_i\|` of the K models is
found by the iteration

.. math:: m \leftarrow \exp_m\Big(\tfrac{1}{K} \sum_i \log_m u_i\Big), \qquad
          \log_m u = \frac{\Omega}{\sin\Omega}\,(u - \cos\Omega\; m), \quad
          \cos\Omega = \langle m, u \rangle,

which starts at the normalized average. The merged tensor is m times the mean norm.

Every iterate is a linear combination of the u_i. So for each tensor the iteration needs
only the K×K matrix of cosines: one pass over the model, then steps in K variables.
"""

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus


def karcher(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Params:
    """Averages the directions of the models on the sphere, and separately their norms.

    For two models of equal norm the result is that of `slerp` at 0.5. If the directions
    cancel up to rounding, the mean has no direction, and the models are averaged. A
    model that is zero in a leaf has no direction there; only its norm counts.

    Args:
      params_0: pre-trained parameters.
      taus: K task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. 1 returns
        the mean, 0 the pre-trained model.
      max_iter: the largest number of iterations.
      tol: the iteration stops when a step on the unit sphere is at most this long.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: no task vector, one that does not fit, non-finite values, or several
        coefficients.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 4.0])}]
      >>> print(karcher(params_0, taus)["w"].round(3))  # 45 degrees, norm 3
      [2.121 2.121]
    """
    _leaves.check(params_0, taus)
    scale = _leaves.vector_coef(coef, taus)
    return _leaves.fold_all(
        _merge_leaf, params_0, taus, scale, max_iter=max_iter, tol=tol
    )


@_leaves.leaf_function(static=("max_iter", "tol"), whole=True)
def _merge_leaf(leaf_0, taus, coef, max_iter, tol):
    gram = tree.gram([leaf_0 + tau for tau in taus])
    norms = tree.safe_sqrt(jnp.diagonal(gram))
    some = norms > 0
    mean, found = mean_direction(tree.cosine(gram), some, max_iter, tol)
    weights = jnp.mean(norms) * mean / jnp.where(some, norms, 1)
    weights = jnp.where(found, weights, 1 / len(taus))
    # Σ wᵢ θᵢ - θ₀ has the term (Σ wᵢ - 1) θ₀. If nothing moved, the result must be θ₀
    # itself, which the rounded weights would miss.
    moved = jnp.any(jnp.stack([jnp.any(tau != 0) for tau in taus]))
    rest = coef * jnp.where(found & moved, jnp.sum(weights) - 1, 0)
    merged = sum(coef * w * x for w, x in zip(weights, taus, strict=True))
    return leaf_0 + rest * leaf_0 + merged


def mean_direction(
    cosines: jax.Array, some: jax.Array, max_iter: int, tol: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the Karcher mean of unit vectors, as coefficients of these vectors.

    Args:
      cosines: inner products of the vectors, `[K, K]`.
      some: whether each vector is not zero, `bool[K]`.
      max_iter, tol: as for `karcher`.

    Returns:
      Coefficients `[K]`, and whether the mean is defined. It is not defined if the
      average is zero up to rounding.
    """
    average = some / jnp.maximum(jnp.sum(some), 1)

    def dot(a, b):
        return jnp.dot(a, jnp.dot(cosines, b, precision="highest"), precision="highest")

    def length(a):
        return tree.safe_sqrt(dot(a, a))

    # The squared length is a sum that may cancel; its error is that of a cosine.
    found = length(average) > 4 * jnp.sqrt(jnp.finfo(cosines.dtype).eps)
    mean = jnp.where(found, average / jnp.where(found, length(average), 1), average)

    def iterate(_, state):
        mean, going = state
        toward = jnp.clip(jnp.dot(cosines, mean, precision="highest"), -1, 1)
        pull = average * _angle_over_sine(toward)
        step = pull - jnp.sum(pull * toward) * mean
        size = length(step)
        going = going & (size > tol)
        ratio = jnp.where(going, jnp.sin(size) / jnp.where(going, size, 1), 0)
        moved = jnp.cos(size) * mean + ratio * step
        norm = length(moved)  # one up to rounding errors, which would add up
        return jnp.where(going, moved / jnp.where(going, norm, 1), mean), going

    # The number of steps is fixed, and the last ones may do nothing, so that the loop
    # has a derivative.
    mean, _ = jax.lax.fori_loop(0, max_iter, iterate, (mean, found))
    return mean, found


def _angle_over_sine(cosine):
    """Returns Ω / sin Ω from cos Ω.

    Near Ω = 0, where the arc cosine has no derivative, it uses the series.
    """
    rest = 1 - cosine
    near = rest < 1e-3
    series = 1 + rest / 3 + 2 * rest**2 / 15 + 2 * rest**3 / 35
    # A vector opposite to the mean has no direction toward it; its pull cancels there.
    far = ~near & (cosine > -1 + 1e-6)
    inner = jnp.where(far, cosine, 0)
    return jnp.where(near, series, jnp.arccos(inner) / jnp.sqrt(1 - inner**2))
