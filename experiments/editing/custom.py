"""Makes tasks from other tasks, for the experiments of the editing paper."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common import bank
from experiments.common.vision import setups, sources
from jaxarith import task_vectors
from jaxarith.data import images
from jaxarith.models import clip
from jaxarith.typing import Taus, Tree


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """Some samples of a source, with new labels.

    Attributes:
      source: raw images.
      indices: indices of the samples in the source, `i[N]`.
      labels: their new labels, `i32[N]`.
    """

    source: Any
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index) -> dict:
        sample = self.source[int(self.indices[index])]
        return sample | {"label": self.labels[index]}


def some_classes(source, kept: Sequence[int]) -> Relabelled:
    """Returns the samples of some classes, renumbered in the order of `kept`.

    Example:
      >>> source = [{"image": "a", "label": 2}, {"image": "b", "label": 0}]
      >>> print(some_classes(source, [2])[0])
      {'image': 'a', 'label': np.int32(0)}
    """
    wanted = np.asarray(kept)
    order = np.argsort(wanted)
    labels = sources.labels(source)
    [indices] = np.nonzero(np.isin(labels, wanted))
    new = order[np.searchsorted(wanted, labels[indices], sorter=order)]
    return Relabelled(source, indices, new.astype(np.int32))


def per_class(source, samples: int, seed: int) -> sources.Part:
    """Draws `samples` random samples of every class, or all if a class has fewer."""
    labels = sources.labels(source)
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = [order[labels[order] == label][:samples] for label in np.unique(labels)]
    return sources.Part(source, np.sort(np.concatenate(drawn)))


def of_classes(
    task: images.ImageTask, name: str, kept: Sequence[int]
) -> images.ImageTask:
    """Returns a task with some of the classes of another task.

    Raises:
      ValueError: a split has no sample of these classes.
    """
    parts = {
        split: some_classes(getattr(task, split), kept)
        for split in ("train", "validation", "test")
    }
    if empty := [split for split, part in parts.items() if not len(part)]:
        classes = ", ".join(task.classes[i] for i in kept)
        raise ValueError(
            f"{task.name} has no {empty[0]} image of {classes}. Add some, or name "
            "other classes."
        )
    classes = tuple(task.classes[i] for i in kept)
    return dataclasses.replace(task, name=name, classes=classes, **parts)


def prepared(
    setup: setups.Setup, checkpoint: clip.CLIP, task: images.ImageTask
) -> setups.Task:
    """Returns a task ready for training and evaluation; writes its head to the bank."""
    config = setup.options
    file = bank.vector_file(config.bank, setup.model, "heads", task.name)
    head = setups.head_of(task, checkpoint, file)
    return setups.prepared(task, head, setup.preprocess, config)


def analogy(taus: Taus, target: int) -> Tree:
    """Returns the vector of one of four tasks, from the vectors of the other three.

    The first task differs from the second as the third does from the fourth. So the
    vector of each is the sum of its two neighbours minus the opposite one, for example
    king = queen + (man - woman).

    Args:
      taus: the vectors of four tasks.
      target: index of the target; its own vector is not used.

    Example:
      >>> taus = [{"w": np.float32(value)} for value in (9, 3, 10, 4)]
      >>> print(analogy(taus, 1)["w"])
      3.0
    """
    opposite = 3 - target
    b, c = (taus[i] for i in range(4) if i not in (target, opposite))
    return task_vectors.analogy(taus[opposite], b, c)
