"""Small Linen networks with a known curvature, and its exact forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree


class Network(nn.Module):
    """Two layers; of tokens `[B, R, in]` the mean over R of the outputs, if pooled."""

    activation: str = "tanh"
    pooled: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        x = jnp.tanh(x) if self.activation == "tanh" else x
        x = nn.Dense(3, name="second")(x)
        return x.mean(axis=-2) if self.pooled else x


def network(activation="tanh", pooled=False, tokens=None, samples=6, width=3):
    """`apply_fn`, parameters and inputs `[samples, (tokens,) width]`, in float64."""
    module = Network(activation, pooled)
    shape = (samples, width) if tokens is None else (samples, tokens, width)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # no bias of zero
    return lambda params, x: module.apply({"params": params}, x), params, x


def vector(params, seed=1):
    """A random task vector."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params
    )


def exact_form(apply_fn, params, tau, x):
    """The mean over samples, and tokens of the outputs, of ‖J(x)τ‖²."""
    _, moved = jax.jvp(lambda p: apply_fn(p, x), (params,), (tau,))
    return float(jnp.mean(jnp.sum(moved**2, axis=-1)))


def exact_block(apply_fn, params, x, layer):
    """The block `[n, n]` of E[JᵀJ] of a layer's matrix: kernel over bias, by rows."""
    jacobian = jax.jacrev(apply_fn)(params, x)[layer]
    outputs = jacobian["kernel"].ndim - 2
    positions = int(np.prod(jacobian["kernel"].shape[1 : outputs - 1]))
    matrices = jnp.concatenate(
        [jacobian["kernel"], jacobian["bias"][..., None, :]], axis=-2
    )
    rows = matrices.reshape(-1, matrices.shape[-1] * matrices.shape[-2])
    return rows.T @ rows / (len(x) * positions)


def kronecker_block(factors, layer):
    """The same block of factors."""
    name = f"{layer}/kernel"
    terms = zip(
        factors.inputs[name], factors.outputs[name], factors.divisors[name], strict=True
    )
    return sum(np.kron(a, b) / d for a, b, d in terms)


def part(tau, layer):
    """The vector that is zero but for one layer."""
    return tree.map_with_path(
        lambda path, leaf: leaf if path.startswith(layer) else jnp.zeros_like(leaf), tau
    )
