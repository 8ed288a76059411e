"""Merges that need images: Fisher, RegMean, ESM, AdaMerging.

None needs labels. Each returns a merged task vector, to be added at coefficient 1.
"""

import functools
import itertools
from typing import Literal

import jax

from experiments.common import study_merges
from experiments.common.vision import planned, setups, sources
from jaxarith import merge, sharding, task_vectors
from jaxarith.data import pipeline
from jaxarith.models import heads
from jaxarith.typing import Taus, Tree

SAMPLES = 256  # per task, as in the public tables of FusionBench
ESM_SAMPLES = 32  # per task, as in its paper


def fisher(setup: setups.Setup, taus: Taus) -> Tree:
    """Merges by Fisher information on 256 validation images of every task.

    Matena and Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022.

    Args:
      setup: the model and the T tasks of the vectors.
      taus: the T task vectors.
    """
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    padded = heads.pad([task.test.head for task in setup.tasks])

    def logits_of(params, images):
        features = setup.apply_fn(params["encoder"], images)
        head = params["head"]
        return heads.logits(head["head"], features, head["valid"])

    merged = study_merges.fisher(
        *(logits_of, params_0, taus),
        # Heads are inputs, padded to one shape: all tasks share one compilation.
        [jax.tree.map(lambda x, i=i: x[i], padded) for i in range(len(taus))],
        validation_samples(setup),
        key=jax.random.key(setup.options.seed),
        inputs=("image",),
    )
    return task_vectors.difference(merged, params_0)


def regmean(setup: setups.Setup, taus: Taus) -> Tree:
    """Merges by RegMean on 256 validation images of every task (Jin et al. 2023)."""
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    grams = _input_grams(setup, params_0, taus, SAMPLES)
    return task_vectors.difference(merge.regmean(params_0, taus, grams), params_0)


def esm(setup: setups.Setup, taus: Taus) -> Tree:
    """Merges by ESM on 32 validation images of every task (arXiv:2606.19164)."""
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    grams = _input_grams(setup, params_0, taus, ESM_SAMPLES)
    return task_vectors.difference(merge.esm(params_0, taus, grams), params_0)


def _input_grams(setup, params_0, taus, count):
    samples = validation_samples(setup, count)
    return study_merges.input_grams(
        setup.apply_fn, params_0, taus, samples, inputs=("image",)
    )


def validation_samples(setup: setups.Setup, count: int = SAMPLES) -> list[list[dict]]:
    """Returns batches of `count` validation images of every task, with a fixed seed."""
    return [
        list(setups.drawn(setup, task.validation, count).batches)
        for task in setup.tasks
    ]


ADAMERGING_STEPS = 500


def adamerging(
    setup: setups.Setup,
    taus: Taus,
    *,
    scope: Literal["layer", "task"] = "layer",
    coef: float = 0.3,
    density: float | None = None,
) -> Tree:
    """Merges by AdaMerging on unlabelled test images, as its paper does.

    Yang et al. AdaMerging: Adaptive Model Merging for Multi-Task Learning. ICLR 2024.
    It takes 500 steps of Adam at 1e-3 from `coef`. Each step minimises the entropy on
    16 test images of every task.

    Args:
      setup: the model and the T tasks of the vectors.
      taus: the T task vectors.
      scope: one coefficient per task and parameter tensor, or one per task.
      coef: initial value of the coefficients.
      density: share of entries that AdaMerging++ keeps; None for AdaMerging.
    """
    # Every process runs the network on one device, whatever the mesh.
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    steps, count = ADAMERGING_STEPS, len(setup.tasks)
    planned.passes(setup, 3 * 16 * steps * count)  # a backward pass counts as two
    if setup.options.smoke or setup.full:
        steps = 2
    padded = heads.pad([task.test.head for task in setup.tasks])

    def batches(index):
        own = {name: leaf[index] for name, leaf in padded.items()}
        samples = pipeline.evaluation_stream(
            sources.limited(setup.tasks[index].test.source, 16 * steps),
            16,
            preprocess=sources.Preprocessed(setup.preprocess),
            workers=min(setup.options.workers, 1),  # per task
        )
        epochs = itertools.chain.from_iterable(itertools.repeat(samples))

        def following(step):
            del step  # called once per task in each step
            batch = next(epochs)
            return {"image": batch["image"], "mask": batch["mask"], **own}

        return following

    count = len(setup.tasks)
    adapted = merge.adamerging(
        params_0,
        taus,
        [_logits(setup.apply_fn)] * count,
        [batches(index) for index in range(count)],
        scope=scope,
        coef=coef,
        steps=steps,
        learning_rate=1e-3,
        density=density,
    ).params
    return task_vectors.difference(adapted, params_0)


@functools.cache  # equal functions are compiled once
def _logits(apply_fn):
    def logits(params, batch):
        features = apply_fn(params, batch["image"])
        return heads.logits(batch["head"], features, batch["valid"])

    return logits
