r"""DC-Merge: TIES on the cores of the tasks, between bases that cover all tasks.

Zhang, Zhou, Luo, Di, Zhang, Wei. DC-Merge: Improving Model Merging with Directional
Consistency. CVPR 2026. arXiv:2603.06242.

Every matrix :math:`\tau_t = U_t \Sigma_t V_t^\top` keeps the top :math:`k = \lfloor r/T
\rfloor` of its :math:`r` triplets. Their singular values may be smoothed to
:math:`\tilde\Sigma_t`. As in TSV-Merge, the bases :math:`U, V` are the orthogonal
matrices nearest to :math:`[U_1 \dots U_T]` and :math:`[V_1 \dots V_T]`, and

.. math:: M_t = U^\top U_t \tilde\Sigma_t V_t^\top V, \qquad
          \tau = U\, \big(B \odot \operatorname{TIES}(M_1, \dots, M_T)\big)\, V^\top.

TIES keeps the largest entries of every core :math:`M_t`, [Tk, Tk], takes the sign of
their sum, and averages those that agree with it. B is 1 in the T diagonal blocks [k, k]
and 0 outside. Other leaves are averaged.

The authors' code for full fine-tuning does not smooth the singular values; their code
for LoRA smooths those of rank 16. Two points differ here. An entry of a core that is
zero up to rounding counts as zero. Otherwise it would join the mean and halve the entry
of another task. And singular values that are zero up to rounding stay zero when the
others are smoothed.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, _matrices
from jaxarith.merge.ties import agreeing
from jaxarith.typing import Coef, Params, Taus

Smoothing = Literal["none", "average", "linear"]


def dc_merge(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 1.0,
    smoothing: Smoothing = "none",
    ratio: float = 5.0,
    keep: float = 0.001,
    matrices: str | None = None,
) -> Params:
    """Merges task vectors by DC-Merge.

    Gradients treat the singular vectors as constants.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      coef: the coefficient of the merged vector: one number, or one by path. The
        authors choose it on validation data.
      smoothing: how to smooth the k singular values of a task; their sum stays. "none"
        keeps them, as the authors do after full fine-tuning. "average" sets all to
        their mean. "linear" puts them on a line from the first to the last. For LoRA
        the authors take the better one: linear on ViT-B/32, average on ViT-B/16 and
        ViT-L/14.
      ratio: for "linear", the ratio ρ ≥ 1 of the first to the last smoothed value. If
        the ratio of the singular values is smaller, that one is used.
      keep: the share of entries of every core that TIES keeps, in (0, 1], at least one
        entry. If Tk < 1/(keep·T), that is fewer than the k singular values of a task.
        The default is for matrices of a few hundred rows and columns.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose.
        The others are averaged, and so are matrices with fewer singular values than
        tasks. None decomposes all; the authors leave out `text_projection`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `smoothing`, `ratio` or `keep` out of range, `matrices`
        matches none of the 2-D leaves, several coefficients, no task vector, one that
        does not fit, or non-finite values.

    Example:
      >>> diagonals = jnp.array([[3.0, 1, 0, 0], [0, 0, 4, 2]])
      >>> taus = [{"w": jnp.diag(diagonal)} for diagonal in diagonals]
      >>> merged = dc_merge({"w": jnp.zeros((4, 4))}, taus, smoothing="average", keep=1)
      >>> print(jnp.diag(merged["w"]))
      [2. 2. 3. 3.]
    """
    _leaves.one_of(smoothing, Smoothing, "smoothing")
    if not ratio >= 1:
        raise ValueError(f"ratio is {ratio}; it must be 1 or more.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it must be in (0, 1].")
    _leaves.check(params_0, taus)
    coef = _leaves.vector_coef(coef, taus)
    are_matrices = _matrices.which(tree.aligned(taus), matrices)
    ratios = {"none": None, "average": 1.0, "linear": ratio}
    return _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        are_matrices,
        coef,
        ratio=ratios[smoothing],
        keep=keep,
    )


@_leaves.leaf_function(static=("is_matrix", "ratio", "keep"), whole=True)
def _merge_leaf(leaf_0, taus, is_matrix, coef, ratio, keep):
    rank = min(leaf_0.shape) // len(taus) if is_matrix else 0
    if not rank:
        return leaf_0 + coef * (sum(taus) / len(taus))

    def leading(tau):
        u, s, vt = _matrices.svd(tau)
        s = s[:rank]
        return u.T[:rank], s if ratio is None else smoothed(s, ratio), vt[:rank]

    # One task at a time, so that memory holds the workspace of one decomposition.
    parts = jax.lax.map(leading, jnp.stack(taus))
    u, v = (_matrices.polar(x.reshape(-1, x.shape[-1])) for x in (parts[0], parts[2]))

    def trimmed(part):
        ut, s, vt = part
        core = _matrices.dot(_matrices.dot(u, ut.T) * s[None], _matrices.dot(vt, v.T))
        return _largest(core, keep)

    kept, _ = agreeing(list(jax.lax.map(trimmed, parts)), 0)
    count = sum(entry != 0 for entry in kept)
    owner = jnp.arange(len(u)) // rank
    in_blocks = owner[:, None] == owner[None]
    core = jnp.where(in_blocks, sum(kept) / jnp.maximum(count, 1), 0)
    return leaf_0 + coef * _matrices.dot(_matrices.dot(u.T, core), v)


def smoothed(s: jax.Array, ratio: float) -> jax.Array:
    """Puts falling singular values on a line with the same sum; zeros stay zero.

    Args:
      s: singular values, `[k]`.
      ratio: the largest ratio of the first value to the last one that is not zero.

    Example:
      >>> print(smoothed(jnp.array([8.0, 2.0, 2.0]), 3.0))
      [6. 4. 2.]
    """
    count = jnp.sum(s > 0)
    last = jnp.min(s, where=s > 0, initial=s[0])
    first = jnp.minimum(ratio, s[0] / jnp.where(last > 0, last, 1))
    steps = jnp.arange(len(s)) / jnp.maximum(count - 1, 1)
    line = jnp.where(s > 0, first + (1 - first) * steps, 0)
    total = jnp.sum(line)
    return jnp.sum(s) * line / jnp.where(total > 0, total, 1)


def _largest(core, keep):
    """Returns the matrix with only its largest entries, and those equal to them."""
    sizes = jnp.abs(jax.lax.stop_gradient(core))
    largest, _ = jax.lax.top_k(sizes.reshape(-1), max(int(keep * sizes.size), 1))
    noise = 16 * jnp.finfo(sizes.dtype).eps * largest[0]
    return jnp.where(sizes >= jnp.maximum(largest[-1], noise), core, 0)
