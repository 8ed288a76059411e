r"""Core space: merges low-rank adapters by any method, in the small space they span.

Panariello, Marczak, Magistri, Porrello, Twardowski, Bagdanov, Calderara, van de Weijer.
Accurate and Efficient Low-Rank Model Merging in Core Space. NeurIPS 2025.
arXiv:2509.17786. Stoica, Ramesh, Ecsedi, Choshen, Hoffman. Model Merging with SVD to
Tie the Knots. ICLR 2025. arXiv:2410.19735 (`basis="knots"`).

T adapters update one kernel [input, output] by :math:`\tau_t = A_t B_t`. With
orthonormal bases V of all their inputs and U of all their outputs,

.. math:: M_t = V^\top \tau_t\, U, \qquad \tau_t = V M_t U^\top, \qquad
          \tau = V \operatorname{merge}(M_1, \dots, M_T)\, U^\top.

The cores have at most :math:`R = \sum_t r_t` rows and columns, so the merged adapter
has at most rank R. Linear methods return the same result for the cores as for the whole
updates. For adapters of equal rank, so do methods that turn with the bases, for example
`tsv` and `iso_c`. Methods that look at single entries, for example TIES, do not.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _blas, _leaves, _matrices
from jaxarith.typing import Params, Taus

Basis = Literal["core", "knots"]


class Factors(NamedTuple):
    """A product of low rank that is added to a kernel: `a @ b`.

    Attributes:
      a: `[in, r]`.
      b: `[r, out]`. Either `a` or `b` includes the scale α / r of the adapter.
    """

    a: jax.Array
    b: jax.Array


class Core(NamedTuple):
    """The result of `core`.

    Attributes:
      factors: by path, the merged adapter; `a` and `b` have equal norms.
      energy: by path, the share of the squared norm of the merged update that the
        factors keep; 1 without `rank`.
    """

    factors: dict[str, Factors]
    energy: dict[str, jax.Array]


def core(
    adapters: Sequence[Mapping[str, Factors]],
    method: Callable[[Params, Taus], Params],
    *,
    rank: int | None = None,
    basis: Basis = "core",
) -> Core:
    r"""Merges low-rank adapters into one adapter, without making a whole update.

    The bases are the singular vectors of the updates side by side. The entry with the
    largest magnitude of each vector is positive. The paper uses the singular vectors of
    the factors side by side. They span the same space, but depend on how an adapter is
    written: :math:`A Q` and :math:`Q^{-1} B` are the same adapter as A and B. Here both
    forms have the same result.

    A core takes :math:`O((\text{in} + \text{out}) R^2 + R^3)` operations.

    Source: Panariello et al. 2025; Stoica et al. 2025 for "knots".

    Args:
      adapters: for each of T adapters, its factors by the path of a kernel; see
        `models.lora.factors`. Ranks may differ. A missing kernel counts as zero.
      method: `method(params_0, taus) -> params`, for example `merge.ties` with its
        options bound by `functools.partial`. It receives the cores as leaves with the
        paths of the kernels, and zeros as `params_0`.
      rank: the rank of the result, which is the best approximation of this rank. Zeros
        are added if a core is smaller. None keeps all singular values.
      basis: "core" uses both bases. "knots" uses only U, so the method merges
        :math:`\tau_t U` `[in, R]`, as the authors of KnOTS do.

    Returns:
      The merged adapter. Its scale is 1, that is, its α equals its rank.

    Raises:
      ValueError: no adapter, no factors, factors that do not fit each other, a rank
        below 1, an unknown `basis`, or non-finite values.

    Example:
      >>> one = {"kernel": Factors(jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 0.0]]))}
      >>> two = {"kernel": Factors(jnp.array([[0.0], [1.0]]), jnp.array([[0.0, 1.0]]))}
      >>> total = lambda params_0, taus: jax.tree.map(lambda *x: sum(x), *taus)
      >>> a, b = core([one, two], total).factors["kernel"]
      >>> print((a @ b).round(5))
      [[2. 0.]
       [0. 1.]]
    """
    _leaves.one_of(basis, Basis, "basis")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    rows = _rows(adapters)
    spaces = _side_by_side(_space, {p: (row,) for p, row in rows.items()}, basis=basis)
    cores = [
        {path: spaces[path][0][task] for path in rows} for task in range(len(adapters))
    ]
    merged = method(jax.tree.map(jnp.zeros_like, cores[0]), cores)
    products = {
        path: (matrix, *spaces[path][1:])
        for path, matrix in tree.flatten(merged).items()
    }
    found = _side_by_side(_factored, products, rank=rank)
    return Core(
        {path: factors for path, (factors, _) in found.items()},
        {path: energy for path, (_, energy) in found.items()},
    )


def _rows(adapters) -> dict[str, list[Factors]]:
    """Returns, by path, the factors of every adapter, in float32 or better."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    if not paths:
        raise ValueError("core merges at least one adapter with factors; found none.")
    rows = {}
    for path in paths:
        given = [Factors(*adapter[path]) for adapter in adapters if path in adapter]
        shapes = {(a.shape[0], b.shape[1]) for a, b in given}
        if len(shapes) > 1 or any(a.shape[1] != b.shape[0] for a, b in given):
            text = ", ".join(f"{list(a.shape)} and {list(b.shape)}" for a, b in given)
            raise ValueError(
                f"the factors of {path} have the shapes {text}; expected [in, r] and "
                "[r, out], with the same in and out in all adapters."
            )
        tree.check_finite(given, f"adapters at {path}")
        [(inputs, outputs)] = shapes
        dtype = tree.wide_dtype(*jax.tree.leaves(given))
        nothing = Factors(jnp.zeros((inputs, 0), dtype), jnp.zeros((0, outputs), dtype))
        rows[path] = [
            Factors(*(jnp.asarray(x, dtype) for x in adapter.get(path, nothing)))
            for adapter in adapters
        ]
    return rows


def _side_by_side(
    function: Callable[..., Any], calls: Mapping[str, tuple], **static: Any
) -> dict[str, Any]:
    """Calls a jitted function for every path, for small matrices several at a time."""
    found = {}
    with _blas.limited(jax.tree.leaves(calls)), _blas.Queue(found.__setitem__) as queue:
        for path, args in calls.items():
            if _blas.fit_beside_others(jax.tree.leaves(args)):
                # Compiled here: each thread has JAX settings of its own.
                compiled = function.lower(*args, **static).compile()
                queue.add(path, functools.partial(_finished, compiled, args))
            else:
                queue.finish()
                found[path] = tree.settled(function(*args, **static))
    return found


def _finished(compiled, args):
    return jax.block_until_ready(compiled(*args))


@functools.partial(jax.jit, static_argnames="basis")
def _space(row, basis):
    """Returns the cores of all tasks, and the bases."""
    inputs, outputs = _bases(row, basis)
    return [_core(factors, inputs, outputs) for factors in row], inputs, outputs


def _bases(row, basis):
    """Returns V `[in, R]`, or None with "knots", and U `[out, R]`."""
    row = [factors for factors in row if factors.a.size]
    outputs = _basis(jnp.concatenate([jnp.linalg.qr(a).R @ b for a, b in row]).T)
    if basis == "knots":
        return None, outputs
    inputs = [_matrices.dot(a, jnp.linalg.qr(b.T).R.T) for a, b in row]
    return _basis(jnp.concatenate(inputs, axis=1)), outputs


def _basis(columns):
    """Returns the left singular vectors; those that are only noise are zero."""
    u, _, _ = _matrices.svd(columns)
    largest = jnp.argmax(jnp.abs(u), axis=0)
    signs = jnp.sign(jnp.take_along_axis(u, largest[None], axis=0))
    return u * signs


def _core(factors, inputs, outputs):
    a = factors.a if inputs is None else _matrices.dot(inputs.T, factors.a)
    return _matrices.dot(a, _matrices.dot(factors.b, outputs))


@functools.partial(jax.jit, static_argnames="rank")
def _factored(matrix, inputs, outputs, rank):
    u, s, vt = _matrices.svd(matrix)
    kept = min(len(s), rank or len(s))
    energy = jnp.sum(s**2)
    share = jnp.where(
        energy > 0, jnp.sum(s[:kept] ** 2) / jnp.where(energy > 0, energy, 1), 1
    )
    roots = tree.safe_sqrt(jnp.maximum(s[:kept], 0))
    a = u[:, :kept] * roots[None]
    b = _matrices.dot(roots[:, None] * vt[:kept], outputs.T)
    if inputs is not None:
        a = _matrices.dot(inputs, a)
    more = (rank or kept) - kept
    factors = Factors(jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), (0, 0))))
    return factors, share
