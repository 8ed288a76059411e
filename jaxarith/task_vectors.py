r"""Task vectors, :math:`\tau = \theta - \theta_0`, and their arithmetic.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi. Editing Models
with Task Arithmetic. ICLR 2023. arXiv:2212.04089.

A task vector has the structure of the trained part of the parameters. A leaf that was
not trained is absent, which means zero.
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
    """The task vector of fine-tuned `params`, or of the part of them that is given.

    Args:
      params: fine-tuned parameters: the structure of `params_0`, or a part of it.
      params_0: the pre-trained parameters.

    Returns:
      `params - params_0` with the structure of `params`, at least in float32. Leaves
      of integers are left out.

    Raises:
      ValueError: a leaf of `params` is not in `params_0` or has another shape.

    Example:
      >>> print(difference({"w": jnp.array(3.0)}, {"w": jnp.array(1.0), "b": 0.0}))
      {'w': Array(2., dtype=float32)}
    """
    tree.check_part(params, params_0, "fine-tuned parameters")
    start = tree.flatten(params_0)
    return tree.map_with_path(
        lambda path, leaf: _subtract(leaf, start[path]), tree.floating(params)
    )


def _subtract(a, b):
    dtype = tree.wide_dtype(a, b)
    return jnp.asarray(a, dtype) - jnp.asarray(b, dtype)


def apply(params_0: Params, tau: Params, coef: Coef = 1.0) -> Params:
    r""":math:`\theta_0 + \lambda\tau`; leaves that `tau` lacks stay as they are.

    Args:
      params_0: pre-trained parameters.
      tau: a task vector.
      coef: the coefficient λ: a number, or one by path of the leaf.

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
                f"coef has shape {list(shape)}; one task vector is scaled by one "
                "number."
            )
        dtype = tree.wide_dtype(value, moves[path])
        moved = jnp.asarray(value, dtype) + scale * jnp.asarray(moves[path], dtype)
        return moved.astype(jnp.result_type(value))

    return tree.map_with_path(leaf, params_0)


def by_path(
    coef: Coef, paths: Collection[str], name: str = "coef"
) -> Callable[[str], Any]:
    """Any form of a coefficient as a function of the slash path.

    Args:
      coef: the coefficient.
      paths: slash paths of the leaves that it must have, if it is a mapping.
      name: what an error calls it.

    Raises:
      ValueError: a mapping lacks a leaf.
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
    """The sum of task vectors, over the union of their leaves.

    Args:
      taus: task vectors.

    Returns:
      The sum, in the structure of the first vector that has all leaves; a nested dict
      where none has.

    Raises:
      ValueError: the list is empty, or common leaves differ in shape.

    Example:
      >>> tau = jnp.array(1.0), jnp.array(2.0)
      >>> print(*add([tau, tau]))
      2.0 4.0
    """
    if not taus:
        raise ValueError("the sum of no task vectors has no leaves; give at least one.")
    rows = tree.aligned(taus)
    sums = {path: sum(row[1:], row[0]) for path, row in rows.items()}
    for tau in taus:
        if len(jax.tree.leaves(tau)) == len(sums):
            return tree.map_with_path(lambda path, _: sums[path], tau)
    return tree.unflatten(sums)


def negate(tau: Params) -> Params:
    """The task vector that makes the model forget the task."""
    return jax.tree.map(jnp.negative, tau)


def analogy(a: Tree, b: Tree, c: Tree, coefs: tuple[float, float] = (1.0, 1.0)) -> Tree:
    r"""A is to B as C is to D.

    .. math:: \tau_D = \lambda_1\tau_C + \lambda_2(\tau_B - \tau_A)

    Ilharco et al. 2023, section 5. For a domain without labels (App. E.1), C is the
    labelled task of another domain, A and B are language modelling of that domain and
    of this one, and each coefficient has a grid of its own, 0.0, 0.1, …, 1.0.

    Args:
      a, b, c: task vectors.
      coefs: λ1 of `c` and λ2 of the difference.

    Returns:
      A task vector in the structure that `add` gives.

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
    """A Gaussian direction with the norm of `tau` in every leaf: the paper's control.

    It is in float32 or better. The draw of a leaf depends only on the key and the
    leaf's path.
    """

    def leaf(path, value):
        value = jnp.asarray(value, tree.wide_dtype(value))
        noise = jax.random.normal(leaf_key(key, path), value.shape, value.dtype)
        length = jnp.linalg.norm(tree.gathered(value))
        return tree.sharded_like(noise * (length / jnp.linalg.norm(noise)), value)

    return tree.map_with_path(leaf, tree.floating(tau))


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The random key of a leaf: a function of its path alone, not of any order."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def norm(tau: Params) -> jax.Array:
    """The Euclidean norm over all leaves; its gradient is zero, not NaN, at zero."""
    return tree.safe_sqrt(tree.gram([tau])[0, 0])


def cosine_matrix(taus: Taus) -> jax.Array:
    """Cosines of whole task vectors, `[T, T]`; zero for a vector that is zero."""
    return tree.cosine(tree.gram(taus))
