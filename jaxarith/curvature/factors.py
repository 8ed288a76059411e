r"""Kronecker factors of the Gram matrix of a Jacobian, and their quadratic form.

The mean squared τJp of a task, :math:`E_x\|J(x)\tau\|^2 = \tau^\top G\tau`, needs the
task's inputs only through :math:`G = E_x[J(x)^\top J(x)]`. `Factors` approximate G by a
Kronecker product for each linear layer, and by the diagonal or small full blocks for
all other trained leaves. They drop the blocks between layers; an optional sketch
approximates these.

Martens, Grosse. Optimizing Neural Networks with Kronecker-factored Approximate
Curvature. ICML 2015. arXiv:1503.05671. As a penalty for task arithmetic: Porrello et
al. Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored
Approximate Curvature. ICLR 2026. arXiv:2602.17385.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import fingerprint, tree
from jaxarith.curvature import matrices, sketch
from jaxarith.curvature.matrices import Layer
from jaxarith.typing import Params

Sharing = Literal["whole", "expand", "reduce"]
_STATIC = {"static": True}  # marks fields that are not arrays and that `jit` hashes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    r"""The curvature of one task from `collect`, or of several tasks from `merge`.

    A layer with matrix W `[in (+ 1), out]` has the form
    :math:`\sum_k \langle W, A_k W B_k\rangle / d_k`. All arrays are means over samples,
    so those of several tasks can be added like task vectors.

    Attributes:
      layers: the layers that have factors.
      base: `fingerprint.combined` of the parameters θ0 at which it was measured.
      sharing: how tokens shared the layers, see `collect`.
      inputs: A by the name of the layer, `[K, in (+ 1), in (+ 1)]`; or its n blocks
        `[K, n, s, s]`, see `block_diagonal`.
      outputs: B by the name of the layer, `[K, out, out]`, or its blocks.
      divisors: d by the name of the layer, `[K]`.
      full: full blocks `[n, n]` of other leaves with n entries, by path.
      diagonal: diagonals of all other leaves, in their shapes, by path.
      sketch: rows u `[rank, ...]` of all leaves, by path. The form adds all
        :math:`(u\cdot\tau)^2`. It is empty if there is no sketch.
      samples: the number of samples, `f32[]`.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata=_STATIC)
    base: int = dataclasses.field(metadata=_STATIC)
    sharing: Sharing | None = dataclasses.field(metadata=_STATIC)
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    divisors: dict[str, jax.Array]
    full: dict[str, jax.Array]
    diagonal: dict[str, jax.Array]
    sketch: dict[str, jax.Array]
    samples: jax.Array

    def product(self, tau: Params, /) -> Params:
        """Returns the product with a task vector; see `curvature.product`."""

        def of_layer(name, w):
            triples = zip(
                self.inputs[name], self.outputs[name], self.divisors[name], strict=True
            )
            # Without samples, or if the layer cannot change the features, d = 0 and
            # A = B = 0.
            return tree.total(
                _times(b, _times(a, w).T).T / jnp.where(d == 0, 1, d)
                for a, b, d in triples
            )

        return _product(self, tau, of_layer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenFactors:
    r"""Factors with the exact diagonal in their eigenbasis (EK-FAC).

    A layer with matrix W has the form
    :math:`\sum_{ij} S_{ij}\,(U_A^\top W U_B)_{ij}^2`.

    George, Laurent, Bouthillier, Ballas, Vincent. Fast Approximate Natural Gradient
    Descent in a Kronecker-factored Eigenbasis. NeurIPS 2018. arXiv:1806.03884.

    Attributes:
      layers, base, full, diagonal, sketch, samples: as for `Factors`.
      inputs: U_A by the name of the layer, orthogonal, `[in (+ 1), in (+ 1)]`.
      outputs: U_B, orthogonal, `[out, out]`.
      eigenvalues: S, `[in (+ 1), out]`, at least 0.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata=_STATIC)
    base: int = dataclasses.field(metadata=_STATIC)
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    eigenvalues: dict[str, jax.Array]
    full: dict[str, jax.Array]
    diagonal: dict[str, jax.Array]
    sketch: dict[str, jax.Array]
    samples: jax.Array

    def product(self, tau: Params, /) -> Params:
        """Returns the product with a task vector; see `curvature.product`."""

        def of_layer(name, w):
            u_a, u_b = self.inputs[name], self.outputs[name]
            return u_a @ (self.eigenvalues[name] * (u_a.T @ w @ u_b)) @ u_b.T

        return _product(self, tau, of_layer)


Curvature = Factors | EigenFactors


def check_base(curvature: Curvature, params_0: Params) -> None:
    """Checks that the curvature was measured at these parameters.

    Args:
      curvature: result of `collect`, `merge`, `eigen` or `correct`.
      params_0: pre-trained parameters.

    Raises:
      ValueError: the fingerprints of the parameters differ.

    Example:
      >>> check_base(factors, params_0)  # doctest: +SKIP
    """
    if curvature.base != (base := fingerprint.combined(params_0)):
        raise ValueError(
            f"the curvature was measured at parameters with the fingerprint "
            f"{curvature.base:08x}, but these have {base:08x}. Collect it again at the "
            "parameters from which the task vectors start."
        )


def check_kronecker(found: object) -> None:
    """Raises a ValueError unless these are `Factors`, not in an eigenbasis."""
    if not isinstance(found, Factors):
        raise ValueError(
            f"found {type(found).__name__}; expected Factors, as curvature.collect "
            "returns them. Merge, calibrate and cut them before curvature.eigen. "
            "curvature.load returns a pair: the factors and the metadata."
        )


def scaled(factors: Factors, by: float | jax.Array) -> Factors:
    """Returns the factors of a form that is `by` times as large, `by` ≥ 0."""

    def times(part):
        return {name: by * leaf for name, leaf in part.items()}

    return dataclasses.replace(
        factors,
        outputs=times(factors.outputs),
        full=times(factors.full),
        diagonal=times(factors.diagonal),
        sketch={name: by**0.5 * rows for name, rows in factors.sketch.items()},
    )


def weighted(factors: Factors, weight: Callable[[str], float]) -> Factors:
    """Returns the factors of a form in which each part has its own weight.

    Args:
      factors: factors without a sketch, because a sketch belongs to all leaves
        together.
      weight: `weight(path)` returns the weight of a leaf, at least 0. A layer has the
        weight of its kernel, or of the first of several kernels.

    Returns:
      `Factors` with the parts multiplied by their weights.

    Raises:
      ValueError: the factors have a sketch.

    Example:
      >>> weighted(factors, lambda path: 10.0 if "norm" in path else 1.0)
      ... # doctest: +SKIP
    """
    if factors.sketch:
        raise ValueError(
            "these factors have a sketch. It belongs to all leaves together and cannot "
            "be weighted by path. Collect without a rank."
        )
    of_layer = {layer.name: weight(layer.kernels[0]) for layer in factors.layers}

    def times(part):
        return {path: weight(path) * leaf for path, leaf in part.items()}

    return dataclasses.replace(
        factors,
        outputs={name: of_layer[name] * b for name, b in factors.outputs.items()},
        full=times(factors.full),
        diagonal=times(factors.diagonal),
    )


def _times(symmetric, w):
    """Multiplies by a symmetric matrix `[m, m]`, or by its diagonal blocks `[n, s, s]`.

    The last block is padded with zeros.
    """
    if symmetric.ndim == 2:
        return symmetric @ w
    blocks, size, _ = symmetric.shape
    filled = jnp.pad(w, ((0, blocks * size - len(w)), (0, 0)))
    moved = symmetric @ filled.reshape(blocks, size, -1)
    return moved.reshape(blocks * size, -1)[: len(w)]


def _product(curvature, tau, of_layer):
    vector = tree.flatten(tau)
    found = {}
    for layer in curvature.layers:
        w = matrices.matrix(layer, vector)
        if w is not None:
            moved = of_layer(layer.name, w)
            found.update(matrices.leaves(layer, moved, vector))
    for path, block in curvature.full.items():
        if path in vector:
            leaf = vector[path]
            found[path] = (block @ leaf.reshape(-1)).reshape(leaf.shape)
    for path, squares in curvature.diagonal.items():
        if path in vector:
            leaf = vector[path]
            if squares.shape not in ((), leaf.shape):  # else JAX might broadcast it
                raise ValueError(
                    f"the curvature of {path} has shape {list(squares.shape)}, but the "
                    f"task vector has {list(leaf.shape)}. Use both from the same model."
                )
            found[path] = squares * leaf
    if missing := [path for path in vector if path not in found]:
        raise ValueError(
            f"no curvature was measured for {', '.join(tree.first_few(missing, 3))}: "
            f"{len(missing)} of {len(vector)} leaves of the task vector. Collect it "
            "for all trained leaves, or train only the leaves that it was collected "
            "for."
        )
    if curvature.sketch:
        between = sketch.product(curvature.sketch, vector)
        found = {path: found[path] + between[path] for path in vector}
    return tree.map_with_path(lambda path, _: found[path], tau)


def product(tau: Params, curvature: Curvature) -> Params:
    r"""Multiplies an approximate Gram matrix and a task vector: :math:`M\tau`.

    It takes `in · out · (in + out)` multiplications and additions for each layer and
    Kronecker term, and twice as many in an eigenbasis.

    Args:
      tau: a task vector.
      curvature: result of `collect`, `merge` or `correct`.

    Returns:
      A tree like `tau`.

    Raises:
      ValueError: `tau` has leaves whose curvature was not measured.

    Example:
      >>> from jaxarith.curvature import collect
      >>> params_0, batch = {"w": jnp.zeros((2, 1))}, {"image": jnp.array([[3.0, 4.0]])}
      >>> found = collect(
      ...     lambda params, x: x @ params["w"], params_0, [batch], probes=None
      ... )
      >>> print(product({"w": jnp.ones((2, 1))}, found)["w"].T)
      [[ 9. 16.]]
    """
    return curvature.product(tau)


@jax.custom_jvp
def penalty(tau: Params, curvature: Curvature) -> jax.Array:
    r"""Returns the quadratic form :math:`\tau^\top M\tau`.

    It approximates the mean squared τJp. Its gradient is :math:`2M\tau`, which costs no
    more than the value. The gradient treats the curvature as a constant.

    Args:
      tau: a task vector.
      curvature: result of `collect`, `merge` or `correct`.

    Returns:
      A scalar, at least 0 up to rounding.

    Raises:
      ValueError: `tau` has leaves whose curvature was not measured.

    Example:
      >>> from jaxarith.curvature import collect
      >>> params_0, batch = {"w": jnp.zeros((2, 1))}, {"image": jnp.array([[3.0, 4.0]])}
      >>> found = collect(
      ...     lambda params, x: x @ params["w"], params_0, [batch], probes=None
      ... )
      >>> print(penalty({"w": jnp.ones((2, 1))}, found))
      25.0
    """
    return _dot(tau, product(tau, curvature))


@penalty.defjvp
def _penalty_jvp(primals, tangents):
    tau, curvature = primals
    moved = product(tau, curvature)
    return _dot(tau, moved), 2 * _dot(tangents[0], moved)


def _dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return tree.total(jnp.sum(x * y) for x, y in pairs)
