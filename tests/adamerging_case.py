"""A small network with two heads, its task vectors and batches, for AdaMerging."""

import jax.numpy as jnp
import oracles

from jaxarith import tree

SHAPES = {
    "in/kernel": (5, 6),
    "in/bias": (6,),
    "scale": (),
    "out": (6, 4),
    "none": (0,),
}


def leaves(seed, scale=1.0, without=()):
    return tree.unflatten(
        {
            path: jnp.asarray(oracles.normal((seed, i), *shape, scale=scale))
            for i, (path, shape) in enumerate(SHAPES.items())
            if path not in without
        }
    )


def vectors():
    return [leaves(1, 0.3), leaves(2, 0.3, without=["scale"])]


def features(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    return params["scale"] * hidden @ params["out"]


HEADS = [oracles.normal((9, t), classes, 4) for t, classes in enumerate((3, 2))]


def head_function(head):
    return lambda params, batch: features(params, batch) @ jnp.asarray(head).T


LOGITS_FNS = [head_function(head) for head in HEADS]
BATCHES = [[{"x": oracles.normal((5, t, i), 7, 5)} for i in range(2)] for t in range(2)]


def model():
    return leaves(0) | {"ids": jnp.arange(3)}
