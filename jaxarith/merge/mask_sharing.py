r"""Mask sharing: one mask for all tasks of a cluster.

.. math:: \bar\gamma = \mathrm{round}\Big(\frac{1}{N}\sum_{i\in C}\gamma_i\Big),
          \qquad N = |C|.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. Section 6.4.

The masks come from localize-and-stitch. `localize_and_stitch` merges the model with the
shared masks. For each cluster it needs one mask and one masked vector.
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
    """Replaces the masks of each cluster by one mask, decided by majority.

    The shared mask has the entries that most masks of the cluster have.

    Args:
      masks: T trees of `bool` with the structures of the task vectors. A missing leaf
        counts as False.
      clusters: a partition of `range(T)`, as for `bases`.
      half: whether to keep entries that exactly half of the masks have. The paper's
        densities need True; `localize_and_stitch.rounded` says why.

    Returns:
      T masks, each with the structure of the mask that it replaces. Tasks of a cluster
      share the same arrays.

    Raises:
      ValueError: the clusters are not a partition of the tasks, leaves of one path
        differ in shape, or a leaf is not `bool`.

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
