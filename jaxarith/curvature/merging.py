"""Merges the factors of several tasks, or of all tasks except one."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import fingerprint, tree
from jaxarith.curvature import sketch
from jaxarith.curvature.factors import Factors, check_kronecker, scaled
from jaxarith.typing import Numbers

How = Literal["mean", "sum", "nearest", "each"]


def merge(
    factors: Sequence[Factors], how: How = "mean", weights: Numbers | None = None
) -> Factors:
    r"""Merges the curvature of several tasks.

    The order of the tasks does not change a bit of the result. Sketches are joined and
    compressed to the largest of their ranks; with `each` they are only joined.

    Args:
      factors: factors of T tasks at the same parameters.
      how: "mean" takes the means of A, of B and of d, at constant cost. With
        `sharing="whole"` they are the factors of the union of the data. "sum" is T
        times that form, the weight in Porrello et al. (2026), Eq. 8. "nearest" (ours)
        is the Kronecker product that is nearest to the mean of the tasks' products in
        the Frobenius norm. "each" is this mean itself, as T products side by side, at T
        times the cost.
      weights: T weights of the mean, for example the numbers of samples; by default
        equal. They are divided by their sum.

    Returns:
      `Factors`; `samples` is the sum over the tasks.

    Raises:
      ValueError: no factors, factors of different parameters or different leaves,
        factors in an eigenbasis, an unknown `how`, or weights that are not T numbers
        ≥ 0 with a positive sum.

    Example:
      >>> from jaxarith.curvature import collect
      >>> batch = {"image": np.float32([[3.0, 4.0]])}
      >>> one = collect(
      ...     lambda params, x: x @ params["w"],
      ...     {"w": np.zeros((2, 1), "f4")},
      ...     [batch],
      ...     probes=None,
      ... )
      >>> print(merge([one, one], how="sum").diagonal["w"].T)
      [[18. 32.]]
    """
    _check(factors, how)
    shares = _shares(weights, len(factors))
    return _merged(factors, shares, how, _ranks(factors))


def others(
    factors: Sequence[Factors], how: How = "mean", weights: Numbers | None = None
) -> list[Factors]:
    """Returns, for each of T tasks, the merged curvature of all other tasks.

    Args:
      factors, how, weights: as for `merge`, with T ≥ 2.

    Returns:
      T `Factors`. They take as much memory as the T given ones; with how="each" they
      take T - 1 times as much.

    Raises:
      ValueError: as for `merge`, or there is only one task.

    Example:
      >>> from jaxarith.curvature import collect
      >>> one, two = (
      ...     collect(
      ...         lambda params, x: x @ params["w"],
      ...         {"w": np.zeros((2, 1), "f4")},
      ...         [{"image": np.float32([x])}],
      ...         probes=None,
      ...     )
      ...     for x in ([3.0, 4.0], [1.0, 2.0])
      ... )
      >>> print(others([one, two])[0].diagonal["w"].T)
      [[1. 4.]]
    """
    _check(factors, how)
    if len(factors) < 2:
        raise ValueError(
            f"{len(factors)} task has no others; give the curvature of at least 2 "
            "tasks."
        )
    shares = _shares(weights, len(factors))
    ranks = _ranks(factors)
    parts = []
    for left_out in range(len(factors)):
        rest = [i for i in range(len(factors)) if i != left_out]
        own = [factors[i] for i in rest]
        of_rest = _shares(shares[rest], len(rest))
        parts.append(_merged(own, of_rest, how, [ranks[i] for i in rest]))
    return parts


def _ranks(factors):
    """Returns numbers by which factors are sorted, for any order of the caller."""
    return [fingerprint.combined(f) for f in factors]


def _merged(factors, shares, how, ranks):
    order = sorted(range(len(factors)), key=lambda i: (ranks[i], shares[i]))
    factors, shares = tuple(factors[i] for i in order), shares[order]
    if how in ("each", "nearest"):
        merged = _side_by_side(factors, shares)
        return merged if how == "each" else _nearest(merged, _sketch(factors, shares))
    mean = _mean(factors, shares)
    return mean if how == "mean" else scaled(mean, len(factors))


def _check(factors, how):
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; it must be {', '.join(get_args(How))}.")
    if not factors:
        raise ValueError("found no factors to merge; give the factors of each task.")
    for one in factors:
        check_kronecker(one)
    first = factors[0]
    for number, other in enumerate(factors[1:], 1):
        if other.base != first.base:
            raise ValueError(
                f"factors 0 and {number} belong to parameters with other fingerprints, "
                f"{first.base:08x} and {other.base:08x}. Collect all at the same "
                "pre-trained parameters."
            )
        shapes = [
            jax.tree.map(jnp.shape, dataclasses.replace(f, sketch={}))
            for f in (first, other)
        ]
        # Sketches of different ranks can be joined, but all factors must have one.
        # Trees of shapes are `Factors` too, so layers and sharing must be equal.
        if shapes[0] != shapes[1] or other.sketch.keys() != first.sketch.keys():
            raise ValueError(
                f"factors 0 and {number} have other layers or leaves. Collect all with "
                "the same select, joint, sharing, rank and full_up_to."
            )


def _shares(weights, tasks):
    values = np.ones(tasks) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (tasks,) or not (values >= 0).all() or not values.sum() > 0:
        raise ValueError(
            f"weights are {values.tolist()}; expected {tasks} numbers of at least 0 "
            "with a positive sum."
        )
    return values / values.sum()


@jax.jit
def _mean(factors, shares):
    weighted = [
        jax.tree.map(
            lambda leaf, share=share: leaf * jnp.asarray(share, leaf.dtype),
            dataclasses.replace(f, sketch={}, samples=jnp.zeros(())),
        )
        for f, share in zip(factors, shares, strict=True)
    ]
    mean = jax.tree.map(lambda *leaves: tree.total(leaves), *weighted)
    return dataclasses.replace(
        mean, sketch=_sketch(factors, shares), samples=_samples(factors)
    )


def _samples(factors):
    return tree.total(f.samples for f in factors)


def _rows(factors, shares):
    """Returns the rows of all sketches, scaled so that their form is the mean."""
    parts = [
        {path: share**0.5 * part for path, part in f.sketch.items()}
        for f, share in zip(factors, shares, strict=True)
    ]
    return {path: jnp.concatenate([p[path] for p in parts]) for path in parts[0]}


@jax.jit
def _sketch(factors, shares):
    if not factors[0].sketch:
        return {}
    rank = max(len(next(iter(f.sketch.values()))) for f in factors)
    return sketch.compress(_rows(factors, shares), rank)


@jax.jit
def _side_by_side(factors, shares):
    mean = _mean(factors, shares)
    parts = [scaled(f, s) for f, s in zip(factors, shares, strict=True)]

    def joined(field):
        matrices = [getattr(f, field) for f in parts]
        return {
            name: jnp.concatenate([m[name] for m in matrices]) for name in matrices[0]
        }

    return dataclasses.replace(
        mean,
        inputs=joined("inputs"),
        outputs=joined("outputs"),
        divisors=joined("divisors"),
        sketch=_rows(factors, shares),
    )


def _nearest(terms, rows):
    names = [layer.name for layer in terms.layers]
    found = {
        name: _nearest_product(
            terms.inputs[name], terms.outputs[name], terms.divisors[name]
        )
        for name in names
    }
    return dataclasses.replace(
        terms,
        inputs={name: found[name][0][None] for name in names},
        outputs={name: found[name][1][None] for name in names},
        divisors={name: jnp.ones(1, found[name][0].dtype) for name in names},
        sketch=rows,
    )


@jax.jit
def _nearest_product(inputs, outputs, divisors):
    """Returns A and B of the Kronecker product that is nearest to the sum of K of them.

    A and B are linear combinations of the A and the B of the terms. So a problem of
    size K × K remains: alternating least squares with the inner products of the A and
    of the B. All inner products are at least 0, and so are the weights. So A and B stay
    positive semi-definite.
    """
    scale = 1 / jnp.where(divisors == 0, 1, divisors)
    outputs = outputs * scale[:, None, None]
    gram_a, gram_b = (
        jnp.einsum("kij,lij->kl", x, x, precision="highest") for x in (inputs, outputs)
    )

    def step(weights, _):
        a, b = weights
        a = gram_b @ b
        a = a / jnp.maximum(jnp.linalg.norm(a), jnp.finfo(a.dtype).tiny)
        b = gram_a @ a
        return (a, b / jnp.maximum(jnp.linalg.norm(b), jnp.finfo(b.dtype).tiny)), None

    ones = jnp.ones(len(divisors), inputs.dtype)
    (a, b), _ = jax.lax.scan(step, (ones, ones), length=100)
    nearest = [
        jnp.einsum("k,kij->ij", weights, x, precision="highest")
        for weights, x in ((a, inputs), (b, outputs))
    ]
    matched = (gram_a @ a) @ (gram_b @ b)
    square = (a @ gram_a @ a) * (b @ gram_b @ b)
    return nearest[0], matched / jnp.where(square == 0, 1, square) * nearest[1]
