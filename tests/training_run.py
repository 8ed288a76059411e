"""A training that other processes start, kill and start again.

    python -m tests.training_run FOLDER SECONDS_PER_STEP [MESH]

It prints a line when training begins, and at the end the fingerprint of its task
vectors. Started by hand under `jax.distributed` variables, it is one of several
processes.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import fingerprint, sharding, train

CONFIG = train.TrainConfig(
    steps=80,
    warmup_steps=10,
    batch_size=8,
    learning_rate=0.01,
    linearized=True,
    penalty="mixed",
    penalty_batch_size=4,
)
NAMES = ["a", "b"]


def apply_fn(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return hidden @ params["out"]["kernel"]


def loss_fn(outputs, batch, scale):
    return jnp.mean((outputs - batch["label"]) ** 2) * scale


def params_0():
    rng = np.random.default_rng(0)
    shapes = {"in": {"kernel": (5, 64), "bias": (64,)}, "out": {"kernel": (64, 2)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


class Slow(list):
    """Samples that take a while to read, and remember which were."""

    def __init__(self, samples, seconds):
        super().__init__(samples)
        self.seconds, self.read = seconds, []

    def __getitem__(self, i):
        time.sleep(self.seconds)
        self.read.append(i)
        return super().__getitem__(i)


def sources(seconds_per_step=0.0):
    rngs = [np.random.default_rng(seed) for seed in (1, 2)]
    return [
        Slow(
            [
                {
                    "image": rng.normal(size=5).astype(np.float32),
                    "label": rng.normal(size=2).astype(np.float32),
                }
                for _ in range(40)
            ],
            # Two threads read the 24 samples of a step.
            seconds_per_step * 2 / 24,
        )
        for rng in rngs
    ]


def run(folder=None, seconds_per_step=0.0, mesh=None, config=CONFIG, data=None, **kw):
    mesh = mesh or sharding.one_device()
    data = data or sources(seconds_per_step)
    return train.fine_tune(
        apply_fn,
        params_0(),
        loss_fn,
        train.task_batches(data, config, seeds=range(len(data)), mesh=mesh),
        config,
        names=NAMES,
        constants=np.array([1.0, 2.0], np.float32),
        mesh=mesh,
        checkpoints=folder and Path(folder) / "checkpoints",
        log=folder and Path(folder) / "log.jsonl",
        **kw,
    )


def main():
    folder, seconds, *mesh = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(mesh[0]) if mesh else None
    report = functools.partial(print, flush=True)
    report("begins")
    taus = run(folder, float(seconds), mesh, save_every=5)
    report("ends", fingerprint.combined(taus))


if __name__ == "__main__":
    main()
