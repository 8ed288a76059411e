"""Outputs of edited models, and what is read off them.

Everything that varies coefficients (a search, a ξ grid, a curve) needs one thing: the
outputs on a dataset as a function of the coefficients of some task vectors. There are
two ways to get it. `forward` runs the network once per set of coefficients. `tangent`
runs it once in all: a linearised model is affine in the coefficients, so f(x; θ0) and
J(x; θ0)τ_t are cached and every later set of coefficients costs a weighted sum.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import metrics, sharding
from jaxarith import tangent as tangents
from jaxarith.merge import task_arithmetic
from jaxarith.tangent import ApplyFn
from jaxarith.tree import Tree, settled

# Coefficients [T] to outputs [N, …].
OutputsAt = Callable[[Sequence[float]], np.ndarray]


def outputs(
    apply_fn: ApplyFn,
    params: Tree,
    batches: Iterable[dict],
    inputs=("image",),
    *,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The model's outputs on every sample that is not padding.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [B, ...]`.
      params: its parameters.
      batches: dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them; they are read once, in order,
        so they may be a stream.
      inputs: the fields of a batch that are passed to `apply_fn`, in order.
      mesh: the devices that share every batch, see `sharding`; by default those that
        the parameters are on.

    Returns:
      `[N, ...]`, N being the number of True entries of all masks.
    """
    mesh = mesh or sharding.mesh_of(params)
    params = sharding.shard(params, mesh)  # once, not with every batch
    rows = [
        (settled(_apply(apply_fn, mesh, params, *_inputs(b, inputs, mesh))), _mask(b))
        for b in batches
    ]
    return np.concatenate([_unpadded(*row) for row in rows])


def _inputs(batch, inputs, mesh):
    return sharding.spread(tuple(batch[name] for name in inputs), mesh)


# Compiled once per model and shape, however many datasets and coefficients follow.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(apply_fn, mesh, params, *inputs):
    found = sharding.on_mesh(apply_fn, mesh)(params, *inputs)
    return sharding.constrain(found, mesh, P())  # every process reads all of it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jvps(apply_fn, mesh, params_0, taus, *inputs):
    apply_fn = sharding.on_mesh(apply_fn, mesh)
    found = tangents.jvps(apply_fn, params_0, taus, *inputs)
    return sharding.constrain(found, mesh, P())


@jax.jit
def _edit(params_0, taus, coefs):
    return task_arithmetic(params_0, taus, coef=coefs)


def _unpadded(rows, mask, axis=0):
    # A mask is as long as its batch; more rows than that filled up the devices.
    return np.compress(mask, np.asarray(rows), axis)


def _mask(batch):
    return np.asarray(batch["mask"], bool)  # integers would be taken for indices


def labels(batches: Sequence[dict]) -> np.ndarray:
    """The labels of every sample that is not padding, in the order of `outputs`."""
    return np.concatenate([np.asarray(b["label"])[_mask(b)] for b in batches])


def forward(
    apply_fn: ApplyFn,
    params_0: Tree,
    taus: Sequence[Tree],
    batches: Sequence[dict],
    inputs=("image",),
    *,
    mesh: Mesh | None = None,
) -> OutputsAt:
    r"""Outputs of :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)`; a pass per call."""
    mesh = mesh or sharding.mesh_of((params_0, tuple(taus)))
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)

    def at(coefs):
        params = _edit(params_0, taus, np.asarray(coefs, np.float32))
        return outputs(apply_fn, params, batches, inputs, mesh=mesh)

    return at


def sweep(
    apply_fn: ApplyFn,
    params_0: Tree,
    taus: Sequence[Tree],
    batches: Iterable[dict],
    coefs: Sequence[Sequence[float]],
    inputs=("image",),
    *,
    mesh: Mesh | None = None,
    readout: Callable[[jax.Array], jax.Array] = lambda found: found,
) -> np.ndarray:
    r"""Outputs of :math:`f(x; \theta_0 + \sum_t \lambda_t\tau_t)` at many coefficients.

    Every device computes other coefficients, on all samples: n passes take the time of
    n over the number of devices. Each holds the whole model and all task vectors, and
    no device waits for another, whatever axes the mesh has.

    Args:
      apply_fn, params_0, taus, batches, inputs: as for `forward`.
      coefs: n sets of coefficients, `[n, T]`, such as the points of a ξ grid.
      mesh: the devices; by default all.
      readout: what is kept of the outputs `[B, ...]` of a batch, such as the predicted
        labels; all outputs of all coefficients may be more than the host can hold.

    Returns:
      `[n, N, ...]`.

    Raises:
      ValueError: `coefs` is not `[n, T]`.

    Example:
      >>> f = lambda params, x: params["w"] * x
      >>> batch = {"image": np.ones(1, np.float32), "mask": np.ones(1, bool)}
      >>> start, tau = {"w": np.float32(1)}, {"w": np.float32(2)}
      >>> print(sweep(f, start, [tau], [batch], [[0.0], [0.5], [1.0]]).T)
      [[1. 2. 3.]]
    """
    coefs = np.asarray(coefs, np.float32)
    if coefs.ndim != 2 or coefs.shape[1] != len(taus) or not len(coefs):
        raise ValueError(
            f"coefficients of shape {list(coefs.shape)} for {len(taus)} task vectors; "
            "expected [n, T]."
        )
    mesh = mesh or sharding.make_mesh()
    whole = NamedSharding(mesh, P())
    params_0, taus = sharding.put((params_0, tuple(taus)), whole)
    # A program has room for a power of two of points on every device, of which it
    # computes the first `each`: few programs serve sweeps of all lengths.
    each = -(-len(coefs) // mesh.size)
    room = max(8, 1 << (each - 1).bit_length())
    place = np.arange(len(coefs))
    place = place // each * room + place % each
    padded = np.zeros((mesh.size * room, len(taus)), np.float32)
    padded[place] = coefs
    padded = sharding.put(padded, NamedSharding(mesh, P(mesh.axis_names)))
    rows = []
    for batch in batches:
        fields = sharding.put(tuple(batch[name] for name in inputs), whole)
        found = _at_all(apply_fn, readout, mesh, params_0, taus, each, padded, *fields)
        rows.append(_unpadded(found, _mask(batch), axis=1)[place])
    return np.concatenate(rows, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _at_all(apply_fn, readout, mesh, params_0, taus, each, coefs, *inputs):
    def own(coefs, params_0, taus, each, *inputs):
        @jax.jit  # traced once, for its shape and for the loop
        def at(coefs):
            params = task_arithmetic(params_0, taus, coef=coefs)
            return readout(apply_fn(params, *inputs))

        one = jax.eval_shape(at, coefs[0])
        nothing = jnp.zeros((len(coefs), *one.shape), one.dtype)
        return jax.lax.fori_loop(
            0, each, lambda i, found: found.at[i].set(at(coefs[i])), nothing
        )

    found = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(P(mesh.axis_names), *[P()] * (3 + len(inputs))),
        out_specs=P(mesh.axis_names),
        check_vma=False,
    )(coefs, params_0, taus, each, *inputs)
    return sharding.constrain(found, mesh, P())


class TangentOutputs(NamedTuple):
    r"""Outputs of :math:`f(x;\theta_0) + \sum_t \lambda_t J(x;\theta_0)\tau_t`.

    Called with coefficients `[T]` it gives the outputs `[N, ...]`, without the network,
    in float32 or better.

    Attributes:
      f0: the pre-trained model's outputs, `[N, ...]`.
      moves: the tangents of the T task vectors, `[T, N, ...]`.
    """

    f0: np.ndarray
    moves: np.ndarray

    def __call__(self, coefs: Sequence[float]) -> np.ndarray:
        dtype = np.promote_types(self.f0.dtype, np.float32)
        coefs = np.asarray(coefs, dtype)
        if coefs.shape != (len(self.moves),):
            raise ValueError(
                f"coefficients of shape {coefs.shape} for {len(self.moves)} task "
                "vectors; give one for each."
            )
        moves = self.moves.astype(dtype, copy=False)
        # Not `tensordot`: the threads of BLAS wait for those of XLA.
        moved = np.einsum("t,t...->...", coefs, moves)
        return self.f0.astype(dtype, copy=False) + moved


def tangent(
    apply_fn: ApplyFn,
    params_0: Tree,
    taus: Sequence[Tree],
    batches: Iterable[dict],
    inputs=("image",),
    *,
    mesh: Mesh | None = None,
) -> TangentOutputs:
    """Outputs of the linearised model as a function of the coefficients.

    One linearisation per batch serves all task vectors; the T + 1 outputs of every
    sample are kept in host memory and calls only sum them. Making them costs 1 + 2T
    forward passes of the network. Where all vectors share one coefficient, their sum
    (`task_vectors.add`) is all that is asked for, at 3 forward passes.
    """
    mesh = mesh or sharding.mesh_of((params_0, tuple(taus)))
    params_0, taus = sharding.shard((params_0, tuple(taus)), mesh)
    rows = [
        (
            *settled(_jvps(apply_fn, mesh, params_0, taus, *_inputs(b, inputs, mesh))),
            _mask(b),
        )
        for b in batches
    ]
    return TangentOutputs(
        np.concatenate([_unpadded(f0, mask) for f0, _, mask in rows]),
        np.concatenate([_unpadded(moves, mask, 1) for _, moves, mask in rows], axis=1),
    )


class Search(NamedTuple):
    """The result of a coefficient search.

    Attributes:
      coef: the chosen coefficient.
      coefs: the candidates, `[n]`.
      normalized: their mean normalised accuracies, `[n]`.
    """

    coef: float
    coefs: np.ndarray
    normalized: np.ndarray


def search(
    accuracies_at: Callable[[float], Sequence[float]],
    single: Sequence[float],
    coefs: Sequence[float] = tuple(np.linspace(0, 1, 21)),
) -> Search:
    """The shared coefficient with the best mean normalised accuracy.

    The first of equals wins, which is the smallest where `coefs` ascend (protocol of
    Ortiz-Jimenez et al. 2023).

    Args:
      accuracies_at: accuracy on every task at a coefficient, on validation data.
      single: accuracy of every task's own model, on the same data.
      coefs: the candidates.

    Raises:
      ValueError: no candidate, or an accuracy that is NaN.
    """
    if not len(coefs):
        raise ValueError("no coefficient to try; give at least one in coefs.")
    normalized = np.array(
        [metrics.normalized_accuracy(accuracies_at(c), single) for c in coefs]
    )
    if np.isnan(normalized).any():
        first = coefs[int(np.isnan(normalized).argmax())]
        raise ValueError(
            f"an accuracy at coefficient {first} is NaN; `accuracies_at` must return "
            "numbers."
        )
    best = int(normalized.argmax())
    return Search(float(coefs[best]), np.asarray(coefs, float), normalized)


class TaskSearch(NamedTuple):
    """The result of a search of one coefficient per task.

    Attributes:
      coefs: the chosen coefficients, `[T]`.
      normalized: the mean normalised accuracies of the best shared coefficient and
        after every sweep, `[1 + sweeps]`; they never fall.
    """

    coefs: np.ndarray
    normalized: np.ndarray


def search_per_task(
    accuracies_at: Callable[[np.ndarray], Sequence[float]],
    single: Sequence[float],
    coefs: Sequence[float] = tuple(np.linspace(0, 1, 21)),
    *,
    sweeps: int = 10,
) -> TaskSearch:
    """One coefficient per task by coordinate ascent, from the best shared coefficient.

    A sweep visits the tasks in order and moves the coefficient of each, the others
    fixed, to the best candidate if that is better than where it is. So the result is
    never worse than that of `search` on the same data, though a grid over all tasks may
    hold a better one.

    It tries n shared coefficients and T·n more per sweep. With outputs from `forward`
    each costs a pass over the data of every task, from `tangent` only the heads.

    Args:
      accuracies_at: accuracy on every task at coefficients `[T]`, on validation data.
      single: accuracy of every task's own model, on the same data, `[T]`.
      coefs: the n candidates of every coefficient.
      sweeps: the most sweeps; one that changes nothing is the last.

    Raises:
      ValueError: no candidate, or an accuracy that is NaN.

    Example:
      >>> def accuracies_at(coefs):
      ...     return 1 - (coefs - np.array([0.3, 0.8])) ** 2
      >>> print(search_per_task(accuracies_at, [1.0, 1.0]).coefs)
      [0.3 0.8]
    """
    tasks = np.arange(len(single))
    shared = search(lambda c: accuracies_at(np.full(len(tasks), c)), single, coefs)
    chosen = np.full(len(tasks), shared.coef)
    normalized = [shared.normalized.max()]
    for _ in range(sweeps):
        best = normalized[-1]
        for task in tasks:
            found = search(
                lambda c, task=task: accuracies_at(np.where(tasks == task, c, chosen)),
                single,
                coefs,
            )
            if found.normalized.max() > best:
                best, chosen[task] = found.normalized.max(), found.coef
        normalized.append(best)
        if normalized[-1] == normalized[-2]:
            break
    return TaskSearch(chosen, np.array(normalized))


class NegationSearch(NamedTuple):
    """The result of a search for how far a task vector can be negated.

    Attributes:
      coef: the chosen coefficient.
      coefs: the candidates, `[n]`.
      controls: the control measure at each, `[n]`.
    """

    coef: float
    coefs: np.ndarray
    controls: np.ndarray


def search_negation(
    control_at: Callable[[float], float],
    allowed: Callable[[float], bool],
    coefs: Sequence[float] = tuple(np.linspace(0, 1, 11)),
    *,
    target_at: Callable[[float], float] | None = None,
) -> NegationSearch:
    """How far a vector can be negated while what should not be forgotten is there.

    Without `target_at`, the largest coefficient that is allowed.
    Ilharco et al. (2023) allow classifiers 95 % of the pre-trained accuracy on a
    control task (section 3.1), and language models 0.5 more than the pre-trained
    perplexity (section 3.2). "Largest" is meant as printed, there and by Yoshida et al.
    (2025): a smaller candidate that is not allowed does not matter, for the model in
    use is the one of the chosen coefficient. The code of Yoshida et al. stops at the
    first that is not allowed; the two differ only where the measure comes back. On
    image tasks they choose, among those that are allowed, the one that forgets most
    (App. B.2): `target_at`.

    Args:
      control_at: the control measure of the model `θ0 - coef · τ`.
      allowed: whether a measure is within the limit. NaN never is; coefficient 0, which
        leaves the model as it is, always.
      coefs: the candidates.
      target_at: the measure of what is to be forgotten. With it the chosen coefficient
        is the one at which this is the smallest, and of equals the smallest, instead of
        the largest. Of NaN, it is taken to be infinite.

    Raises:
      ValueError: no candidate, or none is allowed.

    Example:
      >>> perplexity_at = {0.0: 25.2, 0.5: 25.4, 1.0: 26.1}.__getitem__
      >>> search_negation(perplexity_at, lambda p: p <= 25.2 + 0.5, [0, 0.5, 1]).coef
      0.5
      >>> accuracy_at = {0.0: 0.6, 0.5: 0.58, 1.0: 0.5}.__getitem__
      >>> search_negation(accuracy_at, lambda a: a >= 0.95 * 0.6, [0, 0.5, 1]).coef
      0.5
    """
    if not len(coefs):
        raise ValueError("no coefficient to try; give at least one in coefs.")
    controls = np.array([control_at(c) for c in coefs], float)
    within = [
        float(c)
        for c, control in zip(coefs, controls, strict=True)
        if c == 0 or (not np.isnan(control) and allowed(control))
    ]
    if not within:
        raise ValueError(
            f"no candidate keeps the control measure within its limit: {controls} at "
            f"{np.asarray(coefs)}. Try smaller coefficients; 0 is the model as it is."
        )
    if target_at is None:
        chosen = max(within)
    else:
        targets = [(np.nan_to_num(target_at(c), nan=np.inf), c) for c in within]
        chosen = min(targets)[1]
    return NegationSearch(chosen, np.asarray(coefs, float), controls)


class ExternalSearch(NamedTuple):
    """The result of a search among task vectors of others.

    Attributes:
      index: the chosen vector; None where none is better than no vector.
      coef: its coefficient; 0 where there is none.
      scores: those of all, `[n, m]`: n vectors and m coefficients.
    """

    index: int | None
    coef: float
    scores: np.ndarray


def search_external(
    score_at: Callable[[int, float], float],
    count: int,
    coefs: Sequence[float] = tuple(np.linspace(0.1, 1, 10)),
    *,
    baseline: float,
) -> ExternalSearch:
    """Which one of many task vectors improves a fine-tuned model most, and how much.

    Ilharco et al. (2023, section 4.2) add the vectors of 427 public checkpoints, one at
    a time, to a model of the target task, and choose vector and coefficient by the
    score on held-out data (App. D.7). The first of equals wins, and no vector wins over
    one that does not improve.

    Args:
      score_at: `score_at(index, coef)`, the held-out score of the fine-tuned model with
        that vector added; larger is better.
      count: n, the number of vectors.
      coefs: the m candidates of the coefficient.
      baseline: the held-out score of the fine-tuned model alone.

    Raises:
      ValueError: no vector or no candidate, or a score that is NaN.

    Example:
      >>> def score_at(index, coef):
      ...     return 0.9 - (coef - 0.5) ** 2 - 0.1 * abs(index - 1)
      >>> found = search_external(score_at, 3, [0.25, 0.5, 0.75], baseline=0.8)
      >>> print(found.index, found.coef, found.scores.shape)
      1 0.5 (3, 3)
    """
    if count < 1 or not len(coefs):
        raise ValueError(
            f"{count} vectors and {len(coefs)} coefficients; at least one of each is "
            "needed."
        )
    scores = np.array([[score_at(i, c) for c in coefs] for i in range(count)], float)
    if np.isnan(scores).any() or np.isnan(baseline):
        raise ValueError("a score or the baseline is NaN; both must be numbers.")
    index, best = np.unravel_index(scores.argmax(), scores.shape)
    if scores[index, best] <= baseline:
        return ExternalSearch(None, 0.0, scores)
    return ExternalSearch(int(index), float(coefs[best]), scores)


def disentanglement_error(
    outputs_at: Sequence[OutputsAt],
    predict: Sequence[Callable[[np.ndarray], np.ndarray]],
    coefs: Sequence[float],
) -> np.ndarray:
    r"""The ξ grid of a pair of task vectors (Ortiz-Jimenez et al. 2023, section 4).

    .. math:: \xi(\alpha_1, \alpha_2) = \sum_{t=1,2} \Pr_{x\sim t}[
              f(x; \theta_0 + \alpha_t\tau_t) \neq
              f(x; \theta_0 + \alpha_1\tau_1 + \alpha_2\tau_2)]

    Args:
      outputs_at: for each of the two datasets, the outputs at `(α_1, α_2)`, from
        `forward` or, at no cost, from `tangent`.
      predict: for each dataset, outputs `[N, ...]` to predicted labels `[N]`.
      coefs: the values that α_1 and α_2 run through, `[n]`.

    Returns:
      `f64[n, n]` in [0, 2]: row i is α_1 = coefs[i], column j is α_2 = coefs[j].

    Raises:
      ValueError: there are not two datasets.
    """
    if len(outputs_at) != 2 or len(predict) != 2:
        raise ValueError(f"ξ compares two tasks; found {len(outputs_at)}.")
    first, second = outputs_at
    alone_1 = [predict[0](first((a, 0.0))) for a in coefs]
    alone_2 = [predict[1](second((0.0, b))) for b in coefs]

    def error(i, j):
        both = (coefs[i], coefs[j])
        return np.mean(predict[0](first(both)) != alone_1[i]) + np.mean(
            predict[1](second(both)) != alone_2[j]
        )

    indices = range(len(coefs))
    return np.array([[error(i, j) for j in indices] for i in indices])
