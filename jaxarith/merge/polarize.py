r"""Polarised scaling: makes large columns and layers larger, and small ones smaller.

From Essential Subspace Merging (ESM). CVPR 2026. arXiv:2602.20208, arXiv:2606.19164. It
is the part of that method that needs no data.

For every weight [output, input] of a linear layer, :math:`n_t` is the norm of the task
vector :math:`\tau_t`, and :math:`c_j` the norm of column j over all weighted tasks:

.. math:: w_t = \Big(\frac{n_t}{\bar n}\Big)^2, \quad
          c_j^2 = \sum_t w_t^2 \|\tau_{t,:j}\|^2, \quad
          \tau'_{:j} = \Big(\frac{c_j}{\bar c}\Big)^2 \tau_{:j}, \quad
          \tau'' = \Big(\frac{\|\tau'\|}{\overline{\|\tau'\|}}\Big)^2 \tau',

where bars mean averages over the tasks, the columns, and the layers of one kind.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices, wrapped
from jaxarith.typing import Coef, Params, Taus


def polarize(
    params_0: Params,
    taus: Taus,
    merged: Params,
    *,
    coef: Coef = 1.0,
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> Params:
    """Scales the columns and layers of a merged vector, without data.

    The length of the vector changes, so choose its coefficient again. Layers are of one
    kind if their paths differ only in the number of the block, which is the first
    number in a path.

    Args:
      params_0: pre-trained parameters.
      taus: the task vectors that were merged. A missing leaf counts as zero.
      merged: the result of a merge of them.
      coef: the coefficient of the scaled vector: one number, or one by path.
      matrices: a regular expression for the whole paths of the 2-D leaves to scale; by
        default those without `embed` in their path. The others stay as merged, times
        `coef`. None scales all.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output], as for `wudi`. None decides by the last name of a path.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: `matrices` matches none of the 2-D leaves, `merged` does not have the
        structure of `params_0`, task vectors that do not fit, or non-finite values.

    Example:
      >>> merged = {"weight": jnp.array([[3.0, 1.0]])}
      >>> print(polarize({"weight": jnp.zeros((1, 2))}, [merged], merged)["weight"])
      [[6.75 0.25]]
    """
    options = {"coef": coef, "matrices": matrices, "in_out": in_out}
    return wrapped.run(functools.partial(plan, **options), params_0, taus, merged)


def plan(
    rows: wrapped.Rows,
    *,
    coef: Coef = 1.0,
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> wrapped.Plan:
    """Plans the changes of `polarize` to each leaf; it has the same arguments."""
    are_matrices = _matrices.which(rows, matrices)
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "polarize")

    def measure(path, leaf, row):
        if not are_matrices[path]:
            return None
        return _length(*tree.gathered((leaf, row)), are_in_out[path])

    args = (are_matrices, are_in_out, wrapped.coefs(coef, rows))
    return wrapped.Plan(_change, args, measure, layer_scales)


@_leaves.leaf_function(static=("is_matrix", "is_in_out"), whole=True)
def _change(leaf, row, is_matrix, is_in_out, coef, scale):
    leaf_0, *taus = row
    vector = leaf - leaf_0
    if is_matrix:
        vector = scale * _columns(vector, taus, is_in_out)
    return leaf_0 + coef * vector


@functools.partial(jax.jit, static_argnames="is_in_out")
def _length(leaf, row, is_in_out):
    """Returns the norm of a merged matrix with scaled columns."""
    merged, start, *taus = (_leaves.widened(x) for x in (leaf, *row))
    return _norm(_columns(merged - start, taus, is_in_out))


def layer_scales(
    norms: Mapping[str, jax.Array | None],
) -> dict[str, jax.Array | None]:
    """Returns, by path, the squared ratio of a layer's norm to the mean of its kind.

    Args:
      norms: norm of each layer by path; None for leaves that are not layers.

    Example:
      >>> found = layer_scales({"0/w": jnp.array(1.0), "1/w": jnp.array(3.0)})
      >>> {path: float(scale) for path, scale in found.items()}
      {'0/w': 0.25, '1/w': 2.25}
    """
    kinds: dict[str, list[jax.Array]] = {}
    for path, norm in norms.items():
        if norm is not None:
            kinds.setdefault(_kind(path), []).append(norm)
    means = {kind: _mean(found) for kind, found in kinds.items()}
    return {
        path: None if norm is None else relative(norm, means[_kind(path)]) ** 2
        for path, norm in norms.items()
    }


def _kind(path):
    # Only whole numbers are replaced: `fc1` and `fc2`, or `wi_0` and `wi_1`, are layers
    # of two kinds.
    return re.sub(r"(^|[/._])\d+(?=[/.])", r"\1#", path, count=1)


def _columns(vector, taus, is_in_out):
    outputs = 1 if is_in_out else 0
    norms = [_norm(tau) for tau in taus]
    mean = _mean(norms)
    squares = tree.total(
        relative(norm, mean) ** 4 * jnp.sum(tau**2, axis=outputs)
        for norm, tau in zip(norms, taus, strict=True)
    )
    lengths = tree.safe_sqrt(squares)
    scales = relative(lengths, jnp.mean(lengths)) ** 2
    return vector * jnp.expand_dims(scales, outputs)


def _norm(matrix):
    return tree.safe_sqrt(jnp.sum(matrix**2))


def _mean(values: Iterable[jax.Array]) -> jax.Array:
    found = list(values)
    return tree.total(found) / len(found)


def relative(values: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns the values in units of their mean; 1 if all are zero."""
    zero = mean == 0
    return jnp.where(zero, 1, values / jnp.where(zero, 1, mean))
