r"""Mask sharing: one mask for all tasks of a cluster.

.. math:: \bar\gamma = \mathrm{round}\Big(\frac{1}{N}\sum_{i\in C}\gamma_i\Big),
          \qquad N = |C|.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. Section 6.4.

The masks are those of localize-and-stitch. `localize_and_stitch` with the shared masks
merges the model; of each cluster it needs one mask and one masked vector.
"""

from collections.abc import Sequence

import jax

from jaxarith import tree
from jaxarith.merge.bases import checked_partition
from jaxarith.merge.localize_and_stitch import check_bool, rounded
from jaxarith.typing import Tree


def mask_sharing(
    masks: Sequence[Tree], clusters: Sequence[Sequence[int]], *, half: bool = True
) -> list[Tree]:
    """Gives the tasks of a cluster the entries that most of their masks have.

    Args:
      masks: T trees of `bool` with the structures of the task vectors. A leaf that one
        lacks counts as False.
      clusters: a partition of `range(T)`, as of `bases`.
      half: whether entries are kept that exactly half of the masks have, as the paper's
        densities need; `localize_and_stitch.rounded` says why.

    Returns:
      T masks, each with the structure of its own; members of a cluster hold the same
      arrays.

    Raises:
      ValueError: the clusters are no partition of the masks, or leaves of one path
        differ in shape, or are not `bool`.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = [{"w": jnp.array(x, bool)} for x in ([1, 1, 0], [1, 0, 1], [0, 0, 1])]
      >>> print(mask_sharing(masks, [[0, 1], [2]], half=False)[1])
      {'w': Array([ True, False, False], dtype=bool)}
    """
    check_bool(masks)
    shared = [{} for _ in masks]
    for members in checked_partition(clusters, len(masks)):
        rows = tree.aligned([masks[i] for i in members])
        mask = {path: _majority(row, half) for path, row in rows.items()}
        for i in members:
            shared[i] = tree.map_with_path(lambda path, _, m=mask: m[path], masks[i])
    return shared


@jax.jit(static_argnames="half")
def _majority(row, half):
    count = sum(mask.astype(int) for mask in row)
    return rounded(count, len(row), half=half)
