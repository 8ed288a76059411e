"""Shared code of the scripts on two pre-trained CLIPs: their setups, and losses.

The paper uses two checkpoints of OpenCLIP, ViT-B/32 on LAION-2B:

1. `laion2b_e16`, 16 epochs: `timm/vit_base_patch32_clip_224.laion2b_e16` on the Hugging
   Face Hub, in OpenCLIP's format, which is read directly.
2. `laion2b_s34b_b79k`, with a larger batch and learning rate, in the format of
   transformers: `laion/CLIP-ViT-B-32-laion2B-s34B-b79K`.

A folder is taken for one of these models if the last part of its path is the same; the
paper's numbers are then shown beside ours.

Both models have the same widths, so parameters of one can be subtracted from those of
the other.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.bases import partitions
from experiments.common.vision import options, raw_tasks, scores, setups
from jaxarith import fingerprint, hub, sharding, task_vectors, tree
from jaxarith.models import clip, heads
from jaxarith.sharding import processes
from jaxarith.typing import Taus

FIRST = partitions.LAION_B32
SECOND = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
# The names in the paper's tables, in their order.
TITLES = ("laion2b_e16", "laion2b_s34b_b79k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """Options of scripts on two CLIPs."""

    models: tuple[str, str] = (FIRST, SECOND)
    """Two CLIPs of the same architecture: folders, or ids of the Hugging Face Hub."""


def both(config: Options) -> list[setups.Setup]:
    """Loads the setups of both models.

    A smoke run uses tiny_clip, and a noisy copy that it saves in the output folder.

    Raises:
      ValueError: the parameters of the models differ in names or shapes, or the models
        have the same name, which would mix them up in the bank.
    """
    names = [Path(model).name for model in config.models]
    if len(set(names)) < 2 and not config.smoke:
        raise ValueError(
            f"--models {config.models}: the two folders have the same name. Rename one."
        )
    first = setups.load(config, config.models[0], control=False)
    if config.smoke:
        found = [first, noisy(first)]
    else:
        found = [first, setups.load(config, config.models[1], control=False)]
    shapes = [
        {path: np.shape(leaf) for path, leaf in tree.flatten(setup.params_0).items()}
        for setup in found
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{config.models[0]} and {config.models[1]} have parameters with different "
            "names or shapes. Name two models with the same architecture."
        )
    # In a plan both are the same stand-in.
    if not config.plan and found[0].identity == found[1].identity:
        raise ValueError(
            f"--models {config.models}: both have the same parameters. Name two "
            "different models."
        )
    return found


def noisy(setup: setups.Setup, share: float = 0.05) -> setups.Setup:
    """Returns the setup with Gaussian noise added to the model, as a second model.

    Args:
      setup: setup of a smoke run.
      share: norm of the noise in every leaf, relative to the norm of the leaf.
    """
    original = clip.load(setup.model)
    folder = setup.options.out / "noisy_clip"
    noise = task_vectors.random_like(jax.random.key(1), original.params)
    params = task_vectors.apply(original.params, noise, share)
    processes.on_first(
        lambda: hub.save(
            folder,
            sharding.to_host(params),
            hub.read_json(original.folder),
            copy_from=original.folder,
            overwrite=True,
        )
    )
    checkpoint = clip.load(folder)
    params_0 = tree.select(checkpoint.params, clip.IMAGE_ENCODER)

    def task_of(spec):
        raw = raw_tasks.named(spec, setup.options)
        file = folder / "heads" / f"{raw.name}.safetensors"
        head = setups.head_of(raw, checkpoint, file)
        return setups.prepared(raw, head, setup.preprocess, setup.options)

    return setup._replace(
        model=str(folder),
        params_0=sharding.shard(params_0, setup.mesh),
        identity=fingerprint.combined(params_0),
        tasks=[task_of(spec) for spec in setup.options.tasks],
    )


def titles(found: Sequence[setups.Setup]) -> list[str]:
    """Returns the names of the two models: the paper's for its own models."""
    papers = zip((FIRST, SECOND), TITLES, strict=True)
    known = {Path(model).name: title for model, title in papers}
    names = [Path(setup.model).name for setup in found]
    return [known.get(name, name) for name in names]


def losses(setup: setups.Setup, task: setups.Task, taus: Taus, coefs) -> np.ndarray:
    """Returns mean cross-entropies of the network on a task's test data, `[n]`.

    `coefs` are n sets of coefficients `[n, T]`.
    """
    at = scores.outputs(setup, taus, task.test, False)
    return np.array(
        [loss(task.test, features) for features in at(np.asarray(coefs, float))]
    )


def loss(dataset: setups.Dataset, features) -> float:
    """Returns the mean cross-entropy of features `[N, D]` below the frozen head."""
    logits = np.asarray(heads.logits(dataset.head, features), np.float64)
    return cross_entropy(logits, dataset.labels)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy of scores `[N, C]`, in float64.

    Example:
      >>> round(cross_entropy(np.zeros((2, 4)), np.array([0, 3])), 4)  # log 4
      1.3863
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalizers = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(normalizers - shifted[np.arange(len(labels)), labels]))
