r"""DisTaC: repairs an existing task vector by distillation on unlabelled samples.

Task vectors merge badly if their norms differ much, or if their models are unsure of
their predictions. DisTaC trains a student that starts at
:math:`\theta_0 + \kappa\tau`, which has the wanted norm, and is kept near there. The
teacher is :math:`\theta_0 + \tau`.

Yoshida, Naraki, Horie et al. DisTaC: Conditioning Task Vectors via Distillation for
Robust Model Merging. ICLR 2026. arXiv:2508.01148.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxarith import curvature, evaluate, fingerprint, task_vectors, tree
from jaxarith.data import pipeline
from jaxarith.train.batches import task_batches
from jaxarith.train.config import TrainConfig
from jaxarith.train.run import fine_tune
from jaxarith.typing import ApplyFn, Params, Source, Tree

TARGET = "target"  # the field of a sample that holds the teacher's outputs


def distac(
    apply_fn: ApplyFn,
    params_0: Params,
    tau: Params,
    samples: Source,
    config: TrainConfig,
    *,
    scale: float = 1.0,
    temperatures: tuple[float, float] = (10.0, 10.0),
    anchor: float = 0.1,
    logits: Callable[[Tree], jax.Array] = lambda outputs: outputs,
    name: str = "task",
    inputs: Sequence[str] = ("image",),
    log: Path | None = None,
    mesh: Mesh | None = None,
) -> Tree:
    r"""Returns a vector of the same task with another norm or more confident outputs.

    .. math:: \min_\theta\ T_t T_s\,\mathrm{KL}\left(\mathrm{softmax}(z_t / T_t)\,\|\,
       \mathrm{softmax}(z_s(\theta) / T_s)\right)
       + \beta\,\|\theta - \theta_0 - \kappa\tau\|^2

    In the paper it is safe to shrink a vector. A vector stretched by κ = 3 can end
    below the pre-trained model.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs[B, ...]`.
      params_0: pre-trained parameters.
      tau: a task vector of ordinary fine-tuning; its leaves are trained.
      samples: unlabelled samples of the task. The teacher runs once for each.
      config: the recipe. The paper's code uses
        `TrainConfig(steps=500, weight_decay=0.0)`.
      scale: κ. `n / optax.tree.norm(tau)` makes a vector of norm n.
      temperatures: Tₜ of the teacher and Tₛ of the student. The paper uses (10, 10) if
        norms differ, and (1, 10) with κ = 1 for models with low confidence.
      anchor: β as in the paper's code, which adds 2β(θ - θ0 - κτ) to the gradient.
      logits: function from the model's outputs to logits `[B, classes]`, for example a
        frozen head.
      name: name of the task, for messages and the order of samples.
      inputs, log, mesh: as for `fine_tune`.

    Returns:
      A task vector like `tau`, in float32.

    Raises:
      ValueError: the recipe is linearised, distils or has a penalty, a temperature is
        not above 0 or the anchor below 0; or as for `fine_tune`.

    Example:
      >>> shorter = distac(  # doctest: +SKIP
      ...     encode, params_0, tau, images, config, scale=0.5, logits=head
      ... )
    """
    if config.linearized or config.distill or config.penalty:
        raise ValueError(
            "distac trains an ordinary model with its own penalty; do not set "
            "linearized, distill or penalty in its recipe."
        )
    if not min(temperatures) > 0:
        raise ValueError(f"temperatures are {temperatures}; expected two above 0.")
    if not anchor >= 0:
        raise ValueError(f"anchor is {anchor}; at least 0 is needed.")
    paths = list(tree.flatten(tau))
    config = dataclasses.replace(
        config,
        trained="|".join(map(re.escape, paths)),
        penalty="diagonal",
        penalty_coef=anchor,
    )
    start = task_vectors.apply(params_0, tau, scale)
    taught = with_targets(
        apply_fn, task_vectors.apply(params_0, tau), samples, inputs, mesh=mesh
    )

    def loss(outputs, batch, _):
        return divergence(logits(outputs), logits(batch[TARGET]), temperatures)

    [moved] = fine_tune(
        apply_fn,
        start,
        loss,
        task_batches([taught], config, names=[name], mesh=mesh),
        config,
        names=[name],
        inputs=inputs,
        curvature=_squared_norm(start, paths),
        log=log,
        mesh=mesh,
    )
    return jax.tree.map(lambda old, new: scale * old + new, tau, moved)


def divergence(
    student: jax.Array, teacher: jax.Array, temperatures: tuple[float, float]
) -> jax.Array:
    """Returns the mean divergence of softened predictions, times both temperatures.

    Args:
      student, teacher: logits `[B, classes]`; -inf where both have no class.
      temperatures: temperatures of the teacher and of the student.

    Example:
      >>> logits = jnp.array([[0.0, jnp.log(3.0)]])
      >>> print(divergence(logits, logits, (2.0, 2.0)))
      0.0
    """
    of_teacher, of_student = temperatures
    log_p = jax.nn.log_softmax(teacher / of_teacher)
    log_q = jax.nn.log_softmax(student / of_student)
    difference = jnp.where(log_p == -jnp.inf, 0, log_p - log_q)  # 0 · NaN is NaN
    sums = jnp.sum(jnp.exp(log_p) * difference, axis=-1)
    return of_teacher * of_student * jnp.mean(sums)


@dataclasses.dataclass(frozen=True)
class _Taught:
    """Samples, each with the outputs of a teacher."""

    samples: Source
    targets: np.ndarray

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return dict(self.samples[index]) | {TARGET: self.targets[index]}


def with_targets(
    apply_fn: ApplyFn,
    params: Params,
    samples: Source,
    inputs: Sequence[str] = ("image",),
    *,
    batch_size: int = 128,
    mesh: Mesh | None = None,
) -> Source:
    """Adds a teacher's outputs to the samples, as the field "target".

    The teacher runs once for each sample, before training. Do not augment the samples
    in training: the student would see other inputs than the teacher.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs[B, ...]`.
      params: the teacher's parameters.
      samples: a source of samples.
      inputs: the fields that are passed to `apply_fn`, in order.
      batch_size: number of samples in one call of the teacher.
      mesh: the devices, see `sharding`; by default one.

    Raises:
      ValueError: there are no samples, a sample lacks a field, `batch_size` is below
        1, or the outputs are not one array.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed.")
    samples = pipeline.samples(samples)
    batches = pipeline.evaluation_stream(samples, batch_size, preprocess=dict)
    found = evaluate.outputs(apply_fn, params, batches, inputs, mesh=mesh)
    return _Taught(samples, found)


def _squared_norm(params, paths):
    """Returns the curvature whose penalty is the squared norm of these leaves."""
    return curvature.Factors(
        layers=(),
        base=fingerprint.combined(params),
        sharing=None,
        inputs={},
        outputs={},
        divisors={},
        full={},
        diagonal={path: jnp.ones(()) for path in paths},
        sketch={},
        samples=jnp.ones(()),
    )
