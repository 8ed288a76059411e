"""mergekit's averages of models: linear, and along great circles.

If mergekit merges models without a base, `params_0` is zero here and the task vectors
are the models.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.slerp import PARALLEL
from jaxarith.typing import Coef, Params, Taus


def linear(
    params_0: Params, taus: Taus, *, weight: Coef, normalize: bool = True
) -> Params:
    """Returns the weighted sum of the models `params_0 + tau`, or their weighted mean.

    Args:
      params_0: pre-trained parameters, or zeros.
      taus: T task vectors, or the models. A missing leaf counts as zero.
      weight: one number, one per task `[T]`, or either by path.
      normalize: whether the weights are divided by their sum.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: weights that sum to zero and cannot be normalized, a wrong number of
        weights, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> models = [{"w": jnp.ones(2)}, {"w": jnp.full(2, 4.0)}]
      >>> print(linear({"w": jnp.zeros(2)}, models, weight=[1.0, 2.0])["w"])
      [3. 3.]
    """
    _leaves.check(params_0, taus)
    weights = _leaves.task_coefs(weight, taus, "weight")
    if normalize:
        weights = _normalized(weights)
    return _leaves.fold_all(_sum_models, params_0, taus, weights, normalized=normalize)


@_leaves.leaf_function(static="normalized")
def _sum_models(leaf_0, taus, weights, normalized):
    # In a mean, θ₀ must not change even by the rounding errors of the weights.
    share = 1 if normalized else jnp.sum(weights)
    return share * leaf_0 + sum(w * tau for w, tau in zip(weights, taus, strict=True))


def _normalized(weights):
    """Returns weights `[T]`, or weights by path, divided by their sum."""
    totals = jax.tree.map(jnp.sum, weights)
    for path, total in tree.flatten(totals).items():
        if not isinstance(total, Tracer) and total == 0:
            where = f" of {path}" if path else ""
            raise ValueError(
                f"the weights{where} sum to zero and cannot be normalized; change "
                "them, or set normalize to False."
            )
    return jax.tree.map(jnp.divide, weights, totals)


def slerp(params_0: Params, taus: Taus, *, t: Coef) -> Params:
    """Interpolates two models `params_0 + tau` on the sphere, tensor by tensor.

    It is linear if |cos Ω| > 0.9995. As in mergekit, a tensor that is zero in one model
    counts as orthogonal to that of the other; `merge.slerp` interpolates it linearly.

    Args:
      params_0: pre-trained parameters, or zeros.
      taus: two task vectors or models: mergekit's base model, and the other model.
      t: the position from the first (0) to the second (1): one number, or one by path.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not two task vectors, one that does not fit, non-finite values, or
        several numbers `t`.

    Example:
      >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> print(slerp({"w": jnp.zeros(2)}, models, t=0.5)["w"].round(3))
      [0.707 0.707]
    """
    _check_pair(params_0, taus)
    return _leaves.fold_all(
        _slerp_leaf, params_0, taus, _leaves.vector_coef(t, taus, "t")
    )


@_leaves.leaf_function(whole=True)
def _slerp_leaf(leaf_0, taus, t):
    models = [leaf_0 + tau for tau in taus]
    cosine = _cosine(models, None, 1e-8)
    return _along_arc(models, t, cosine, jnp.abs(cosine) > PARALLEL)


def nuslerp(
    params_0: Params,
    taus: Taus,
    *,
    weight: Coef,
    flatten: bool = True,
    row_wise: bool = False,
) -> Params:
    """Interpolates two task vectors on the sphere; two models if `params_0` is zero.

    The position is the second weight divided by the sum of both, or 0.5 if they cancel.
    The interpolation is linear if the angle is 0° or 180°.

    Args:
      params_0: pre-trained parameters, or zeros.
      taus: two task vectors, or the models. A missing leaf counts as zero.
      weight: one number, one per task `[2]`, or either by path.
      flatten: mergekit's `nuslerp_flatten`: whether a whole tensor is one vector.
        Otherwise the vectors run along one axis.
      row_wise: mergekit's `nuslerp_row_wise`: whether this is the first axis instead of
        the last.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: not two task vectors, one that does not fit, non-finite values, or a
        wrong number of weights.

    Example:
      >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> print(nuslerp({"w": jnp.zeros(2)}, models, weight=0.5)["w"].round(3))
      [1.414 0.707]
    """
    _check_pair(params_0, taus)
    weights = _leaves.task_coefs(weight, taus, "weight")
    axis = None if flatten else 0 if row_wise else -1
    return _leaves.fold_all(_nuslerp_leaf, params_0, taus, weights, axis=axis)


@_leaves.leaf_function(static="axis", whole=True)
def _nuslerp_leaf(leaf_0, taus, weights, axis):
    total = jnp.sum(weights)
    cancel = jnp.abs(total) < 1e-6
    t = jnp.where(cancel, 0.5, weights[1] / jnp.where(cancel, 1, total))
    cosine = _cosine(taus, axis if leaf_0.ndim else None, 1e-7)
    return leaf_0 + _along_arc(taus, t, cosine, 1 - cosine**2 <= 1e-16)


def _check_pair(params_0, taus):
    _leaves.check(params_0, taus)
    if len(taus) != 2:
        raise ValueError(
            f"this method merges exactly two models; found {len(taus)}. For more, use "
            "`karcher` or `multislerp`, which are means on the sphere."
        )


def _cosine(ends, axis, least):
    """Returns the cosine of whole leaves or along an axis; norms are at least `least`.

    `axis` is None for whole leaves.
    """
    a, b = ends
    products = [a * a, b * b, a * b]
    if axis is None:
        sums = tree.sums(products)
    else:
        sums = [jnp.sum(product, axis, keepdims=True) for product in products]
    norms = [jnp.maximum(tree.safe_sqrt(square), least) for square in sums[:2]]
    return (sums[2] / norms[0] / norms[1]).clip(-1, 1)


def _along_arc(ends, t, cosine, linear):
    angle = jnp.arccos(jnp.where(linear, 0, cosine))  # keeps the gradient finite
    first, second = (
        jnp.where(linear, share, jnp.sin(share * angle) / jnp.sin(angle))
        for share in (1 - t, t)
    )
    return first * ends[0] + second * ends[1]


def multislerp(
    params_0: Params,
    taus: Taus,
    *,
    weight: Coef,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Params:
    r"""Returns the weighted mean of directions, times the weighted mean of norms.

    .. math:: \theta_0 + \sum_t w_t \|\tau_t\| \cdot
              \frac{\sum_t w_t u_t}{\|\sum_t w_t u_t\|}, \qquad
              u_t = \frac{\tau_t}{\|\tau_t\| + \epsilon}.

    mergekit also takes a step in the tangent space at the mean. This step is zero up to
    rounding, because the weighted vectors cancel at their mean. If the mean direction
    is zero, the vectors are added with their weights, for any number of models.
    mergekit does so for two models and fails for more, even at tensors that no model
    changed.

    Args:
      params_0: pre-trained parameters, or zeros to interpolate the models.
      taus: T task vectors, or the models. A single one is not changed.
      weight: one number, one per task `[T]`, or either by path.
      normalize: mergekit's `normalize_weights`: whether the weights are divided by
        their sum.
      eps: a number that is added to norms. A mean shorter than this has no direction.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: weights that sum to zero and cannot be normalized, a wrong number of
        weights, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 4.0])}]
      >>> print(multislerp({"w": jnp.zeros(2)}, models, weight=0.5)["w"].round(3))
      [2.121 2.121]
    """
    _leaves.check(params_0, taus)
    weights = _leaves.task_coefs(weight, taus, "weight")
    if normalize:
        weights = _normalized(weights)
    return _leaves.fold_all(_multislerp_leaf, params_0, taus, weights, eps=eps)


@_leaves.leaf_function(static="eps", whole=True)
def _multislerp_leaf(leaf_0, taus, weights, eps):
    if len(taus) == 1:
        return leaf_0 + taus[0]
    norms = tree.safe_sqrt(tree.sums([tau * tau for tau in taus]))
    shares = weights / (norms + eps)
    mean = tree.total(s * tau for s, tau in zip(shares, taus, strict=True))
    length = tree.safe_sqrt(tree.sums([mean * mean])[0])
    found = length >= eps
    scale = jnp.sum(weights * norms) / jnp.where(found, length, 1)
    added = sum(w * tau for w, tau in zip(weights, taus, strict=True))
    return leaf_0 + jnp.where(found, scale * mean, added)


def model_stock(params_0: Params, taus: Taus, *, filter_wise: bool = False) -> Params:
    """Merges by Model Stock, without a bound on the cosines: see `merge.model_stock`.

    Three points differ from that function. With a negative cosine the result moves away
    from the mean; if the formula has no value, the leaf stays at `params_0`. A product
    of two norms below 1e-6 counts as 1e-6, which lowers the cosines of short vectors.
    And each row may have its own ratio.

    Args:
      params_0: pre-trained parameters.
      taus: N ≥ 2 task vectors. A missing leaf counts as zero.
      filter_wise: whether every row along the last axis counts as a layer, instead of
        the whole leaf.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: fewer than two task vectors, one that does not fit, or non-finite
        values.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([5.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}]
      >>> print(model_stock(params_0, taus)["w"])  # cos φ = 0.6, t = 0.75
      [3.  1.5]
    """
    _leaves.check(params_0, taus, least=2)
    return _leaves.fold_all(_stock_leaf, params_0, taus, filter_wise=filter_wise)


@_leaves.leaf_function(static="filter_wise", whole=True)
def _stock_leaf(leaf_0, taus, filter_wise):
    count = len(taus)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    products = [taus[i] * taus[j] for i, j in pairs]
    if filter_wise and leaf_0.ndim:
        products = [jnp.sum(product, -1, keepdims=True) for product in products]
    else:
        products = tree.sums(products)
    inner = dict(zip(pairs, products, strict=True))
    norms = [tree.safe_sqrt(inner[i, i]) for i in range(count)]
    cosines = [
        (inner[i, j] / jnp.maximum(norms[i] * norms[j], 1e-6)).clip(-1, 1)
        for i, j in pairs
        if i != j
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    singular = jnp.abs(divisor) < 1e-6
    ratio = jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, divisor))
    return leaf_0 + ratio / count * sum(taus)
