"""Other forms of factors: diagonal blocks, and the eigenbasis."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxarith.curvature.factors import (
    EigenFactors,
    Factors,
    check_kronecker,
    penalty,
    scaled,
)


def block_diagonal(factors: Factors, blocks: int) -> Factors:
    """Returns only the diagonal blocks of factors.

    They need `1 / blocks` of the memory, of the file and of the penalty's time.
    Porrello et al. (2026), Figure 7, lose about a point of accuracy with 8 blocks.

    Args:
      factors: whole factors.
      blocks: number of blocks of each matrix; the last block may be smaller.

    Returns:
      `Factors` whose matrices are `[K, blocks, s, s]`. Merge factors before.

    Raises:
      ValueError: `blocks` is less than 1, or the factors have blocks already or are in
        an eigenbasis.

    Example:
      >>> block_diagonal(factors, 8)  # doctest: +SKIP
    """
    check_kronecker(factors)
    if blocks < 1:
        raise ValueError(f"blocks is {blocks}; it must be at least 1.")

    def cut(matrices):
        if matrices.ndim != 3:
            raise ValueError("these factors have blocks already; cut whole factors.")
        count, size, _ = matrices.shape
        n = min(blocks, size)
        width = -(-size // n)
        padding = n * width - size
        filled = jnp.pad(matrices, ((0, 0), (0, padding), (0, padding)))
        grid = filled.reshape(count, n, width, n, width)
        diagonal = jnp.arange(n)
        return jnp.moveaxis(grid[:, diagonal, :, diagonal], 0, 1)

    return dataclasses.replace(
        factors,
        inputs=jax.tree.map(cut, factors.inputs),
        outputs=jax.tree.map(cut, factors.outputs),
    )


def calibrate(factors: Factors) -> Factors:
    r"""Scales the blocks so that they agree with the sketch along its directions.

    Blocks by layer leave out the terms between layers. For vectors that move all
    layers, their form is only a fraction of the exact form. Along the directions q of
    the sketch the exact values are known. The blocks are multiplied by the ratio of the
    sum of the exact values :math:`q^\top G q` to the sum of their own values. Then a
    weight of the penalty means the same as for the exact form.

    Args:
      factors: factors with a sketch. Merge several tasks first.

    Returns:
      `Factors` with scaled blocks and the same sketch.

    Raises:
      ValueError: the factors have no sketch, or are in an eigenbasis.

    Example:
      >>> found = collect(  # doctest: +SKIP
      ...     apply_fn, params_0, batches, key=key, rank=32
      ... )
      >>> calibrate(found)  # doctest: +SKIP
    """
    check_kronecker(factors)
    if not factors.sketch:
        raise ValueError(
            "these factors have no sketch to calibrate them with; call collect with a "
            "rank, for example rank=32."
        )
    return _calibrated(factors)


@jax.jit
def _calibrated(factors):
    blocks = dataclasses.replace(factors, sketch={})
    squares = sum(
        jnp.sum(rows.reshape(len(rows), -1) ** 2, axis=1)
        for rows in factors.sketch.values()
    )
    own = jax.vmap(lambda row: penalty(row, blocks))(factors.sketch)
    ratio = jnp.sum(squares) / jnp.sum(own / jnp.where(squares == 0, 1, squares))
    return dataclasses.replace(scaled(blocks, ratio), sketch=factors.sketch)


def eigen(factors: Factors) -> EigenFactors:
    """Returns the same curvature in the eigenbasis of its factors, for `correct`.

    Source: George et al. 2018 (see `EigenFactors`).

    Args:
      factors: factors with one Kronecker term, in whole matrices. Merge several tasks
        first.

    Returns:
      `EigenFactors`. Before `correct`, its form is the same as that of `factors`.

    Raises:
      ValueError: the factors have several terms, have blocks, or are in an eigenbasis.

    Example:
      >>> found = correct(  # doctest: +SKIP
      ...     apply_fn, params_0, batches, eigen(factors), key=key
      ... )
    """
    check_kronecker(factors)
    parts = {"inputs": {}, "outputs": {}, "eigenvalues": {}}
    for name, a in factors.inputs.items():
        b = factors.outputs[name]
        if a.ndim != 3 or len(a) > 1:
            raise ValueError(
                f"the factors of {name} have shape {list(a.shape)}; an eigenbasis "
                "needs one whole matrix, [1, n, n]. Merge the tasks first, by mean or "
                "nearest."
            )
        values_a, parts["inputs"][name] = jnp.linalg.eigh(a[0])
        values_b, parts["outputs"][name] = jnp.linalg.eigh(b[0])
        d = factors.divisors[name][0]
        values = jnp.outer(values_a, values_b) / jnp.where(d == 0, 1, d)
        parts["eigenvalues"][name] = jnp.maximum(values, 0)
    return EigenFactors(
        layers=factors.layers,
        base=factors.base,
        full=factors.full,
        diagonal=factors.diagonal,
        sketch=factors.sketch,
        samples=factors.samples,
        **parts,
    )
