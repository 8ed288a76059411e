"""Curvature of an encoder's sizes, to measure what it costs: shapes, and numbers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import encoders
from jaxarith import curvature, tree
from jaxarith.curvature import layers, matrices
from jaxarith.typing import Tree


def shapes(encoder: encoders.Encoder, inputs: Sequence, rank: int) -> curvature.Factors:
    """The shapes of the factors of all linear layers, and of a sketch."""
    leaves = tree.flatten(encoder.layout)
    paths = list(leaves)
    found = layers.layers_of(encoder.apply_fn, encoder.layout, inputs, paths, True)
    covered = {p for layer in found for p in (*layer.kernels, *layer.biases)}

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def sides(layer):
        return jax.eval_shape(functools.partial(matrices.matrix, layer), leaves).shape

    of_layer = {layer.name: sides(layer) for layer in found}
    arrays: dict[str, Any] = {  # in the place of arrays
        "inputs": {name: shape(1, i, i) for name, (i, _) in of_layer.items()},
        "outputs": {name: shape(1, o, o) for name, (_, o) in of_layer.items()},
        "divisors": {name: shape(1) for name in of_layer},
        "full": {},
        "diagonal": {p: shape(*leaves[p].shape) for p in paths if p not in covered},
        "sketch": {p: shape(rank, *leaves[p].shape) for p in paths} if rank else {},
        "samples": shape(),
    }
    return curvature.Factors(layers=found, base=0, sharing="whole", **arrays)


def filled(shapes: Tree) -> Tree:
    """Random arrays of these shapes; what they hold costs no time."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def leaf(shape):
        key = next(keys)
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jnp.zeros(shape.shape, shape.dtype)
        return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)

    return jax.tree.map(leaf, shapes)
