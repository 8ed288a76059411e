"""States of a training, their bits, and folders of checkpoints that hold them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import tree
from jaxarith.train.checkpoint import Checkpoints

CONFIG = {"train": {"steps": 8, "rates": [0.1, 0.2]}, "tasks": ["a", "b"], "log": None}


def mesh(size, name="fsdp"):
    devices = jax.devices()[:size]
    return jax.make_mesh((size,), (name,), axis_types=(AxisType.Auto,), devices=devices)


def make_state(step, spread=None):
    """A state with every kind of leaf, whose bits depend on the step."""
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    adam = optax.ScaleByAdamState(
        jnp.int32(step), {"kernel": kernel * 2}, {"kernel": kernel**2}
    )
    state = {
        "taus": {"kernel": kernel, "bias": kernel[0].astype(jnp.bfloat16)},
        "opt_state": (adam, optax.EmptyState()),
        "mask": kernel[1] > 0,
        "nothing": jnp.zeros((0, 3)),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step), 8),
    }
    return state if spread is None else jax.device_put(state, sharding(state, spread))


def sharding(state, spread):
    """Over the first axis where it can be divided, over all devices of the mesh."""

    def of(leaf):
        divisible = leaf.ndim and leaf.size and leaf.shape[0] % spread.size == 0
        return NamedSharding(spread, P("fsdp") if divisible else P())

    return jax.tree.map(of, state)


def abstract(state, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )


def bits(state):
    return {
        path: (str(leaf.dtype), leaf.shape, _data(leaf).tobytes())
        for path, leaf in tree.flatten(state).items()
    }


def _data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def folders(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def save_all(folder, *steps, config=CONFIG, **options):
    with Checkpoints(folder, config, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))
    assert folders(folder) == [f"step_{s:08d}" for s in steps[-2:]]


def restore(folder, config=CONFIG):
    with Checkpoints(folder, config) as checkpoints:
        return checkpoints.restore(make_state(0))


def assert_restores(folder, step):
    restored = restore(folder)
    assert restored.step == step
    assert bits(restored.state) == bits(make_state(step))


def large_state(step):
    noise = np.random.default_rng(step).normal(size=(8, 2**15))
    return {"w": jnp.asarray(noise, jnp.float32)}
