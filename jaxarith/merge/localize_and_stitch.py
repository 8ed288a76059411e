r"""Localize-and-stitch: a sparse mask for every task vector, and their masked sum.

A mask is found by gradient descent on S, from ±b, and rounding (Algorithm 1):

.. math:: S_t = \arg\min_S\; \ell_t(\theta_0 + \sigma(S)\odot\tau_t) +
          \lambda\|\sigma(S)\|_1, \qquad \gamma_t = \mathrm{round}(\sigma(S_t)),

or, without data, it covers the entries of the largest magnitude. Stitching averages the
task vectors over the tasks whose masks overlap:

.. math:: \theta = \theta_0 + \sum_t \frac{\gamma_t}{\sum_u\gamma_u}\odot\tau_t .

He, Hu, Lin, Zhang, Zhao. Localize-and-Stitch: Efficient Model Merging via Sparse Task
Arithmetic. TMLR 2025. arXiv:2408.13656.

The authors' code regularises in the other direction: it moves S away from zero on
either side, by a strength that its learning rate does not scale.
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
      taus: T task vectors. A leaf that one lacks counts as zero.
      masks: T trees of `bool` with leaves of the task vectors, from `localize`; an
        absent leaf is False. None is the method without data: the masks cover the
        largest entries.
      density: without masks, the share of entries of every vector that is kept, in
        (0, 1]: the ⌊density · d⌋ of the largest magnitudes over all leaves, fewer if
        the last of them are equal to the next. The authors' code takes 0.05.
      coef: the coefficient of the stitched vector: one number, or one by path. The
        paper has none.

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
    r"""The mask of one task vector, learned from labelled samples.

    An epoch is one step: with :math:`g = \sum_\text{batches} \partial\ell/\partial
    \theta \odot \tau`, S loses :math:`\sigma'(S)\,\eta\,(g + \lambda)`.

    Args:
      loss_fn: `loss(params, batch) -> scalar`, the mean over the batch. Pass the same
        function again to keep its compilation.
      params_0: pre-trained parameters.
      tau: the task vector. Leaves that it lacks are not masked; `tree.select` leaves
        out what the mask should not cover.
      batches: the batches of an epoch; they are iterated over once per epoch. As in the
        authors' code their gradients are summed, not averaged.
      density: the share of entries, those of the largest magnitudes, whose S starts at
        +bias. The others start at -bias.
      epochs: the number of steps.
      learning_rate: η. It is large because σ'(±5) is small, and so are task vectors.
      l1: the weight λ. The paper's reading with λ η = 1 is the authors' strength for
        vision; theirs for language is 10.
      regularizer: "paper" adds λ to g, towards sparsity; "official" subtracts λ sgn(S),
        which holds every entry on its side.
      bias: b, the magnitude of S at the start.

    Returns:
      A tree of `bool` with the structure of `tau`.

    Raises:
      ValueError: an unknown regularizer, `density` out of range, no batch, or a task
        vector that does not fit.
      FloatingPointError: a loss is not finite; the message names the epoch.

    Example:
      >>> def loss(params, batch):  # the second entry of the task vector does harm
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
                raise ValueError(f"no batch in epoch {epoch}; give a sequence.")
            mean = np.mean(jax.device_get(losses))
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} in epoch {epoch}.")
            logits = _descend(
                logits, tree.flatten(tau), gradient, learning_rate, l1, regularizer
            )
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()
    # round(σ(S)); half goes to even, so an entry with S = 0 is not kept.
    return tree.map_with_path(lambda path, _: logits[path] > 0, tau)


def _thresholds(taus, density):
    """The magnitude `[T]` above which the ⌊density · d⌋ largest entries are."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    return trim_thresholds(tree.aligned(taus), density)


def _mask_rows(masks, taus):
    """`masks` by the paths of the task vectors: tuples of a leaf of every task."""
    _leaves.one_each(masks, len(taus), "masks")
    check_bool(masks)
    for i, (mask, tau) in enumerate(zip(masks, taus, strict=True)):
        tree.check_part(mask, tau, f"mask {i}", f"task vector {i}")
    rows = tree.aligned(masks)
    return {path: rows.get(path, (False,) * len(taus)) for path in tree.aligned(taus)}


def check_bool(masks: Sequence[Tree]) -> None:
    """Raises a ValueError, with the path, for a mask with a leaf that is not `bool`."""
    for i, mask in enumerate(masks):
        for path, leaf in tree.flatten(mask).items():
            if jnp.result_type(leaf) != jnp.bool_:
                raise ValueError(
                    f"mask {i} has {jnp.result_type(leaf)} at {path}; expected bool."
                )


def rounded(part: Number, whole: Number, *, half: bool) -> Array:
    """The printed round(part / whole) of the masks of the bases paper, as `bool`.

    Mask sharing and stitch twice print the same round, and the densities of the paper's
    Table 8 need two readings of 1/2. Localize-and-stitch has 10.9 %. Mask sharing has
    11.6 %, more than that, so it keeps entries that half of a cluster's masks have; the
    authors' first code does too (mean >= 0.5). Stitch twice has 7.93 %, less than that,
    so an entry that two masks share is dropped: round(0.5) is 0 in NumPy and PyTorch.

    Args:
      part: integers from 0 to `whole`; integers so that a half is exact.
      whole: integers. Where it is 0 the result is False if `half` is False.
      half: whether 1/2 becomes 1.

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
    # `>`, as in Algorithm 1: a vector's zeros are never of its largest entries, and
    # would count as overlap.
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
        # Outwards for "official"; its code counts zero as negative.
        pull = 1 if regularizer == "paper" else jnp.where(s > 0, -1, 1)
        slope = jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)
        step = learning_rate * gradient[path] * tau[path] + learning_rate * l1 * pull
        return (s - slope * step).astype(s.dtype)

    return {path: leaf(path, s) for path, s in logits.items()}
