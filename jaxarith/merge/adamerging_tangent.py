r"""AdaMerging of linearised models: entropy minimisation on cached tangents.

A linearised model is affine in the coefficients of its task vectors,

.. math:: f(x; \theta_0 + \textstyle\sum_t \lambda_t\tau_t) = f(x; \theta_0) +
          \sum_t \lambda_t J(x; \theta_0)\tau_t,

So task-wise AdaMerging (Yang et al. ICLR 2024, arXiv:2310.02575) needs only T + 1
cached outputs per sample, and not the network.

The published numbers of AdaMerging adapt on the inputs of the *test* sets. Cache the
outputs of another split, except to compare with those numbers.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.adamerging import adam_step, clip
from jaxarith.typing import Array, PerTask


def adamerging_tangent(
    outputs_0: Sequence[Array],
    moves: Sequence[Array],
    logits_fns: Sequence[Callable],
    *,
    coef: PerTask = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Learns one coefficient per task of a linearised model, without the network.

    Args:
      outputs_0: for each of D datasets, f(x; θ0) of all samples, `[N_d, ...]`. This is
        `f0` of `evaluate.tangent`.
      moves: for each dataset, J(x; θ0) τ_t, `[T, N_d, ...]`. This is `moves` of
        `evaluate.tangent`.
      logits_fns: for each dataset, a function from outputs `[B, ...]` to logits
        `[B, classes]`.
      coef: the initial λ: one number, or one per task `[T]`.
      steps, learning_rate, clamp: as for `adamerging`.
      batch_size: number of samples of a dataset per step, drawn without replacement
        within the step. None takes all samples in every step.
      key: random key of the draws; not needed without `batch_size`.

    Returns:
      The coefficients `[T]` and the mean entropies before every step, `[steps, D]`.

    Raises:
      ValueError: lists of different lengths, tangents that do not fit the outputs,
        non-finite values, a wrong number of coefficients, a `batch_size` below 1, or a
        `batch_size` without a `key`.

    Example:
      >>> f0, moves = jnp.zeros((2, 2)), 9 * jnp.eye(2)[None]
      >>> coefs, losses = adamerging_tangent([f0], [moves], [lambda f: f], steps=50)
      >>> print(coefs.round(2), losses[0] > losses[-1])
      [0.35] [ True]
    """
    import optax  # here, so that `import jaxarith` stays light

    if not len(outputs_0) == len(moves) == len(logits_fns) > 0:
        raise ValueError(
            f"found {len(outputs_0)} outputs, {len(moves)} tangents and "
            f"{len(logits_fns)} logits functions; give one of each for every dataset, "
            "and at least one."
        )
    tasks = len(moves[0])
    for d, (f0, move) in enumerate(zip(outputs_0, moves, strict=True)):
        if jnp.shape(move) != (tasks, *jnp.shape(f0)):
            raise ValueError(
                f"dataset {d} has outputs {list(jnp.shape(f0))} and tangents "
                f"{list(jnp.shape(move))}; expected {[tasks, *jnp.shape(f0)]}."
            )
        tree.check_finite({"outputs": f0, "tangents": move}, f"dataset {d}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None.")
    if batch_size is not None and key is None:
        raise ValueError(
            "batch_size needs a key to draw the samples; found None. Give "
            "key=jax.random.key(0)."
        )
    clamp = None if clamp is None else (clamp[0], clamp[1])
    raw = _leaves.per_task(coef, tasks, "coef")
    (raw, _), losses = _descend(
        (raw, optax.adam(learning_rate).init(raw)),
        tuple(map(jnp.asarray, outputs_0)),
        tuple(map(jnp.asarray, moves)),
        key,
        logits_fns=tuple(logits_fns),
        steps=steps,
        learning_rate=learning_rate,
        clamp=clamp,
        batch_size=batch_size,
    )
    return clip(raw, clamp), losses


@functools.partial(
    jax.jit,
    static_argnames=("logits_fns", "steps", "learning_rate", "clamp", "batch_size"),
)
def _descend(
    state, outputs_0, moves, key, *, logits_fns, steps, learning_rate, clamp, batch_size
):
    from jaxarith import losses

    def entropies(coefs, step):
        values = []
        for d, logits_fn in enumerate(logits_fns):
            f0, move, size = outputs_0[d], moves[d], len(outputs_0[d])
            if batch_size is not None and batch_size < size:
                draw = jax.random.fold_in(jax.random.fold_in(key, step), d)
                rows = jax.random.choice(draw, size, (batch_size,), replace=False)
                f0, move = f0[rows], move[:, rows]
            moved = jnp.tensordot(coefs, move, axes=1, precision="highest")
            values.append(losses.entropy(logits_fn(f0 + moved)))
        values = jnp.stack(values)
        return values.sum(), values

    def one_step(state, step):
        used = clip(state[0], clamp)
        gradient, values = jax.grad(entropies, has_aux=True)(used, step)
        return adam_step(state, gradient, learning_rate, clamp), values

    return jax.lax.scan(one_step, state, jnp.arange(steps))
