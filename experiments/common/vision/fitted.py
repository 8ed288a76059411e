"""Merges that look at images: Fisher, RegMean, ESM, AdaMerging.

None looks at labels. Each gives a merged task vector, to be added at coefficient 1.
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

SAMPLES = 256  # of every task; so many have the public tables of FusionBench
ESM_SAMPLES = 32  # as many as its paper takes


def fisher(setup: setups.Setup, taus: Taus) -> Tree:
    """The Fisher merge on 256 validation images of every task (Matena and Raffel 2022).

    Args:
      setup: the model and the T tasks of the vectors, see `vision.Setup._replace`.
      taus: their vectors.
    """
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    padded = heads.pad([task.test.head for task in setup.tasks])

    def logits_of(params, images):
        features = setup.apply_fn(params["encoder"], images)
        head = params["head"]
        return heads.logits(head["head"], features, head["valid"])

    merged = study_merges.fisher(
        *(logits_of, params_0, taus),
        # Heads are inputs, padded to one shape, so that tasks share one compilation.
        [jax.tree.map(lambda x, i=i: x[i], padded) for i in range(len(taus))],
        validation_samples(setup),
        key=jax.random.key(setup.options.seed),
        inputs=("image",),
    )
    return task_vectors.difference(merged, params_0)


def regmean(setup: setups.Setup, taus: Taus) -> Tree:
    """The RegMean merge on 256 validation images of every task (Jin et al. 2023)."""
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    grams = _input_grams(setup, params_0, taus, SAMPLES)
    return task_vectors.difference(merge.regmean(params_0, taus, grams), params_0)


def esm(setup: setups.Setup, taus: Taus) -> Tree:
    """The ESM merge on 32 validation images of every task (arXiv:2606.19164)."""
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    grams = _input_grams(setup, params_0, taus, ESM_SAMPLES)
    return task_vectors.difference(merge.esm(params_0, taus, grams), params_0)


def _input_grams(setup, params_0, taus, count):
    samples = validation_samples(setup, count)
    return study_merges.input_grams(
        setup.apply_fn, params_0, taus, samples, inputs=("image",)
    )


def validation_samples(setup: setups.Setup, count: int = SAMPLES) -> list[list[dict]]:
    """Batches of some validation images of every task, drawn with a fixed seed."""
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
    """AdaMerging on unlabelled test images, as its paper has it (Yang et al. 2024).

    500 steps of Adam at 1e-3 from `coef`, on the entropy of batches of 16 test images
    of every task.

    Args:
      setup: the model and the T tasks of the vectors.
      taus: their vectors.
      scope: one coefficient per task and parameter tensor, or one per task.
      coef: where the coefficients start.
      density: the share of entries that AdaMerging++ keeps; none is AdaMerging.
    """
    # It runs the network on one device, whatever the mesh, in every process.
    params_0, taus = sharding.to_host((setup.params_0, list(taus)))
    steps, count = ADAMERGING_STEPS, len(setup.tasks)
    planned.passes(setup, 3 * 16 * steps * count)  # a backward pass is two more
    if setup.options.smoke or setup.full:
        steps = 2
    padded = heads.pad([task.test.head for task in setup.tasks])

    def batches(index):
        own = {name: leaf[index] for name, leaf in padded.items()}
        samples = pipeline.evaluation_stream(
            sources.limited(setup.tasks[index].test.source, 16 * steps),
            16,
            preprocess=sources.Preprocessed(setup.preprocess),
            workers=min(setup.options.workers, 1),  # for each of the tasks
        )
        epochs = itertools.chain.from_iterable(itertools.repeat(samples))

        def following(step):
            del step  # every task is asked once in each step
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


@functools.cache  # the same function of a model is compiled once
def _logits(apply_fn):
    def logits(params, batch):
        features = apply_fn(params, batch["image"])
        return heads.logits(batch["head"], features, batch["valid"])

    return logits
