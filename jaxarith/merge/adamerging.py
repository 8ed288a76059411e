r"""AdaMerging: finds the coefficients that make predictions on samples most certain.

.. math:: \theta_l = \theta_{0,l} + \sum_t \lambda_{t,l}\,\tau_{t,l}, \qquad
          \min_\lambda \sum_t \mathbb{E}_{x\sim t}\, H(f_t(x; \theta)),

H is the entropy of the predicted classes. The samples need no labels. l stands for a
parameter tensor (layer-wise) or for the whole model (task-wise).

Yang et al. AdaMerging: Adaptive Model Merging for Multi-Task Learning. ICLR 2024.
arXiv:2310.02575.

The published numbers adapt on the inputs of the *test* sets. Give batches of another
split, except to compare with those numbers.

Where the paper says nothing, this follows the authors' code: 500 steps of Adam with
learning rate 1e-3, initial coefficients 0.3, and coefficients clipped to [0, 1]. The
authors' code sums the mean entropies of two batches of 16 samples per task and step;
here a task has one batch per step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.task_arithmetic import add_scaled
from jaxarith.merge.ties import agreeing, majority_sign, trim, trim_thresholds
from jaxarith.typing import Coef, Params, Taus

# Functions import optax, losses and tqdm, so that `import jaxarith` stays light.

Scope = Literal["layer", "task"]
Batches = Sequence[dict] | Callable[[int], dict]


class AdaMerging(NamedTuple):
    """A merged model, its coefficients and its losses.

    Attributes:
      params: the merged parameters.
      coefs: the coefficients λ: `[T]`, or `{path: [T]}` if layer-wise. Without
        `density`, `params` equals `task_arithmetic(..., coef=coefs)`.
      losses: the mean entropy of every task before every step, `[steps, T]`.
    """

    params: Params
    coefs: jax.Array | dict[str, jax.Array]
    losses: np.ndarray


def adamerging(
    params_0: Params,
    taus: Taus,
    logits_fns: Sequence[Callable],
    batches: Sequence[Batches],
    *,
    scope: Scope = "layer",
    coef: Coef = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    density: float | None = None,
) -> AdaMerging:
    """Learns the coefficients of task arithmetic by entropy minimisation.

    A step merges once and then visits one task after another, so only the activations
    of one task are in memory. The network is differentiated with respect to its
    parameters, and the gradient with respect to λ is <∇L, τ_t>, leaf by leaf. Besides
    the task vectors, memory holds the merged model and one gradient of it, for any
    number of tasks.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      logits_fns: for each task, `logits_fn(params, batch) -> logits [B, classes]`, with
        -inf for classes that do not count. Pass the same function objects again, so
        that JAX does not compile them again.
      batches: for each task, unlabelled batches: a sequence, which is cycled, or a
        function of the step. `batch["mask"]`, `bool[B]`, is False for padding. Padding
        must be copies of real samples, as `data.pipeline.evaluation_batches` makes
        them. Zeros are not enough: a network that normalises them may be NaN there, and
        then its gradient is NaN.
      scope: "layer" for a coefficient per task and parameter tensor, "task" for a
        coefficient per task.
      coef: the initial λ: one number, or one per task `[T]`. If layer-wise, also
        either of them by path.
      steps: number of steps of Adam.
      learning_rate: learning rate of Adam.
      clamp: interval to which λ is clipped in the model; None does not clip, as in
        fusion_bench. As in the authors' code, λ outside the interval has no gradient.
      density: the share of entries that AdaMerging++ keeps, in (0, 1]; the paper uses
        0.2. Every vector is trimmed as in TIES and keeps its entries with the elected
        sign. None is AdaMerging.

    Returns:
      Parameters with the structure and dtypes of `params_0`, the coefficients, and the
      losses.

    Raises:
      ValueError: an unknown scope, a wrong number of functions, batches or
        coefficients, or task vectors that cannot be merged.
      FloatingPointError: an entropy is not finite; the message names step and task.

    Example:
      >>> def logits_fn(params, batch):
      ...     return batch["x"] @ params["w"]
      >>> batch = {"x": jnp.eye(2)}
      >>> taus = [{"w": jnp.array([[9.0, 0.0], [0.0, 9.0]])}]
      >>> merged = adamerging(
      ...     {"w": jnp.zeros((2, 2))}, taus, [logits_fn], [[batch]], steps=50
      ... )
      >>> print(merged.coefs["w"].round(2), merged.losses[0] > merged.losses[-1])
      [0.35] [ True]
    """
    import optax

    _leaves.check(params_0, taus)
    _leaves.one_of(scope, Scope, "scope")
    check_lists(len(taus), logits_fns=logits_fns, batches=batches)
    raw = _initial(coef, taus, scope)
    clamp = None if clamp is None else (clamp[0], clamp[1])
    election = None if density is None else _elect(taus, density)
    # The arrays are moved to the device once, not in every step.
    start, vectors = jax.device_put((params_0, tuple(taus)))

    def step_of(state, step):
        used = clip(state[0], clamp)
        params = _merge(start, vectors, used, election)
        gradient, entropies = jax.tree.map(jnp.zeros_like, used), []
        for logits_fn, source in zip(logits_fns, batches, strict=True):
            # The function takes the sum and returns it, so a task waits for the
            # previous one.
            batch = batch_of(source, step)
            value, gradient = _add_gradient(
                logits_fn, params, vectors, batch, election, gradient
            )
            entropies.append(value)
        return adam_step(state, gradient, learning_rate, clamp), entropies

    state = raw, optax.adam(learning_rate).init(raw)
    state, losses = adapted(step_of, state, steps, len(taus), "AdaMerging")
    used = clip(state[0], clamp)
    params = _leaves.fold(_merge_leaf, params_0, taus, used, *(election or ()))
    return AdaMerging(params, used, losses)


def adapted(
    step_of: Callable, state: Any, steps: int, tasks: int, name: str
) -> tuple[Any, np.ndarray]:
    """Runs some steps; returns the state, and all entropies `[steps, tasks]`.

    Args:
      step_of: `step_of(state, step) -> state, entropies`, with one entropy per task.
      state: the state before the first step.
      steps: the number of steps.
      tasks: the number of tasks.
      name: label of the progress bar.

    Raises:
      FloatingPointError: an entropy is not finite.
    """
    from tqdm import tqdm

    losses = []
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step in range(steps):
            state, entropies = step_of(state, step)
            losses.append(entropies)
            if step:  # reads the previous step while the device computes this one
                losses[-2] = _finite(losses[-2], step - 1)
                bar.set_postfix(entropy=f"{np.mean(losses[-2]):.4f}", refresh=False)
            bar.update()
    if losses:
        losses[-1] = _finite(losses[-1], steps - 1)
    return state, np.array(losses).reshape(-1, tasks)


def batch_of(source: Batches, step: int) -> dict:
    """Returns the batch of a step."""
    return source(step) if callable(source) else source[step % len(source)]


@functools.partial(jax.jit, static_argnums=0)
def _add_gradient(logits_fn, params, taus, batch, election, total):
    """Returns the mean entropy of a batch, and `total` plus its gradient in λ.

    Args:
      logits_fn: network of a task.
      params: the merged model.
      batch: samples of the task.
      taus: T task vectors.
      election: result of `_elect`, or None.
      total: `[T]`, or `{path: [T]}` if layer-wise.
    """
    from jaxarith import losses

    rows = tree.aligned(taus)
    dtype = jax.tree.leaves(total)[0].dtype

    def mean_entropy(part):
        logits = logits_fn(tree.update(params, part), batch)
        return losses.entropy(logits, mask=batch.get("mask"))

    part = tree.restrict(params, rows)  # leaves that no task moved need no gradient
    value, gradient = jax.value_and_grad(mean_entropy)(part)
    products = {}
    for path, slope in tree.flatten(gradient).items():
        row = [jnp.asarray(leaf, dtype) for leaf in rows[path]]
        own = row if election is None else _elected(row, *election)
        products[path] = tree.sums([slope.astype(dtype) * tau for tau in own])
    if not isinstance(total, dict):
        products = sum(products.values())
    return value, jax.tree.map(jnp.add, total, products)


@jax.jit
def _merge(params_0, taus, coefs, election):
    return _leaves.fold(_merge_leaf, params_0, taus, coefs, *(election or ()))


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, coefs, *election):
    return add_scaled(leaf_0, _elected(taus, *election) if election else taus, coefs)


def _elect(taus, density):
    """Returns the statistics for AdaMerging++: thresholds `[T]` and majority sign."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    rows = tree.aligned(taus)
    thresholds = trim_thresholds(rows, density)
    return thresholds, majority_sign(rows, thresholds)


def _elected(taus, thresholds, majority):
    """Returns the trimmed entries of every task that have the elected sign.

    The other entries are zero. Every step computes this again, because to store it
    would need a second copy of the vectors.
    """
    kept, _ = agreeing(trim(taus, thresholds), majority)
    return kept


@functools.partial(jax.jit, static_argnames=("learning_rate", "clamp"))
def adam_step(
    state: tuple[Any, Any],
    gradient: Any,
    learning_rate: float,
    clamp: tuple[float, float] | None,
) -> tuple[Any, Any]:
    """Takes a step of Adam.

    The step changes the coefficients before clipping; `gradient` is the gradient with
    respect to the clipped ones.
    """
    import optax

    raw, moments = state
    if clamp:
        low, high = clamp
        gradient = jax.tree.map(
            lambda g, c: jnp.where((c >= low) & (c <= high), g, 0), gradient, raw
        )
    updates, moments = optax.adam(learning_rate).update(gradient, moments)
    return optax.apply_updates(raw, updates), moments


def clip(raw: Any, clamp: tuple[float, float] | None) -> Any:
    """Returns the clipped coefficients, with which the model is merged."""
    return jax.tree.map(lambda c: jnp.clip(c, *clamp), raw) if clamp else raw


def _initial(coef, taus, scope):
    coefs = _leaves.task_coefs(coef, taus)
    if scope == "task":
        if isinstance(coefs, dict):
            raise ValueError(
                'coef is given by path, but scope is "task". Use scope="layer".'
            )
        return coefs
    if isinstance(coefs, dict):
        return coefs
    return {path: coefs for path in tree.aligned(taus)}


def check_lists(
    tasks: int, *, logits_fns: Sequence[Callable], batches: Sequence[Batches]
) -> None:
    """Raises a ValueError unless every task has a network and a batch."""
    _leaves.one_each(logits_fns, tasks, "logits_fns")
    _leaves.one_each(batches, tasks, "batches")
    for task, source in enumerate(batches):
        if not callable(source) and not len(source):
            raise ValueError(f"task {task} has no batch; give at least one.")


def _finite(entropies, step):
    values = np.array(jax.device_get(entropies))
    for task, value in enumerate(values):
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the entropy of task {task} is {value} at step {step}. Lower the "
                "learning rate, or look for bad samples in its batches."
            )
    return values
