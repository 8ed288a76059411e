r"""Localize-and-stitch: a sparse mask for every task vector, and their masked sum.

Algorithm 1 finds a mask by gradient descent on S, which starts at ±b, and by rounding:

.. math:: S_t = \arg\min_S\; \ell_t(\theta_0 + \sigma(S)\odot\tau_t) +
          \lambda\|\sigma(S)\|_1, \qquad \gamma_t = \mathrm{round}(\sigma(S_t)),

Without data, the mask covers the entries with the largest magnitudes. Stitching
averages the task vectors over the tasks whose masks overlap:

.. math:: \theta = \theta_0 + \sum_t \frac{\gamma_t}{\sum_u\gamma_u}\odot\tau_t .

He, Hu, Lin, Zhang, Zhao. Localize-and-Stitch: Efficient Model Merging via Sparse Task
Arithmetic. TMLR 2025. arXiv:2408.13656.

The authors' code regularises in the other direction: it moves S away from zero on both
sides, with a strength that the learning rate does not scale.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.ties import trim_thresholds
from jaxarith.typing import Array, Coef, Number, Params, Taus, Tree

Regularizer = Literal["paper", "official"]


def localize_and_stitch(
    params_0: Params,
    taus: Taus,
    *,
    masks: Sequence[Tree] | None = None,
    density: float = 0.05,
    coef: Coef = 1.0,
) -> Params:
    """Adds the masked task vectors, averaged where masks overlap.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      masks: T trees of `bool` with leaves of the task vectors, from `localize`; a
        missing leaf counts as False. None uses the method without data: the masks cover
        the largest entries.
      density: share of entries that a mask covers if there is no data, in (0, 1]. It
        covers the ⌊density · d⌋ largest magnitudes over all leaves, or fewer if the
        last of them equal the next one. The authors' code uses 0.05.
      coef: the coefficient of the stitched vector: one number, or one by path. The
        paper has no such coefficient.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: `density` out of range, masks that do not fit the task vectors or are
        not `bool`, or task vectors that cannot be merged.

    Example:
      >>> taus = [{"w": jnp.array([4.0, 3.0, 0.1])}, {"w": jnp.array([2.0, 0.2, -5.0])}]
      >>> print(localize_and_stitch({"w": jnp.zeros(3)}, taus, density=0.7)["w"])
      [ 3.  3. -5.]
    """
    _leaves.check(params_0, taus)
    scale = _leaves.vector_coef(coef, taus)
    if masks is None:
        thresholds = _thresholds(taus, density)
        return _leaves.fold(_stitch_largest, params_0, taus, thresholds, scale)
    return _leaves.fold(_stitch, params_0, taus, _mask_rows(masks, taus), scale)


def localize(
    loss_fn: Callable[[Params, dict], jax.Array],
    params_0: Params,
    tau: Params,
    batches: Iterable[dict],
    *,
    density: float = 1e-5,
    epochs: int = 10,
    learning_rate: float = 1e7,
    l1: float = 1e-7,
    regularizer: Regularizer = "paper",
    bias: float = 5.0,
) -> Params:
    r"""Learns the mask of one task vector from labelled samples.

    One epoch is one step. With :math:`g = \sum_\text{batches} \partial\ell/\partial
    \theta \odot \tau`, a step subtracts :math:`\sigma'(S)\,\eta\,(g + \lambda)` from S.

    Source: He et al. 2024, Algorithm 1.

    Args:
      loss_fn: `loss(params, batch) -> scalar`, the mean over the batch. Pass the same
        function object again, so that JAX does not compile it again.
      params_0: pre-trained parameters.
      tau: the task vector. The mask covers only the leaves that it has; use
        `tree.select` to leave others out.
      batches: the batches of an epoch; every epoch iterates over them once. As in the
        authors' code their gradients are summed, not averaged.
      density: share of entries whose S starts at +bias: those with the largest
        magnitudes. The others start at -bias.
      epochs: number of epochs, and so of steps.
      learning_rate: η. It is large because σ'(±5) and task vectors are small.
      l1: the weight λ. With "paper", λ η = 1 is the authors' strength for vision; their
        strength for language is 10.
      regularizer: "paper" adds λ to g, towards sparsity. "official" subtracts λ sgn(S),
        which keeps every entry on its side of zero.
      bias: b, the magnitude of S at the start.

    Returns:
      A tree of `bool` with the structure of `tau`.

    Raises:
      ValueError: an unknown regularizer, `density` out of range, no batch, or a task
        vector that does not fit.
      FloatingPointError: a loss is not finite; the message names the epoch.

    Example:
      >>> def loss(params, batch):  # the second entry of the task vector is harmful
      ...     return jnp.sum((params["w"] - batch["goal"]) ** 2)
      >>> tau, batches = {"w": jnp.array([1.0, 1.0])}, [{"goal": jnp.array([1.0, 0.0])}]
      >>> print(localize(loss, {"w": jnp.zeros(2)}, tau, batches, density=1.0))
      {'w': Array([ True, False], dtype=bool)}
    """
    from tqdm import tqdm  # here, so that `import jaxarith` stays light

    _leaves.one_of(regularizer, Regularizer, "regularizer")
    _leaves.check(params_0, [tau])
    threshold = _thresholds([tau], density)[0]
    params_0, tau = jax.device_put((params_0, tau))  # once, not with every batch
    logits = _initial(tree.flatten(tau), threshold, bias)
    with tqdm(total=epochs, desc="localize", unit="epoch") as bar:
        for epoch in range(epochs):
            params = _graft(params_0, tau, logits)
            losses, gradient = [], jax.tree.map(jnp.zeros_like, logits)
            for batch in batches:
                loss, gradient = _add_gradient(loss_fn, params, batch, gradient)
                losses.append(loss)
            if not losses:
                raise ValueError(
                    f"found no batch in epoch {epoch}. Give a list of batches: a "
                    "generator is empty after the first epoch."
                )
            mean = np.mean(jax.device_get(losses))
            if not np.isfinite(mean):
                raise FloatingPointError(
                    f"the loss is {mean} in epoch {epoch}; expected a finite number. "
                    "Lower learning_rate, or check the data."
                )
            logits = _descend(
                logits, tree.flatten(tau), gradient, learning_rate, l1, regularizer
            )
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()
    # S > 0 is round(σ(S)). A half is rounded to even, so S = 0 is not kept.
    return tree.map_with_path(lambda path, _: logits[path] > 0, tau)


def _thresholds(taus, density):
    """Returns the magnitudes `[T]` that the ⌊density · d⌋ largest entries exceed."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    return trim_thresholds(tree.aligned(taus), density)


def _mask_rows(masks, taus):
    """Returns, for each path of the task vectors, the tuple of its masks."""
    _leaves.one_each(masks, len(taus), "masks")
    check_bool(masks)
    for i, (mask, tau) in enumerate(zip(masks, taus, strict=True)):
        tree.check_part(mask, tau, f"mask {i}", f"task vector {i}")
    rows = tree.aligned(masks)
    return {path: rows.get(path, (False,) * len(taus)) for path in tree.aligned(taus)}


def check_bool(masks: Sequence[Tree]) -> None:
    """Raises a ValueError with the path if a leaf of a mask is not `bool`."""
    for i, mask in enumerate(masks):
        for path, leaf in tree.flatten(mask).items():
            if jnp.result_type(leaf) != jnp.bool_:
                raise ValueError(
                    f"mask {i} has {jnp.result_type(leaf)} at {path}; expected bool. "
                    "Convert it, for example with mask > 0.5."
                )


def rounded(part: Number, whole: Number, *, half: bool) -> Array:
    """Returns round(part / whole) for the masks of the bases paper, as `bool`.

    The paper prints the same round for mask sharing and stitch twice. But the densities
    in its Table 8 need two ways to round 1/2. Localize-and-stitch has 10.9 %. Mask
    sharing has 11.6 %, which is more. So it keeps entries that half of a cluster's
    masks have, as the authors' first code does (mean >= 0.5). Stitch twice has 7.93 %,
    which is less. So it drops an entry that two masks share: round(0.5) is 0 in NumPy
    and PyTorch.

    Args:
      part: integers from 0 to `whole`. They are integers so that a half is exact.
      whole: integers. If `half` is False, the result is False where `whole` is 0.
      half: whether 1/2 is rounded to 1.

    Example:
      >>> half_and_more = jnp.array([0, 1, 2])
      >>> print(rounded(half_and_more, 2, half=True), rounded(1, 2, half=False))
      [False  True  True] False
    """
    twice = 2 * jnp.asarray(part)
    return twice >= whole if half else twice > whole


@_leaves.leaf_function
def _stitch(leaf_0, taus, masks, coef):
    covering = jnp.maximum(sum(jnp.asarray(mask, leaf_0.dtype) for mask in masks), 1)
    pairs = zip(masks, taus, strict=True)
    total = sum(jnp.where(mask, tau, 0) for mask, tau in pairs)
    return leaf_0 + coef * (total / covering)


@_leaves.leaf_function
def _stitch_largest(leaf_0, taus, thresholds, coef):
    # `>` as in Algorithm 1: the zeros of a vector are never among its largest entries.
    # With `>=` they would count as overlap.
    masks = [jnp.abs(tau) > t for tau, t in zip(taus, thresholds, strict=True)]
    return _stitch(leaf_0, taus, masks, coef)


@jax.jit
def _initial(leaves, threshold, bias):
    def logits(leaf):
        leaf = leaf.astype(tree.wide_dtype(leaf))
        return jnp.where(jnp.abs(leaf) > threshold, bias, -bias).astype(leaf.dtype)

    return {path: logits(leaf) for path, leaf in leaves.items()}


@jax.jit
def _graft(params_0, tau, logits):
    return _leaves.fold(_graft_leaf, params_0, [tau], logits)


@_leaves.leaf_function
def _graft_leaf(leaf_0, taus, logits):
    return leaf_0 + jax.nn.sigmoid(logits) * taus[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add_gradient(loss_fn, params, batch, total):
    part = tree.restrict(params, total)
    loss, gradient = jax.value_and_grad(
        lambda part: loss_fn(tree.update(params, part), batch)
    )(part)
    slopes = tree.flatten(gradient)
    return loss, {path: leaf + slopes[path] for path, leaf in total.items()}


@functools.partial(
    jax.jit, static_argnames=("learning_rate", "l1", "regularizer"), donate_argnums=0
)
def _descend(logits, tau, gradient, learning_rate, l1, regularizer):
    def leaf(path, s):
        # "official" moves S away from zero; the authors' code counts zero as negative.
        pull = 1 if regularizer == "paper" else jnp.where(s > 0, -1, 1)
        slope = jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)
        step = learning_rate * gradient[path] * tau[path] + learning_rate * l1 * pull
        return (s - slope * step).astype(s.dtype)

    return {path: leaf(path, s) for path, s in logits.items()}
