r"""EMR-Merging: elects one vector, then masks and rescales it for every task.

Huang, Ye, Chen, He, Yue, Ouyang. EMR-Merging: Tuning-Free High-Performance Model
Merging. NeurIPS 2024. arXiv:2405.17461.

.. math:: \gamma = \operatorname{sgn}\big(\textstyle\sum_t \tau_t\big), \quad
          \tau = \gamma \odot \max_t |\tau_t|\,[\tau_t \odot \gamma > 0], \quad
          M_t = [\tau_t \odot \tau > 0], \quad
          \lambda_t = \frac{\|\tau_t\|_1}{\|M_t \odot \tau\|_1},

and the model of task t is :math:`\theta_0 + \lambda_t M_t \odot \tau`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge._masked import Masked
from jaxarith.typing import Coef, Params, Taus

Preset = Literal["paper", "official"]


def emr(
    params_0: Params, taus: Taus, *, preset: Preset = "paper", coef: Coef = 1.0
) -> Params:
    """Adds the elected vector of EMR-Merging, without masks: one model for all tasks.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      preset: decides about entries whose sum is exactly zero. "paper" sets them to
        zero; "official", the authors' code, keeps their negative values.
      coef: the coefficient of the elected vector: one number, or one by path. The paper
        has none, because it uses the masks and rescalers of `emr_masks`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown preset, no task vector, one that does not fit, non-finite
        values, or several coefficients.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([2.0, -3.0])}]
      >>> print(emr({"w": jnp.zeros(2)}, taus)["w"])
      [ 4. -3.]
    """
    _leaves.one_of(preset, Preset, "preset")
    _leaves.check(params_0, taus)
    scale = _leaves.vector_coef(coef, taus)
    return _leaves.fold(_merge_leaf, params_0, taus, scale, official=preset != "paper")


@_leaves.leaf_function(static="official")
def _merge_leaf(leaf_0, taus, coef, official):
    return leaf_0 + coef * _elected(taus, official)[0]


def emr_masks(params_0: Params, taus: Taus, *, preset: Preset = "paper") -> Masked:
    """Returns the elected vector of EMR-Merging, and a mask and a rescaler per task.

    It takes one pass over the task vectors. The result is one vector and T bytes per
    entry, because a mask takes one byte.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      preset: "paper" takes the L1 norms over the whole vector, and sets entries whose
        sum is exactly zero to zero. "official", the authors' code, adds up the mean
        magnitudes of the tensors, so entries of small tensors count more. It keeps the
        negative values of entries whose sum is zero.

    Returns:
      The elected vector, the masks and the rescalers λ. A task with an empty mask has
      the rescaler 0.

    Raises:
      ValueError: an unknown preset, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([2.0, -3.0])}]
      >>> merged = emr_masks({"w": jnp.zeros(2)}, taus)
      >>> print(merged.tau["w"], merged.masks[0]["w"], merged.vector(0)["w"])
      [ 4. -3.] [ True False] [5. 0.]
    """
    _leaves.one_of(preset, Preset, "preset")
    _leaves.check(params_0, taus)
    official, start = preset == "official", tree.flatten(params_0)
    tau, masks, sums = {}, [{} for _ in taus], jnp.zeros((2, len(taus)))
    for path, row in tree.aligned(taus).items():
        unified, masks_of_leaf, sums_of_leaf = _elect(tree.gathered(row), official)
        tau[path] = tree.sharded_like(unified, start[path])
        for mask, of_leaf in zip(masks, masks_of_leaf, strict=True):
            mask[path] = tree.sharded_like(of_leaf, start[path])
        if size := row[0].size:
            sums = sums + sums_of_leaf / (size if official else 1)
    return Masked(tree.unflatten(tau), [*map(tree.unflatten, masks)], _ratios(sums))


@jax.jit(static_argnames="official")
def _elect(row, official):
    """Returns the elected leaf, the masks, and the L1 norms before and after.

    The norms are `[2, task]`.
    """
    row = [jnp.asarray(leaf, tree.wide_dtype(*row)) for leaf in row]
    unified, masks = _elected(row, official)
    before = [jnp.abs(leaf) for leaf in row]
    after = [jnp.where(mask, jnp.abs(unified), 0) for mask in masks]
    return unified, masks, tree.sums(before + after).reshape(2, len(row))


def _elected(row, official):
    """Returns the largest entries of the elected sign, and a mask for every task.

    A mask is True where the task has the elected sign.
    """
    total = sum(row)
    sign = jnp.where(total > 0, 1, -1) if official else jnp.sign(total)
    masks = [leaf * sign > 0 for leaf in row]
    magnitudes = [
        jnp.where(mask, jnp.abs(leaf), 0) for mask, leaf in zip(masks, row, strict=True)
    ]
    return sign * functools.reduce(jnp.maximum, magnitudes), masks


@jax.jit
def _ratios(sums):
    before, after = sums
    empty = after == 0
    return jnp.where(empty, 0, before / jnp.where(empty, 1, after))
