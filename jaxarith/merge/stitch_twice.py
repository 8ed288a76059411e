r"""Stitch twice: removes the entries that masks share within a cluster, then stitches.

Localize-and-stitch normalises masks by their overlap. Stitch twice does so two times,
first within the clusters and then over all tasks:

.. math:: \gamma_i \leftarrow \mathrm{round}\Big(\frac{\gamma_i}{\sum_{j\in C}
          \gamma_j}\Big), \qquad \gamma_i \leftarrow \frac{\gamma_i}{\sum_{j\in[T]}
          \gamma_j}, \qquad \theta = \theta_0 + \sum_i \gamma_i\odot\tau_i .

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. Section 6.4.
"""

from collections.abc import Sequence

import jax

from jaxarith import tree
from jaxarith.merge.bases import checked_partition
from jaxarith.merge.localize_and_stitch import (
    check_bool,
    localize_and_stitch,
    rounded,
)
from jaxarith.typing import Params, Taus, Tree


def stitch_twice(
    params_0: Params,
    taus: Taus,
    *,
    masks: Sequence[Tree],
    clusters: Sequence[Sequence[int]],
) -> Params:
    """Merges by localize-and-stitch with masks that were first stitched in clusters.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      masks: T trees of `bool` with leaves of the task vectors, from `localize`; a
        missing leaf counts as False.
      clusters: a partition of `range(T)`, as for `bases`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: the clusters are not a partition, or as for `localize_and_stitch`.

    Example:
      >>> import jax.numpy as jnp
      >>> taus = [{"w": jnp.full(3, 2.0)}, {"w": jnp.full(3, 4.0)}]
      >>> masks = [{"w": jnp.array(mask, bool)} for mask in ([1, 1, 0], [0, 1, 1])]
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> print(stitch_twice(params_0, taus, masks=masks, clusters=[[0, 1]])["w"])
      [2. 0. 4.]
    """
    masks = stitched_masks(masks, clusters)
    return localize_and_stitch(params_0, taus, masks=masks)


def stitched_masks(
    masks: Sequence[Tree], clusters: Sequence[Sequence[int]]
) -> list[Tree]:
    """Returns the masks after the first of the two normalisations, rounded to `bool`.

    A mask keeps an entry only if no other mask of the cluster has it. A half is rounded
    down, as `localize_and_stitch.rounded` explains.
    """
    check_bool(masks)
    stitched = [{} for _ in masks]
    for members in checked_partition(clusters, len(masks)):
        rows = tree.aligned([masks[i] for i in members])
        alone = {path: _alone(row) for path, row in rows.items()}
        for n, i in enumerate(members):
            stitched[i] = tree.map_with_path(
                lambda path, _, n=n, alone=alone: alone[path][n], masks[i]
            )
    return stitched


@jax.jit
def _alone(row):
    masks = [mask.astype(int) for mask in row]
    total = sum(masks)
    return tuple(rounded(mask, total, half=False) for mask in masks)
