r"""Representation surgery: a small module that corrects the bias of merged features.

Let :math:`Z` be the features of the merged model on a task, and :math:`Z^*` those of
the task's own fine-tuned model. The surgery of the task is

.. math:: \hat Z = Z - \mathrm{ReLU}(Z D)\,U, \qquad
          \min_{D, U} \tfrac{1}{N}\sum_x \|\hat Z(x) - Z^*(x)\|_1 .

Yang et al. Representation Surgery for Multi-Task Model Merging. ICML 2024.
arXiv:2402.02705.

The published numbers train the modules on the inputs of the *test* sets. Where the
paper says nothing, this follows the authors' code: the mean of |Ẑ - Z*| over samples
and features, Adam with learning rate 1e-3, rank 16, and 500 rounds of two batches of 16
samples.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxarith import tree


class Surgery(NamedTuple):
    """The surgery of one task; call it on the merged model's features of that task.

    Attributes:
      down: the matrix D, `[D, rank]`.
      up: the matrix U, `[rank, D]`.
    """

    down: jax.Array
    up: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns features `[..., D]` without their estimated bias."""
        hidden = jax.nn.relu(jnp.dot(features, self.down, precision="highest"))
        return features - jnp.dot(hidden, self.up, precision="highest")


def surgery(
    merged_features: jax.Array,
    individual_features: jax.Array,
    *,
    key: jax.Array,
    rank: int = 16,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_size: int | None = 16,
    normalize: bool = False,
) -> Surgery:
    """Learns the surgery of one task from the features of unlabelled samples.

    Args:
      merged_features: features of the merged model, `[N, D]`.
      individual_features: features of the task's own model on the same samples,
        `[N, D]`.
      key: random key of the initialisation and of the draws of samples.
      rank: the width of the module.
      steps: number of steps of Adam, one per batch.
      learning_rate: learning rate of Adam.
      batch_size: number of samples per step, drawn without replacement within the step.
        None, or N or more, takes all samples in every step.
      normalize: whether to divide all features by their norms first, as fusion_bench
        does. The module then expects normalised features. Its output is not normalised.

    Returns:
      The module. Without training (`steps=0`) it changes nothing, because `up` starts
      at zero.

    Raises:
      ValueError: the features are not two matrices of one shape, a value is not finite,
        or `batch_size` is below 1.

    Example:
      >>> individual = jax.random.normal(jax.random.key(0), (64, 4))
      >>> fix = surgery(individual + 0.3, individual, key=jax.random.key(1))
      >>> print(jnp.abs(fix(individual + 0.3) - individual).mean() < 0.2)
      True
    """
    import optax  # here, so that `import jaxarith` stays light

    merged, individual = jnp.asarray(merged_features), jnp.asarray(individual_features)
    if merged.shape != individual.shape or merged.ndim != 2 or not merged.size:
        raise ValueError(
            f"the features have shapes {list(merged.shape)} and "
            f"{list(individual.shape)}; expected the same shape [N, D], with N and D "
            "at least 1."
        )
    tree.check_finite({"merged": merged, "individual": individual}, "set of features")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None.")
    if normalize:
        merged, individual = _normalize(merged), _normalize(individual)
    module = _init(jax.random.fold_in(key, 0), merged, rank)
    state = module, optax.adam(learning_rate).init(module)
    full = batch_size is None or batch_size >= len(merged)
    module, _ = _descend(
        state,
        merged,
        individual,
        jax.random.fold_in(key, 1),
        steps=steps,
        learning_rate=learning_rate,
        batch_size=None if full else batch_size,
    )
    return module


def _init(key, features, rank):
    # As PyTorch's linear layers: kaiming_uniform with a = √5, which is ±1/√fan_in.
    width, dtype = features.shape[-1], jnp.promote_types(features.dtype, jnp.float32)
    bound = width**-0.5
    down = jax.random.uniform(key, (width, rank), dtype, -bound, bound)
    return Surgery(down, jnp.zeros((rank, width), dtype))


def _normalize(features):
    norms = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.where(norms > 0, norms, 1)


@functools.partial(jax.jit, static_argnames=("steps", "learning_rate", "batch_size"))
def _descend(state, merged, individual, key, *, steps, learning_rate, batch_size):
    import optax

    def loss(module, rows):
        bias = module(merged[rows]) - individual[rows]
        # |bias| has slope 0 at 0 here, as in PyTorch; `jnp.abs` has slope 1 there.
        return jnp.mean(bias * jax.lax.stop_gradient(jnp.sign(bias)))

    def one_step(state, step):
        module, moments = state
        rows = slice(None)
        if batch_size:
            draw = jax.random.fold_in(key, step)
            size = (batch_size,)
            rows = jax.random.choice(draw, len(merged), size, replace=False)
        gradient = jax.grad(loss)(module, rows)
        updates, moments = optax.adam(learning_rate).update(gradient, moments)
        return (optax.apply_updates(module, updates), moments), None

    (module, moments), _ = jax.lax.scan(one_step, state, jnp.arange(steps))
    return module, moments
