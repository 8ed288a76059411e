"""Fills up batches that devices and micro-batches do not divide, and weighs samples.

A batch of B samples is filled up to B' with copies of its first samples. A sample has
the weight B' / B, and a copy has the weight 0. So the mean of weight times value over
B', over the devices and over the micro-batches equals the mean of the values over B.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxarith import sharding
from jaxarith.typing import LossFn, Tree

# This field of a batch exists if some samples are copies.
WEIGHT = "padding_weight"


def filled(count: int, mesh: Mesh, micro_batches: int) -> int:
    """Returns the number of samples and copies that devices and micro-batches divide.

    Raises:
      ValueError: there are more micro-batches than samples on a device, so some
        micro-batches would hold only copies.
    """
    shards = sharding.batch_shards(mesh)
    if micro_batches > max(count // shards, 1):
        raise ValueError(
            f"{micro_batches} micro-batches of {count} samples per step on {shards} "
            f"devices; each device has {max(count // shards, 1)}. Use at most that "
            "many micro-batches."
        )
    return copied(count, mesh, micro_batches)


def copied(count: int, mesh: Mesh, micro_batches: int) -> int:
    """Like `filled`, but also accepts fewer samples than parts."""
    parts = sharding.batch_shards(mesh) * micro_batches
    return -(-count // parts) * parts


def weights(
    rows: np.ndarray, count: int, total: int, *, always: bool = False
) -> dict[str, np.ndarray]:
    """Returns the field of weights of some rows; empty if no sample is a copy.

    Args:
      rows: numbers of the rows, below `total`.
      count: the number of samples.
      total: the number of samples and copies.
      always: whether to return the field even if all weights are 1.

    Example:
      >>> print(weights(np.arange(4), 2, 4)[WEIGHT])
      [2. 2. 0. 0.]
      >>> weights(np.arange(4), 4, 4)
      {}
    """
    if count == total and not always:
        return {}
    return {WEIGHT: np.where(rows < count, total / count, 0).astype(np.float32)}


def loss(loss_fn: LossFn, outputs: Tree, batch: dict, constants: Tree) -> jax.Array:
    """Returns the loss of a batch without its copies.

    If there are copies, the loss is computed for every sample separately and averaged.
    A mean over samples stays the same. In a mean over tokens, every text then has the
    same weight.
    """
    if WEIGHT not in batch:
        return loss_fn(outputs, batch, constants)
    samples = {k: v for k, v in batch.items() if k not in (WEIGHT, "penalty")}

    def alone(outputs, sample):
        outputs, sample = jax.tree.map(lambda leaf: leaf[None], (outputs, sample))
        return loss_fn(outputs, sample, constants)

    return jnp.mean(batch[WEIGHT] * jax.vmap(alone)(outputs, samples))
