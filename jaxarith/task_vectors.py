r"""Task vectors, :math:`\tau = \theta - \theta_0`, and their arithmetic.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi. Editing Models
with Task Arithmetic. ICLR 2023. arXiv:2212.04089.

A task vector has the structure of the trained part of the parameters. A leaf that was
not trained is absent and counts as zero.
"""

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import report, tree
from jaxarith.typing import Coef, Params, Taus, Tree


def difference(params: Params, params_0: Params) -> Params:
    """Returns the task vector of fine-tuned parameters, or of a part of them.

    Args:
      params: fine-tuned parameters, with the structure of `params_0` or a part of it.
      params_0: pre-trained parameters.

    Returns:
      `params - params_0` with the structure of `params`, in float32 or better. Leaves
      of integers are left out.

    Raises:
      ValueError: a leaf of `params` is not in `params_0` or has another shape.

    Example:
      >>> print(difference({"w": jnp.array(3.0)}, {"w": jnp.array(1.0), "b": 0.0}))
      {'w': Array(2., dtype=float32)}
    """
    tree.check_part(params, params_0, "fine-tuned model")
    start = tree.flatten(params_0)
    return tree.map_with_path(
        lambda path, leaf: _subtract(leaf, start[path]), tree.floating(params)
    )


def _subtract(a, b):
    dtype = tree.wide_dtype(a, b)
    return jnp.asarray(a, dtype) - jnp.asarray(b, dtype)


def apply(params_0: Params, tau: Params, coef: Coef = 1.0) -> Params:
    r"""Adds a scaled task vector to the parameters: :math:`\theta_0 + \lambda\tau`.

    Args:
      params_0: pre-trained parameters.
      tau: a task vector. Leaves that it lacks stay as they are in `params_0`.
      coef: the coefficient λ: one number, or one number for each path of a leaf.

    Returns:
      The sum, with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a leaf of `tau` is not in `params_0` or has another shape, or the
        coefficient is not one number, or lacks a leaf of `tau`.

    Example:
      >>> print(apply({"w": jnp.array(1.0), "b": 0.0}, {"w": jnp.array(2.0)}, 0.5))
      {'b': 0.0, 'w': Array(2., dtype=float32)}
    """
    tree.check_part(tau, params_0, "task vector")
    moves = tree.flatten(tau)
    coef_of = by_path(coef, moves)

    def leaf(path, value):
        if path not in moves:
            return value
        scale = coef_of(path)
        if shape := np.shape(scale):
            raise ValueError(
                f"coef has shape {list(shape)}; expected one number, because there is "
                "one task vector. Give a float."
            )
        dtype = tree.wide_dtype(value, moves[path])
        moved = jnp.asarray(value, dtype) + scale * jnp.asarray(moves[path], dtype)
        return moved.astype(jnp.result_type(value))

    return tree.map_with_path(leaf, params_0)


def by_path(
    coef: Coef, paths: Collection[str], name: str = "coef"
) -> Callable[[str], Any]:
    """Returns a coefficient of any form as a function of the slash path.

    Args:
      coef: the coefficient.
      paths: slash paths of leaves; a mapping must have all of them.
      name: name of the coefficient in error messages.

    Returns:
      A function from a slash path to the coefficient of its leaf.

    Raises:
      ValueError: a mapping lacks a leaf.

    Example:
      >>> by_path({"w": 0.5}, ["w"])("w"), by_path(0.3, ["w"])("w")
      (0.5, 0.3)
    """
    if not isinstance(coef, Mapping):
        return coef if callable(coef) else lambda _: coef
    if missing := [path for path in paths if path not in coef]:
        unknown = [path for path in coef if path not in paths]
        raise ValueError(
            f"{name} lacks {report.listed(missing)}"
            + f" and has {report.listed(unknown)}, which no task vector has"
            * bool(unknown)
            + ". A mapping must have the slash path of every leaf of the task vectors."
        )
    return coef.__getitem__


def add(taus: Taus) -> Params:
    """Adds task vectors, over the union of their leaves.

    Args:
      taus: task vectors.

    Returns:
      The sum. It has the structure of the first vector that has all leaves. If no
      vector has all of them, it is a nested dict.

    Raises:
      ValueError: the list is empty, or common leaves differ in shape.

    Example:
      >>> tau = jnp.array(1.0), jnp.array(2.0)
      >>> print(*add([tau, tau]))
      2.0 4.0
    """
    if not taus:
        raise ValueError("found no task vector to add; give at least one.")
    rows = tree.aligned(taus)
    sums = {path: sum(row[1:], row[0]) for path, row in rows.items()}
    for tau in taus:
        if len(jax.tree.leaves(tau)) == len(sums):
            return tree.map_with_path(lambda path, _: sums[path], tau)
    return tree.unflatten(sums)


def negate(tau: Params) -> Params:
    """Returns `-tau`, the task vector that makes the model forget the task.

    Example:
      >>> print(negate({"w": np.array(2.0)}))
      {'w': Array(-2., dtype=float32)}
    """
    return jax.tree.map(jnp.negative, tau)


def analogy(a: Tree, b: Tree, c: Tree, coefs: tuple[float, float] = (1.0, 1.0)) -> Tree:
    r"""Returns the task vector of D in the analogy "A is to B as C is to D".

    .. math:: \tau_D = \lambda_1\tau_C + \lambda_2(\tau_B - \tau_A)

    Source: Ilharco et al. 2023, section 5. Appendix E.1 uses it for a domain without
    labels. There C is the labelled task of another domain. A is language modelling of
    that domain, and B is language modelling of this one. Each coefficient is searched
    over its own grid, 0.0, 0.1, …, 1.0.

    Args:
      a, b, c: task vectors.
      coefs: λ1, which scales `c`, and λ2, which scales the difference.

    Returns:
      A task vector, with the structure that `add` returns.

    Raises:
      ValueError: common leaves differ in shape.

    Example:
      >>> a, b, c = ({"w": jnp.array(value)} for value in (1.0, 3.0, 10.0))
      >>> print(analogy(a, b, c)["w"], analogy(a, b, c, (0.5, 2.0))["w"])
      12.0 9.0
    """
    first, second = coefs
    parts = (first, c), (second, b), (-second, a)
    return add([_scale(tau, coef) for coef, tau in parts])


def _scale(tau, coef):
    return jax.tree.map(lambda leaf: jnp.multiply(coef, leaf), tau)


def random_like(key: jax.Array, tau: Params) -> Params:
    """Draws a Gaussian direction with the norm of `tau` in every leaf.

    Ilharco et al. use it as the control. The draw of a leaf depends only on the key and
    the leaf's path.

    Args:
      key: random key.
      tau: a task vector.

    Returns:
      A tree with the structure of `tau`, in float32 or better. Leaves of integers are
      left out.

    Example:
      >>> noise = random_like(jax.random.key(0), {"w": jnp.array([3.0, 4.0])})
      >>> print(norm(noise).round(3))
      5.0
    """

    def leaf(path, value):
        value = jnp.asarray(value, tree.wide_dtype(value))
        noise = jax.random.normal(leaf_key(key, path), value.shape, value.dtype)
        length = jnp.linalg.norm(tree.gathered(value))
        return tree.sharded_like(noise * (length / jnp.linalg.norm(noise)), value)

    return tree.map_with_path(leaf, tree.floating(tau))


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Returns the random key of a leaf.

    Args:
      key: random key of the whole tree.
      path: slash path of the leaf.

    Returns:
      A key that depends on `key` and `path`, but not on the order of the leaves.

    Example:
      >>> key = leaf_key(jax.random.key(0), "mlp/kernel")
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def norm(tau: Params) -> jax.Array:
    """Returns the Euclidean norm over all leaves, a scalar.

    At zero its gradient is zero, not NaN.

    Example:
      >>> print(norm({"w": jnp.array([3.0, 4.0])}))
      5.0
    """
    return tree.safe_sqrt(tree.gram([tau])[0, 0])


def cosine_matrix(taus: Taus) -> jax.Array:
    """Returns the cosines between whole task vectors, `[T, T]`.

    The cosines of a vector that is zero are zero.

    Raises:
      ValueError: common leaves differ in shape.

    Example:
      >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> print(cosine_matrix([a, b]))
      [[1. 0.]
       [0. 1.]]
    """
    return tree.cosine(tree.gram(taus))
