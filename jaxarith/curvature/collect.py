r"""Measures the curvature of a task from its inputs: one pass, no labels.

A sample has features f `[C]` with the Jacobian J. For a random probe v with
:math:`E[vv^\top] = I`, the vector :math:`u = J^\top v` has :math:`E[uu^\top] = J^\top
J`. A linear layer with inputs a `[R, in]` for R tokens, and gradients g `[R, out]` in
its outputs, has the part :math:`a^\top g` of u, a matrix. `Sharing` says how Kronecker
factors treat the tokens:

`whole` (ours): A is the mean of :math:`a^\top g\,g^\top a`, B is the mean of
:math:`g^\top a\,a^\top g`, and d is their common trace. It does not assume that tokens
are independent. Its trace equals that of the exact block, and the factors of the union
of two sets are exactly the mean of the factors of both. It is one step of the power
iteration to the nearest Kronecker product of the block, as in Morwani et al. A New
Perspective on Shampoo's Preconditioner. 2024. arXiv:2406.17748.

`expand`, `reduce`: Eschenhagen, Immer, Turner, Schneider, Hennig. Kronecker-Factored
Approximate Curvature for Modern Neural Network Architectures. NeurIPS 2023.
arXiv:2311.00636. With `expand` tokens are independent samples; with `reduce` a sample
is the mean of its tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxarith import fingerprint, tree
from jaxarith.curvature import layers as linear
from jaxarith.curvature.factors import EigenFactors, Factors, Sharing, check_base
from jaxarith.curvature.passes import Plan, Statistics, averages, first_sample
from jaxarith.typing import ApplyFn, Params


def collect(
    apply_fn: ApplyFn,
    params_0: Params,
    batches: Sequence[dict],
    *,
    inputs: Sequence[str] = ("image",),
    sharing: Sharing | None = "whole",
    probes: int | None = 1,
    key: jax.Array | None = None,
    select: str = ".*",
    joint: bool = False,
    full_up_to: int = 0,
    rank: int = 0,
    token_mask: str | Callable[[str], str | None] | None = None,
    penalty_mask: str | None = None,
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> Factors:
    r"""Measures factors of :math:`E_x[J(x)^\top J(x)]` at `params_0`, for the penalty.

    It makes one compiled pass, forward and backward, over unlabelled samples. A few
    hundred samples are enough. Only linear layers of Linen modules have Kronecker
    factors; all other leaves, and other models, have a diagonal.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> features`, one array with the samples as
        its first axis. These are the features whose norm τJp would take. To measure
        normalised features, pass a function that normalises them.
      params_0: the parameters at which the model is linearised.
      batches: dicts of arrays `[B, ...]`, with a `mask`, `bool[B]`, that is False for
        padding; by default all rows count.
      inputs: names of the fields of a batch that `apply_fn` takes, in order.
      sharing: how the tokens of a sample share a layer, see above. None measures only
        the diagonal of every leaf, without factors.
      probes: number of random probes for each sample, which are averaged. None takes
        the exact sum, with one backward pass for each number in the features.
      key: random key of the probes. A probe depends only on it and on the sample's
        place. Only without probes may it be None.
      select: regular expression for the whole paths of the leaves to measure.
      joint: whether to measure layers that read the same array as one layer, with their
        kernels side by side, so that terms between them count too. Queries, keys and
        values are an example.
      full_up_to: leaves outside linear layers with at most this many entries have a
        full block instead of a diagonal.
      rank: number of exact products that keep the terms between layers, see `sketch`.
        Each has the size of a task vector. If it is smaller than the number of samples,
        the result depends a little on `chunk`, and so on the number of devices.
      token_mask: name of a field `[B, S]` of the batches, for example
        `attention_mask`, that is true for tokens that count; or a function from the
        path of a kernel to this name or None. `expand` and `reduce` need it if batches
        have padding. With `whole`, tokens that do not change the features do not count.
      penalty_mask: for features by token, `[B, S, D]`, name of the field that is 0 for
        padding tokens. G is the mean over the other tokens; without it, over all.
      chunk: number of samples that are differentiated at the same time. Each needs the
        memory of its activations, and of a copy of the leaves that have no factors.
      mesh: the devices that share every batch, see `sharding`; by default those of the
        parameters.

    Returns:
      `Factors`, in float32 or better. They are means over samples, probes, and tokens
      of the features. They are on all devices of the mesh.

    Raises:
      ValueError: no real sample, no leaf that matches, no key for probes, features that
        are not one array with the samples as first axis, values that are not finite,
        or a linear layer inside `nn.remat`, `nn.scan` or a `jit` in the model.

    Example:
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> batch = {"image": np.float32([[3.0, 4.0]])}
      >>> found = collect(
      ...     apply_fn, {"w": np.zeros((2, 1), "f4")}, [batch], probes=None
      ... )
      >>> print(found.diagonal["w"].T)
      [[ 9. 16.]]
    """
    if sharing not in (None, *get_args(Sharing)):
        raise ValueError(
            f"sharing is {sharing!r}; it must be {', '.join(get_args(Sharing))} or "
            "None."
        )
    one = first_sample(batches, inputs)
    leaves = _selected(params_0, select)
    paths = [] if sharing is None else list(leaves)
    seen_layers = linear.layers_of(apply_fn, params_0, one, paths, joint)
    covered = {p for layer in seen_layers for p in (*layer.kernels, *layer.biases)}
    others = [path for path in leaves if path not in covered]
    field = token_mask if callable(token_mask) else lambda path: token_mask
    named = [(layer.name, field(layer.kernels[0])) for layer in seen_layers]
    plan = Plan(
        layers=seen_layers,
        full=tuple(p for p in others if np.size(leaves[p]) <= full_up_to),
        diagonal=tuple(p for p in others if np.size(leaves[p]) > full_up_to),
        statistics=_GRAMS[sharing or "whole"],
        probes=probes,
        chunk=chunk,
        tokens=tuple((name, value) for name, value in named if value is not None),
        penalty_mask=penalty_mask,
        rank=rank,
    )
    means = averages(apply_fn, params_0, batches, plan, inputs, key, mesh)
    layer_means = means["layers"]
    names = [layer.name for layer in plan.layers]
    return Factors(
        layers=plan.layers,
        base=fingerprint.combined(params_0),
        sharing=sharing,
        inputs={name: layer_means[name]["inputs"][None] for name in names},
        outputs={name: layer_means[name]["outputs"][None] for name in names},
        divisors={name: layer_means[name]["divisors"][None] for name in names},
        full=means["full"],
        diagonal=means["diagonal"],
        sketch=means["sketch"],
        samples=means["samples"],
    )


def _selected(params_0, select):
    leaves = tree.flatten(tree.select(tree.floating(params_0), select))
    if not leaves:
        raise ValueError(
            f"no floating-point leaf has a path that matches {select!r}. The pattern "
            "must match whole paths."
        )
    return leaves


def whole_samples(
    basis: Any, a: jax.Array, g: jax.Array, counted: jax.Array
) -> dict[str, jax.Array]:
    """Returns the statistics of `sharing="whole"`; see `passes.Statistics`."""
    of_g, of_a = _products(g, g), _products(a, a)  # [B, R, R]
    return {
        "inputs": _gram(a, jnp.matmul(of_g, a, precision="highest")),
        "outputs": _gram(g, jnp.matmul(of_a, g, precision="highest")),
        "divisors": jnp.sum(of_g * of_a),
    }


def _expand(basis, a, g, counted):
    return {
        "inputs": _gram(a, a),
        "outputs": _gram(g, g),
        "divisors": jnp.sum(counted, dtype=a.dtype),
    }


def _reduce(basis, a, g, counted):
    tokens = jnp.sum(counted, axis=1, dtype=a.dtype)
    mean = a.sum(axis=1) / jnp.maximum(tokens, 1)[:, None]
    total = g.sum(axis=1)
    return {
        "inputs": _gram(mean, mean),
        "outputs": _gram(total, total),
        "divisors": jnp.sum(tokens > 0, dtype=a.dtype),
    }


_GRAMS: dict[Sharing, Statistics] = {
    "whole": whole_samples,
    "expand": _expand,
    "reduce": _reduce,
}


def _rotated(basis, a, g, counted):
    """Returns the sum of the squared entries of aᵀg in a basis, `[in, out]`."""
    u_a, u_b = basis
    a = jnp.matmul(a, u_a, precision="highest")
    g = jnp.matmul(g, u_b, precision="highest")
    moved = jnp.einsum("bri,bro->bio", a, g, precision="highest")
    return {"eigenvalues": jnp.sum(moved**2, axis=0)}


def _products(x, y):
    """Returns all inner products of the rows of x and y `[B, R, D]`: `[B, R, R]`."""
    return jnp.einsum("bri,bsi->brs", x, y, precision="highest")


def _gram(x, y):
    """Returns the sum of x yᵀ over all rows of `[..., D]` and `[..., E]`: `[D, E]`."""
    rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jnp.matmul(rows[0].T, rows[1], precision="highest")


def correct(
    apply_fn: ApplyFn,
    params_0: Params,
    batches: Sequence[dict],
    factors: EigenFactors,
    *,
    inputs: Sequence[str] = ("image",),
    probes: int | None = 1,
    key: jax.Array | None = None,
    penalty_mask: str | None = None,
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> EigenFactors:
    r"""Measures the exact diagonal of the curvature in a given eigenbasis (EK-FAC).

    The eigenvalues are :math:`S_{ij} = E\,(U_A^\top a^\top g\,U_B)_{ij}^2`. If several
    tasks are measured in one basis, that of their merged factors, their eigenvalues can
    be added exactly.

    Source: George et al. 2018 (see `EigenFactors`).

    Args:
      apply_fn, params_0, batches, inputs, probes, key, penalty_mask, chunk, mesh: as
        for `collect`. A chunk needs memory for a matrix of every layer for each sample.
      factors: result of `eigen`.

    Returns:
      `factors` with the eigenvalues of these samples; the rest stays.

    Raises:
      ValueError: as for `collect`, the factors belong to other parameters, or they are
        not `EigenFactors`.

    Example:
      >>> found = correct(  # doctest: +SKIP
      ...     apply_fn, params_0, batches, eigen(factors), key=jax.random.key(0)
      ... )
    """
    if not isinstance(factors, EigenFactors):
        raise ValueError(
            f"found {type(factors).__name__}; expected EigenFactors. Pass "
            "curvature.eigen(factors)."
        )
    check_base(factors, params_0)

    plan = Plan(
        layers=factors.layers,
        statistics=_rotated,
        probes=probes,
        chunk=chunk,
        penalty_mask=penalty_mask,
    )
    bases = {
        layer.name: (factors.inputs[layer.name], factors.outputs[layer.name])
        for layer in factors.layers
    }
    means = averages(apply_fn, params_0, batches, plan, inputs, key, mesh, bases)
    values = {name: found["eigenvalues"] for name, found in means["layers"].items()}
    return dataclasses.replace(factors, eigenvalues=values, samples=means["samples"])
