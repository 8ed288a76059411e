r"""Kronecker factors of the Gram matrix of a Jacobian, and their quadratic form.

The mean squared τJp of a task, :math:`E_x\|J(x)\tau\|^2 = \tau^\top G\tau`, needs the
task's inputs only through :math:`G = E_x[J(x)^\top J(x)]`. `Factors` keep of G a
Kronecker product for each linear layer and the diagonal, or small full blocks, of what
else is trained. Blocks between layers are dropped; a sketch, if there is one, stands
for them.

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
_STATIC = {"static": True}  # what `jit` compiles for, and no array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    r"""What `collect` keeps of the curvature of one task, or `merge` of several.

    A layer with matrix W `[in (+ 1), out]` has the form
    :math:`\sum_k \langle W, A_k W B_k\rangle / d_k`. All arrays are means over samples,
    so that those of several tasks add like task vectors.

    Attributes:
      layers: the layers that have factors.
      base: `fingerprint.combined` of the parameters θ0 that were differentiated.
      sharing: how tokens shared the layers, see `collect`.
      inputs: A by the name of the layer, `[K, in (+ 1), in (+ 1)]`; or its n blocks
        `[K, n, s, s]`, see `block_diagonal`.
      outputs: B, `[K, out, out]`, or its blocks.
      divisors: d, `[K]`.
      full: blocks `[n, n]` of other leaves of n entries, by path.
      diagonal: the diagonal for all other leaves, in their shapes, by path.
      sketch: rows u `[rank, ...]` of all leaves, by path, whose :math:`(u\cdot\tau)^2`
        are added; empty for none.
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
        """The product with a task vector; see `curvature.product`."""

        def of_layer(name, w):
            triples = zip(
                self.inputs[name], self.outputs[name], self.divisors[name], strict=True
            )
            # Without samples, or where nothing moves the outputs, d = 0 and A = B = 0.
            return tree.total(
                _times(b, _times(a, w).T).T / jnp.where(d == 0, 1, d)
                for a, b, d in triples
            )

        return _product(self, tau, of_layer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenFactors:
    r"""Factors with the exact diagonal in their eigenbasis: EK-FAC.

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
        """The product with a task vector; see `curvature.product`."""

        def of_layer(name, w):
            u_a, u_b = self.inputs[name], self.outputs[name]
            return u_a @ (self.eigenvalues[name] * (u_a.T @ w @ u_b)) @ u_b.T

        return _product(self, tau, of_layer)


Curvature = Factors | EigenFactors


def check_base(curvature: Curvature, params_0: Params) -> None:
    """Raises a ValueError if the curvature was measured at other parameters."""
    if curvature.base != (base := fingerprint.combined(params_0)):
        raise ValueError(
            f"the curvature was measured at parameters of fingerprint "
            f"{curvature.base:08x}, and these have {base:08x}. Collect it anew at the "
            "parameters that the task vectors start from."
        )


def check_kronecker(found: object) -> None:
    """Raises a ValueError unless these are `Factors`, in no eigenbasis."""
    if not isinstance(found, Factors):
        raise ValueError(
            f"found {type(found).__name__}; expected Factors, as curvature.collect "
            "gives them. Merge, calibrate and cut them before curvature.eigen; "
            "curvature.load gives them with metadata."
        )


def scaled(factors: Factors, by: float | jax.Array) -> Factors:
    """The factors of a form that is `by` times as large, `by` ≥ 0."""

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
    """The factors of a form whose parts weigh differently.

    Args:
      factors: without a sketch, which is of all leaves together.
      weight: from the path of a leaf to its weight, at least 0. A layer has that of its
        kernel, or of the first of several.

    Raises:
      ValueError: the factors have a sketch.

    Example:
      >>> weighted(factors, lambda path: 10.0 if "norm" in path else 1.0)
      ... # doctest: +SKIP
    """
    if factors.sketch:
        raise ValueError(
            "these factors have a sketch, which is of all leaves together and cannot "
            "be weighed by path. Collect without a rank."
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
    """A product with a symmetric matrix `[m, m]`, or its diagonal blocks `[n, s, s]`.

    The last block is filled up with zeros.
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
            if squares.shape not in ((), leaf.shape):  # others might be broadcast
                raise ValueError(
                    f"the curvature of {path} has shape {list(squares.shape)}, and the "
                    f"task vector {list(leaf.shape)}. They are of other models."
                )
            found[path] = squares * leaf
    if missing := [path for path in vector if path not in found]:
        raise ValueError(
            f"no curvature was measured for {', '.join(tree.first_few(missing, 3))}: "
            f"{len(missing)} of {len(vector)} leaves of the task vector. Collect it "
            "for all that is trained, or train what it was collected for."
        )
    if curvature.sketch:
        between = sketch.product(curvature.sketch, vector)
        found = {path: found[path] + between[path] for path in vector}
    return tree.map_with_path(lambda path, _: found[path], tau)


def product(tau: Params, curvature: Curvature) -> Params:
    r"""The product :math:`M\tau` of an approximate Gram matrix with a task vector.

    It costs `in · out · (in + out)` multiplications and additions for each layer and
    Kronecker term, twice that in an eigenbasis.

    Args:
      tau: a task vector.
      curvature: what `collect`, `merge` or `correct` gives.

    Returns:
      A tree like `tau`.

    Raises:
      ValueError: `tau` has leaves whose curvature was not measured.
    """
    return curvature.product(tau)


@jax.custom_jvp
def penalty(tau: Params, curvature: Curvature) -> jax.Array:
    r"""The quadratic form :math:`\tau^\top M\tau`, about the mean squared τJp.

    Args:
      tau: a task vector.
      curvature: what `collect`, `merge` or `correct` gives.

    Returns:
      A scalar, at least 0 but for rounding. Its gradient is :math:`2M\tau`, which costs
      no more than the value does. The curvature counts as a constant.

    Raises:
      ValueError: `tau` has leaves whose curvature was not measured.
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
