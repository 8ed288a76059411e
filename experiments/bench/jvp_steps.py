"""What the rows of `jvp_cost` run: a model, directions, samples, and steps of them.

A step is a loss and its gradient, without an optimizer. The loss is that of a frozen
head of 100 classes on features.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import encoders, factors
from jaxarith import curvature, losses, tangent, tau_jp, tree
from jaxarith.typing import Params, Tree

CLASSES = 100
PENALTY_COEF = 0.1
TASKS = 8
MANY = (f"{TASKS} tangents by jvps", f"{TASKS} JVPs")  # rows of many tangents
DType = Literal["float32", "bfloat16"]
# Of the paradigms of Jin et al. (2025), see `encoders`.
PARTS = {
    "1": "attention weights",
    "2": "attention weights and biases",
    "3": "all linear weights",
    "4": "all linear weights and biases",
}


class Point(NamedTuple):
    """What is measured.

    Attributes:
      model: name of the encoder.
      batch: samples of a step.
      length: tokens of a text; None for an encoder's own number and for images.
      dtype: dtype of weights, inputs and products.
      layers: fewer transformer blocks than the model has.
    """

    model: encoders.Name
    batch: int
    length: int | None = None
    dtype: DType = "float32"
    layers: int | None = None


def linearized_part(paradigm: str) -> str:
    """Name of the row of linearised training of a part."""
    return f"linearised, {PARTS[paradigm]}"


def ordinary_part(paradigm: str) -> str:
    """Name of the row of ordinary training of a part."""
    return f"ordinary, {PARTS[paradigm]}"


class Work(NamedTuple):
    """What the rows are made of.

    Attributes:
      encoder: the model.
      params, taus: its parameters and some directions.
      inputs: arrays `[B, ...]`.
      parts: for every paradigm of partial fine-tuning, the pattern of its paths.
      penalties: for every kind of penalty, arrays `[P, ...]` of other tasks.
      factors: curvature of other tasks, in float32.
      labels: `[B]`.
      head: `[classes, D]`, rows of length 1.
    """

    encoder: encoders.Encoder
    params: Params
    taus: list[Tree]
    inputs: tuple
    parts: dict[str, str]
    penalties: dict[str, tuple]
    factors: curvature.Factors
    labels: jax.Array
    head: jax.Array

    def logits(self, features):
        """Of a frozen head on normalised features, as in CLIP."""
        features = features.astype(jnp.float32)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return 100 * features @ self.head.T

    def loss(self, features):
        return losses.cross_entropy(self.logits(features), self.labels)


def prepare(point: Point, tasks: int | None = None) -> Work:
    """Random weights, directions, samples and labels.

    Args:
      point: what is measured.
      tasks: number of directions, by default `TASKS`; with one there are no rows of
        many tangents.
    """
    encoder = encoders.encoder(point.model, point.layers, point.length or None)
    params = encoders.random_params(encoder.layout, 0, point.dtype)
    count = TASKS if tasks is None else tasks
    taus = [encoders.random_tau(params, 1 + task) for task in range(count)]
    rng = np.random.default_rng(0)

    def samples(count):
        arrays = encoder.make_inputs(rng, count)
        cast = lambda x: jnp.asarray(x, point.dtype if x.dtype.kind == "f" else None)  # noqa: E731
        return tuple(map(cast, arrays))

    eighth = point.batch // 8
    inputs = samples(point.batch)
    penalties = {"cyclic": eighth, "mixed": eighth, "strict": TASKS * eighth}
    width = jax.eval_shape(encoder.apply_fn, params, *inputs).shape[-1]
    head = rng.standard_normal((CLASSES, width), np.float32)
    return Work(
        encoder,
        params,
        taus,
        inputs,
        encoder.paradigms,
        {f"+ {mode} τJp": samples(count) for mode, count in penalties.items()},
        factors.filled(factors.shapes(encoder, inputs, 0)),
        jnp.asarray(rng.integers(CLASSES, size=point.batch)),
        jnp.asarray(head / np.linalg.norm(head, axis=-1, keepdims=True)),
    )


def linearized_step(work: Work, apply_fn=None, product_dtype=None) -> Callable:
    """`step(params, tau, *inputs) -> gradient`, forward mode inside reverse mode."""
    apply_fn = apply_fn or work.encoder.apply_fn

    def step(params, tau, *inputs):
        def total(tau):
            outputs, moved = tangent.jvp(
                apply_fn, params, tau, *inputs, product_dtype=product_dtype
            )
            return work.loss(outputs + moved)

        return jax.grad(total)(tau)

    return step


def transposed_step(work: Work) -> Callable:
    """The same by `jax.linearize` and the transpose of its tangent function."""

    def step(params, tau, *inputs):
        apply = lambda params: work.encoder.apply_fn(params, *inputs)  # noqa: E731
        outputs, push_forward = jax.linearize(apply, params)
        slope = jax.grad(work.loss)(outputs + push_forward(tau))
        return jax.linear_transpose(push_forward, params)(slope)[0]

    return step


def penalized_step(work: Work) -> Callable:
    def step(params, tau, inputs, penalty_inputs):
        def total(tau):
            outputs, penalty = tau_jp.linearized_and_penalty(
                work.encoder.apply_fn, params, tau, inputs, penalty_inputs
            )
            return work.loss(outputs) + PENALTY_COEF * penalty

        return jax.grad(total)(tau)

    return step


def curved_step(work: Work) -> Callable:
    """`step(params, tau, measured, *inputs)`: the gradient with that of a penalty."""
    task = linearized_step(work)

    def step(params, tau, measured, *inputs):
        slope = jax.grad(curvature.penalty)(tau, measured)
        return jax.tree.map(
            lambda g, s: g + (PENALTY_COEF * s).astype(g.dtype),
            task(params, tau, *inputs),
            slope,
        )

    return step


def ordinary_step(work: Work, apply_fn: Callable) -> Callable:
    def step(params, *inputs):
        return jax.grad(lambda params: work.loss(apply_fn(params, *inputs)))(params)

    return step


def steps(work: Work) -> dict[str, tuple[Callable, tuple]]:
    """Every row's function and its arguments."""
    encoder, params, tau, inputs = work.encoder, work.params, work.taus[0], work.inputs
    jvp = functools.partial(tangent.jvp, encoder.apply_fn)
    jvps = functools.partial(tangent.jvps, encoder.apply_fn)

    def one_by_one(params, taus, *inputs):
        # Outside one `jit` XLA cannot share what the calls have in common.
        return [compiled_jvp(params, tau, *inputs) for tau in taus]

    def with_part(part, params, *inputs):
        return encoder.apply_fn(tree.update(params, part), *inputs)

    compiled_jvp = jax.jit(jvp)
    rows = {
        "forward": (encoder.apply_fn, (params, *inputs)),
        "ordinary step": (
            ordinary_step(work, encoder.apply_fn),
            (params, *inputs),
        ),
        "JVP": (jvp, (params, tau, *inputs)),
        "linearised step": (linearized_step(work), (params, tau, *inputs)),
        "linearised step, transposed": (transposed_step(work), (params, tau, *inputs)),
        "linearised step, products in bfloat16": (
            linearized_step(work, product_dtype=jnp.bfloat16),
            (params, tau, *inputs),
        ),
    }
    for name, pattern in work.parts.items():
        part = tree.select(tau, pattern)
        rows[linearized_part(name)] = linearized_step(work), (params, part, *inputs)
        rows[ordinary_part(name)] = (
            ordinary_step(work, with_part),
            (tree.select(params, pattern), params, *inputs),
        )
    for name, penalty_inputs in work.penalties.items():
        rows[name] = penalized_step(work), (params, tau, inputs, penalty_inputs)
    rows["+ curvature"] = curved_step(work), (params, tau, work.factors, *inputs)
    if len(work.taus) > 1:
        together, apart = MANY
        rows[together] = jvps, (params, work.taus, *inputs)
        rows[apart] = one_by_one, (params, work.taus, *inputs)
    if remat := encoder.rematerialized:
        rows["ordinary step, remat"] = ordinary_step(work, remat), (params, *inputs)
        rows["linearised step, remat"] = (
            linearized_step(work, remat),
            (params, tau, *inputs),
        )
    return rows
