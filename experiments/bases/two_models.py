"""What the scripts on two pre-trained CLIPs share: a setup of each, and losses.

The paper's are two checkpoints of OpenCLIP, ViT-B/32 on LAION-2B:

1. `laion2b_e16`, 16 epochs: `timm/vit_base_patch32_clip_224.laion2b_e16` on the Hugging
   Face Hub, in OpenCLIP's format, which is read as it is.
2. `laion2b_s34b_b79k`, with a larger batch and learning rate, in the format of
   transformers: `laion/CLIP-ViT-B-32-laion2B-s34B-b79K`.

Folders with the same last part of their names count as the same models: the paper's
numbers stand beside theirs.

Both have the same widths, so that parameters of one can be subtracted from those of the
other.
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
# In the order of the paper's tables, as they are printed there.
TITLES = ("laion2b_e16", "laion2b_s34b_b79k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The options of scripts on two CLIPs."""

    models: tuple[str, str] = (FIRST, SECOND)
    """Two CLIPs of the same architecture: folders, or ids of the Hugging Face Hub."""


def both(config: Options) -> list[setups.Setup]:
    """The setup of each of the two models; of a smoke run of tiny_clip, and of a copy
    with noise, saved in the output folder.

    Raises:
      ValueError: the parameters of the models differ in names or shapes, or their
        folders, by whose names the bank knows them, are called the same.
    """
    names = [Path(model).name for model in config.models]
    if len(set(names)) < 2 and not config.smoke:
        raise ValueError(f"--models {config.models}: the folders have one name.")
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
            f"{config.models[0]} and {config.models[1]} have parameters of other "
            "names or shapes; the two models must be of one architecture."
        )
    # In a plan one stand-in is both.
    if not config.plan and found[0].identity == found[1].identity:
        raise ValueError(f"the two --models are the same: {config.models[0]}.")
    return found


def noisy(setup: setups.Setup, share: float = 0.05) -> setups.Setup:
    """The setup of the same model with Gaussian noise, as of another pre-training.

    Args:
      setup: setup of a smoke run.
      share: the norm of the noise in every leaf, relative to that of the leaf.
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
    """What the two models are called: as in the paper, where they are its own."""
    papers = zip((FIRST, SECOND), TITLES, strict=True)
    known = {Path(model).name: title for model, title in papers}
    names = [Path(setup.model).name for setup in found]
    return [known.get(name, name) for name in names]


def losses(setup: setups.Setup, task: setups.Task, taus: Taus, coefs) -> np.ndarray:
    """The mean cross-entropy of the ordinary model on a task's test data, `[n]`, at
    each of n sets of coefficients `[n, T]`."""
    at = scores.outputs(setup, taus, task.test, False)
    return np.array(
        [loss(task.test, features) for features in at(np.asarray(coefs, float))]
    )


def loss(dataset: setups.Dataset, features) -> float:
    """The mean cross-entropy of features `[N, D]` under the frozen head, in float64."""
    logits = np.asarray(heads.logits(dataset.head, features), np.float64)
    return cross_entropy(logits, dataset.labels)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over samples, of scores `[N, C]` in float64.

    Example:
      >>> round(cross_entropy(np.zeros((2, 4)), np.array([0, 3])), 4)  # log 4
      1.3863
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalizers = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(normalizers - shifted[np.arange(len(labels)), labels]))
