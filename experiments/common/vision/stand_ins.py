"""What takes the place of data in a plan: eight images for every split of a task."""

import dataclasses
import functools

import numpy as np

from jaxarith.data import images, vision

_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Few:
    """A few made-up images that stand for a split.

    Attributes:
      stands_for: how many samples the split has.
      classes: how many classes.
      whole: whether the source is as long as the split, as that of training is, whose
        length decides on the number of steps; its images come again and again.
    """

    stands_for: int
    classes: int
    whole: bool = False

    def __len__(self) -> int:
        return self.stands_for if self.whole else min(_IMAGES, self.stands_for)

    def __getitem__(self, index) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"image": _images()[index % _IMAGES], "label": index % self.classes}

    @property
    def labels(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int32) % self.classes


@functools.cache
def _images():
    return np.random.default_rng(0).integers(256, size=(_IMAGES, 16, 16, 3), dtype="u1")


def of(task: images.ImageTask) -> images.ImageTask:
    """A task with a few images in place of its own, unless it has them already."""
    if isinstance(task.train, Few):
        return task
    return _with(task, len(task.train), len(task.validation), len(task.test))


def named(name: str) -> images.ImageTask:
    """One of `jaxarith.data.vision`, by what is known of it.

    Raises:
      ValueError: no such task is known.
    """
    if name not in vision.TASKS:
        raise ValueError(
            f"no task {name!r}; known are {', '.join(vision.TASKS)}, and NAME=FOLDER."
        )
    info = vision.TASKS[name]
    task = images.ImageTask(name, info.classes, info.templates, (), (), ())
    known = (info.train or 0, info.validation or 0, info.test or 0)
    within = 0 if name == "eurosat" else known[1]  # what validates is among `train`
    return _with(task, known[0] - within, *known[1:])


def _with(task, train, validation, test):
    count = len(task.classes)
    return dataclasses.replace(
        task,
        train=Few(train, count, whole=True),
        validation=Few(validation, count),
        test=Few(test, count),
        origin="plan",
    )
