"""The programs whose cost `curvature` and `accelerator` measure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import encoders, factors
from experiments.bench.jvp_steps import DType
from jaxarith import curvature, losses, tangent, tau_jp, tree
from jaxarith.curvature import matrices, passes
from jaxarith.curvature.collect import whole_samples
from jaxarith.typing import Tree

ALONE = "gradient of the penalty alone"
COLLECTION = "collection, one sample"
CLASSES = 100


def sketched(rank: int) -> str:
    """Name of the row of a step with factors and a sketch of `rank` rows."""
    return f"+ factors and a sketch of {rank}"


def programs(
    encoder: encoders.Encoder, *, batch: int, dtype: DType, rank: int
) -> dict[str, tuple]:
    """Returns, by row, its function and the shapes of its arguments.

    Args:
      encoder: the model.
      batch: number of samples of a step.
      dtype: dtype of weights, inputs and products; factors are in float32.
      rank: number of rows of the sketch.
    """
    sample = encoder.make_inputs(np.random.default_rng(0), 1)

    def shape(leaf, *sizes):
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(sizes, dtype if is_real else leaf.dtype)

    def samples(size):
        return tuple(shape(leaf, size, *leaf.shape[1:]) for leaf in sample)

    layout = jax.tree.map(lambda leaf: shape(leaf, *leaf.shape), encoder.layout)
    own, others = samples(batch), samples(batch // 8)
    width = jax.eval_shape(encoder.apply_fn, layout, *own).shape[-1]
    head = jax.ShapeDtypeStruct((CLASSES, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    measured = factors.shapes(encoder, samples(1), rank)
    plain = dataclasses.replace(measured, sketch={})

    def loss(features, head, labels):
        features = features.astype(jnp.float32)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return losses.cross_entropy(100 * features @ head.T, labels)

    def linearized(tau, params, head, labels, inputs):
        f0, moved = tangent.jvp(encoder.apply_fn, params, tau, *inputs)
        return loss(f0 + moved, head, labels)

    def cyclic(tau, params, head, labels, inputs, others):
        outputs, penalty = tau_jp.linearized_and_penalty(
            encoder.apply_fn, params, tau, inputs, others
        )
        return loss(outputs, head, labels) + 0.1 * penalty

    def curved(tau, params, head, labels, inputs, measured):
        task = jax.grad(linearized)(tau, params, head, labels, inputs)
        slope = jax.grad(curvature.penalty)(tau, measured)
        return jax.tree.map(lambda g, s: g + (0.1 * s).astype(g.dtype), task, slope)

    plan = passes.Plan(
        layers=measured.layers,
        diagonal=tuple(measured.diagonal),
        statistics=whole_samples,
        probes=1,
        chunk=1,
    )

    def collected(params, inputs):
        rows = inputs, {}, jnp.ones(1, bool), jnp.zeros(1, jnp.int32)
        key = jax.random.key(0)
        return passes.chunk_sums(encoder.apply_fn, plan, params, key, None, rows)[0]

    step = layout, layout, head, labels, own
    return {
        "linearised step": (jax.grad(linearized), step),
        "+ cyclic τJp": (jax.grad(cyclic), (*step, others)),
        "+ factors": (curved, (*step, plain)),
        sketched(rank): (curved, (*step, measured)),
        ALONE: (
            jax.grad(curvature.penalty),
            (layout, measured),
        ),
        COLLECTION: (collected, (layout, samples(1))),
    }


def released_penalty(tau: Tree, measured: curvature.Factors, device: str = "cpu"):
    """tr(B W A Wᵀ) of all layers and its gradient by PyTorch's automatic one.

    Args:
      tau: a task vector.
      measured: the factors.
      device: device, as PyTorch calls it.
    """
    import torch

    def tensor(x):
        return torch.tensor(np.asarray(x, np.float32), device=device)

    leaves = tree.flatten(tau)
    parts = [
        (
            tensor(matrices.matrix(layer, leaves)).T.contiguous().requires_grad_(),
            tensor(measured.inputs[layer.name][0]),
            tensor(measured.outputs[layer.name][0]),
        )
        for layer in measured.layers
    ]

    def run():
        terms = [torch.trace(b @ w @ a @ w.T) for w, a, b in parts]
        total = torch.stack(terms).sum()
        slopes = torch.autograd.grad(total, [w for w, _, _ in parts])
        if device == "cuda":
            torch.cuda.synchronize()
        return slopes

    return run
