"""Stand-ins for data in a plan: eight images for every split of a task."""

import dataclasses
import functools

import numpy as np

from jaxarith.data import images, vision

_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Few:
    """A few made-up images in place of a split.

    Attributes:
      stands_for: number of samples of the split.
      classes: number of classes.
      whole: whether the source is as long as the split; its images then repeat. The
        training split needs it, because its length sets the number of steps.
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
    """Returns a task with a few made-up images in place of its own."""
    if isinstance(task.train, Few):
        return task
    return _with(task, len(task.train), len(task.validation), len(task.test))


def named(name: str) -> images.ImageTask:
    """Returns a stand-in for a task of `jaxarith.data.vision`, with its known sizes.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in vision.TASKS:
        raise ValueError(
            f"unknown task {name!r}; expected one of {', '.join(vision.TASKS)}, or "
            "NAME=FOLDER."
        )
    info = vision.TASKS[name]
    task = images.ImageTask(name, info.classes, info.templates, (), (), ())
    known = (info.train or 0, info.validation or 0, info.test or 0)
    within = 0 if name == "eurosat" else known[1]  # `train` includes validation
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
