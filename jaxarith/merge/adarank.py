r"""AdaRank: chooses singular directions of task vectors with unlabelled samples.

Lee, Choi, Lee, Kim, Hong. AdaRank: Adaptive Rank Pruning for Enhanced Model Merging.
ICLR 2026. arXiv:2503.22178.

.. math:: \theta_l = \theta_{0,l} + \sum_t \lambda_{t,l}\, U_{t,l} \operatorname{diag}(
          B_{t,l} \odot \sigma_{t,l}) V_{t,l}^\top, \qquad
          B = 1[\operatorname{sigmoid}(b / 10) > 1/2],

This formula holds for the matrices of attention and MLP; U, σ and V come from the
singular value decompositions of their task vectors. All other leaves are merged as in
AdaMerging. The coefficients λ and the scores b minimise the entropy of predictions, as
in AdaMerging. The gradient of b is computed with :math:`\operatorname{sigmoid}(b / 10)`
in place of B (straight through).

The published numbers adapt on the inputs of the *test* sets, and belong to the step
with the best accuracy on the test sets. Give batches of validation sets instead, and
evaluate the result of the last step, or of a step chosen on labelled validation data.

Where the paper says nothing, this follows the authors' code: Adam with learning rate
1e-3 for λ and b, no bounds for λ, and a batch of 16 samples per task and step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _blas, _leaves, _matrices
from jaxarith.merge.adamerging import (
    Batches,
    adam_step,
    adapted,
    batch_of,
    check_lists,
)
from jaxarith.merge.task_arithmetic import add_scaled
from jaxarith.typing import Coef, Params, Taus

Start = Literal["pretrained", "mean"]

# Matches the weights of attention and MLP in CLIP, GPT-2, BERT and T5, but not their
# position embeddings.
LAYERS = r"(?!.*(embed|relative)).*([aA]tt|mlp|[dD]ense).*"
_OF_AUTHORS = {"pretrained": (0.3, 1.0), "mean": (2.3, 0.16)}  # the authors' coef, rank
_TEMPERATURE = 10.0
_SCORE = 0.1  # first score of directions that are on; the others have -0.1


class AdaRank(NamedTuple):
    """A merged model, its coefficients, directions and losses.

    Attributes:
      params: the merged parameters.
      coefs: the coefficients λ, `{path: [T]}`.
      kept: B, whether a direction is kept, `{path: bool[T, r]}` for every matrix. The
        largest singular values come first.
      losses: the mean entropy of every task before every step, `[steps, T]`.
    """

    params: Params
    coefs: dict[str, jax.Array]
    kept: dict[str, jax.Array]
    losses: np.ndarray


def adarank(
    params_0: Params,
    taus: Taus,
    logits_fns: Sequence[Callable],
    batches: Sequence[Batches],
    *,
    start: Start = "pretrained",
    coef: Coef | None = None,
    rank: float | None = None,
    steps: int = 10_000,
    learning_rate: float = 1e-3,
    matrices: str | None = LAYERS,
) -> AdaRank:
    """Learns coefficients and directions of task vectors by entropy minimisation.

    The matrices are decomposed once. The factors of all T vectors stay on the device in
    float32. They take twice the memory of the task vectors for square matrices, and
    1.25 times for those of an MLP. Memory also holds the other leaves of the task
    vectors, the merged model and two of its gradients. A step merges once, which takes
    T products of factors. Its gradient takes as many. All tasks share both.

    With the default learning rate no direction changes in about the first 100 steps,
    because scores start at 0.1 and -0.1, and a step of Adam is about 0.001.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      logits_fns: for each task, `logits_fn(params, batch) -> logits [B, classes]`, as
        for `adamerging`. Pass the same function objects again, so that JAX does not
        compile them again.
      batches: for each task, unlabelled batches, as for `adamerging`. Take them from
        validation data, not from test data.
      start: "pretrained" uses the formula above. "mean" replaces θ_0 by the mean of the
        fine-tuned models, and each task vector by its difference from their mean, as in
        CART.
      coef: the initial λ: one number, one per task `[T]`, or either by path. None takes
        the authors' value for 8 tasks: 0.3, or 2.3 with start="mean". They use 0.05 for
        20 tasks.
      rank: the share of the directions of a matrix that are on at first, in (0, 1].
        They have the largest singular values; at least one is on. None takes 1, or 0.16
        with start="mean".
      steps: number of steps of Adam.
      learning_rate: learning rate of Adam.
      matrices: a regular expression for the whole paths of the 2-D leaves to decompose,
        by default those of attention and MLP. None decomposes all 2-D leaves.

    Returns:
      Parameters with the structure and dtypes of `params_0`, the coefficients, the
      directions that are kept, and the losses.

    Raises:
      ValueError: an unknown `start`, `rank` out of range, a wrong number of functions,
        batches or coefficients, `matrices` matches none of the 2-D leaves, or task
        vectors that cannot be merged.
      FloatingPointError: an entropy is not finite; the message names step and task.

    Example:
      >>> def logits_fn(params, batch):
      ...     return batch["x"] @ params["mlp"]
      >>> batch = {"x": jnp.eye(2)}
      >>> taus = [{"mlp": jnp.array([[9.0, 0.0], [0.0, 9.0]])}]
      >>> merged = adarank(
      ...     {"mlp": jnp.zeros((2, 2))}, taus, [logits_fn], [[batch]], steps=50
      ... )
      >>> print(merged.coefs["mlp"].round(2), merged.kept["mlp"])
      [0.35] [[ True  True]]
    """
    import optax  # here, so that `import jaxarith` stays light

    _leaves.check(params_0, taus)
    _leaves.one_of(start, Start, "start")
    check_lists(len(taus), logits_fns=logits_fns, batches=batches)
    own_coef, own_rank = _OF_AUTHORS[start]
    coef = own_coef if coef is None else coef
    rank = own_rank if rank is None else rank
    if not 0 < rank <= 1:
        raise ValueError(f"rank is {rank}; it must be in (0, 1].")
    coefs = _leaves.task_coefs(coef, taus)
    rows = tree.aligned(taus)
    running = [path for path in rows if _leaves.is_running(path)]
    are_matrices = _matrices.which(rows, matrices)
    parts = {
        path: _parts(tree.gathered(rows[path]), are_matrices[path], start)
        for path in rows
        if path not in running
    }
    # Running statistics are averaged once, before the steps.
    base = _leaves.fold(add_scaled, params_0, {path: rows[path] for path in running})
    raw: Any = (
        {path: _leaves.at(coefs, path) for path in parts},
        {
            path: _scores(part, rank) if are_matrices[path] else None
            for path, part in parts.items()
        },
    )
    origin = jax.device_put(base)  # moved to the device once, not in every step

    def step_of(state, step):
        params = _merge(origin, parts, *state[0])
        gradient, entropies = _zeros(params, parts), []
        for logits_fn, source in zip(logits_fns, batches, strict=True):
            # The function takes the sum and returns it, so a task waits for the
            # previous one.
            batch = batch_of(source, step)
            value, gradient = _add_gradient(logits_fn, params, batch, gradient)
            entropies.append(value)
        slopes = _slopes(gradient, parts, *state[0])
        return adam_step(state, slopes, learning_rate, None), entropies

    state = raw, optax.adam(learning_rate).init(raw)
    (raw, _), losses = adapted(step_of, state, steps, len(taus), "AdaRank")
    coefs, scores = raw
    params = _leaves.fold(_merge_leaf, base, parts, coefs, scores)
    kept = {path: own > 0 for path, own in scores.items() if own is not None}
    return AdaRank(params, coefs, kept, losses)


def _parts(row, is_matrix, start):
    """Returns the parts from which a leaf is merged, in float32 or better.

    The first part is added to `params_0` for all coefficients. The others are the
    vectors of all tasks, or, for a matrix, U·σ `[T, m, r]` and Vᵀ `[T, r, n]`.
    """
    row = tuple(_leaves.widened(tau) for tau in row)
    mean = jnp.zeros((), row[0].dtype)
    if start == "mean":
        mean = sum(row) / len(row)
        row = tuple(tau - mean for tau in row)
    if not is_matrix:
        return mean, *row
    with _blas.limited(row):
        return mean, *tree.settled(_factors(row))


@jax.jit
def _factors(row):
    def factors(tau):
        u, s, vt = _matrices.svd(tau)
        return u * s[None], vt

    # One task at a time, so that memory holds the workspace of one decomposition.
    return jax.lax.map(factors, jnp.stack(row))


def _scores(part, rank):
    """Returns the initial scores b, `[T, r]`."""
    _, left, _ = part
    tasks, _, directions = left.shape
    on = np.arange(directions) < max(int(rank * directions), 1)
    scores = jnp.where(on, _SCORE, -_SCORE).astype(left.dtype)
    return jnp.broadcast_to(scores, (tasks, directions))


@jax.jit
def _merge(params_0, parts, coefs, scores):
    return _leaves.fold(_merge_leaf, params_0, parts, coefs, scores)


@_leaves.leaf_function
def _merge_leaf(leaf_0, parts, coefs, scores):
    mean, *vectors = parts
    if scores is None:
        return add_scaled(leaf_0 + mean, vectors, coefs)
    left, right = vectors
    weights = coefs[:, None] * (scores > 0)
    moves = jnp.einsum(
        "tmr,trn->mn", left * weights[:, None], right, precision="highest"
    )
    return leaf_0 + mean + moves


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add_gradient(logits_fn, params, batch, total):
    """Returns the mean entropy of a batch, and `total` plus its gradient, by path."""
    from jaxarith import losses

    def mean_entropy(part):
        logits = logits_fn(tree.update(params, part), batch)
        return losses.entropy(logits, mask=batch.get("mask"))

    part = tree.restrict(params, total)  # leaves that no task moved need no gradient
    value, gradient = jax.value_and_grad(mean_entropy)(part)
    slopes = tree.flatten(gradient)
    return value, {
        path: own + slopes[path].astype(own.dtype) for path, own in total.items()
    }


def _zeros(params, parts):
    leaves = tree.flatten(params)
    return {
        path: jnp.zeros(leaves[path].shape, part[0].dtype)
        for path, part in parts.items()
    }


@jax.jit
def _slopes(gradient, parts, coefs, scores):
    """Returns the gradients in the coefficients and, straight through, the scores."""
    of_coefs, of_scores = {}, {}
    for path, slope in gradient.items():
        _, *vectors = parts[path]
        own = scores[path]
        if own is None:
            products = tree.sums([slope * tau for tau in vectors])
            of_coefs[path], of_scores[path] = products, None
            continue
        left, right = vectors
        # One product per task yields σ uᵀ G v for every direction.
        along = jnp.einsum("mn,trn->tmr", slope, right, precision="highest")
        products = jnp.sum(along * left, axis=1)
        soft = jax.nn.sigmoid(own / _TEMPERATURE)
        of_coefs[path] = jnp.sum(products * (own > 0), axis=1)
        chain = coefs[path][:, None] * soft * (1 - soft) / _TEMPERATURE
        of_scores[path] = products * chain
    return of_coefs, of_scores
