"""Facts about the image tasks: their classes, prompts, sizes and sources.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023, and Ortiz-Jimenez et al.
Task Arithmetic in the Tangent Space. NeurIPS 2023, whose class names and prompt
templates are in `vision_tasks.json`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxarith import report

EIGHT = (
    "stanford_cars",
    "dtd",
    "eurosat",
    "gtsrb",
    "mnist",
    "resisc45",
    "sun397",
    "svhn",
)


Kind = Literal["folder", "tfds", "hub"]
SOURCES = get_args(Kind)


class Layout(NamedTuple):
    """The splits of a source that make up a task's parts.

    Without `validation`, a part of `train` is used for it. Without `test`, the only
    split is divided: n samples of each class are for validation and n for testing,
    where n is a tenth of the average class's samples (270 for EuroSAT).
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face hub: its id, configuration and columns."""

    id: str
    config: str | None = None
    image: str = "image"
    label: str = "label"


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Facts about a task.

    Attributes:
      name: the name of the task, for example "stanford_cars".
      title: the name that the papers print.
      classes: names in the order of the labels, as they appear in prompts.
      labels: other names that sources use for each class.
      templates: the prompts, with one `{}` each.
      train, validation, test: numbers of samples in the training split, in the
        validation part and in the test split; None if unknown. The validation samples
        are among the training samples, except for EuroSAT.
      epochs: epochs of fine-tuning in the papers' code.
      tfds: name in TFDS; None if TFDS lacks the task or has other splits.
      hub: dataset on the hub; None if the hub lacks the task or has other splits.
      layouts: the layouts by source; the first whose splits exist is used.
      note: special facts about the task's data.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    epochs: int | None = None
    tfds: str | None = None
    hub: Hub | None = None
    layouts: Mapping[str, tuple[Layout, ...]] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """Numbers of samples in the parts of `load`, if the source is the papers'."""
        if self.train is None or self.validation is None or self.test is None:
            return None
        own = any(layout.validation for layout in self.layouts["folder"])
        train = self.train if own else self.train - self.validation
        return train, self.validation, self.test


def _read(name: str, raw: dict) -> TaskInfo:
    def layouts(source):
        given = raw.get(source, {})
        given = given.get("layouts") if isinstance(given, dict) else None
        return tuple(
            Layout(**{part: tuple(names.split("+")) for part, names in one.items()})
            for one in given or [{"train": "train", "test": "test"}]
        )

    hub = {k: v for k, v in raw.get("hub", {}).items() if k != "layouts"}
    train, validation, test = raw["sizes"]
    return TaskInfo(
        name=name,
        title=raw["title"],
        classes=tuple(raw["classes"]),
        labels=tuple(map(tuple, raw.get("labels", [()] * len(raw["classes"])))),
        templates=tuple(raw["templates"]),
        train=train,
        validation=validation,
        test=test,
        epochs=raw.get("epochs"),
        tfds=raw.get("tfds", {}).get("name"),
        hub=Hub(**hub) if hub else None,
        layouts={source: layouts(source) for source in SOURCES},
        note=raw.get("note", ""),
    )


TASKS: Mapping[str, TaskInfo] = {
    name: _read(name, raw)
    for name, raw in json.loads(
        (Path(__file__).parent / "vision_tasks.json").read_text(encoding="utf-8")
    ).items()
}


def label_map(info: TaskInfo, names: Sequence[str], place: str) -> np.ndarray:
    """Returns the labels of a source's classes by their names.

    Case, blanks and punctuation do not count: "AnnualCrop", "annual_crop" and "Annual
    Crop" are one name.

    Args:
      info: the task.
      names: the source's names of its classes, in its order.
      place: the name of the source in errors.

    Returns:
      `i32[len(names)]`.

    Raises:
      ValueError: a name is not a class of the task, or two names are one class.
    """
    known = _known(info)
    labels = [known.get(name, known.get(_key(name))) for name in names]
    unknown = [n for n, label in zip(names, labels, strict=True) if label is None]
    double = len(set(labels) - {None}) < len(labels) - len(unknown)
    if unknown or double:
        missing = [info.classes[i] for i in range(len(info.classes)) if i not in labels]
        raise ValueError(
            f"{place} does not have the classes of {info.name}.\n"
            f"  only there ({len(unknown)}): {report.listed(unknown)}\n"
            f"  only in {info.name} ({len(missing)}): {report.listed(missing)}"
            + ("\n  and two of its names are the same class." if double else "")
        )
    return np.asarray(labels, np.int32)


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _known(info: TaskInfo) -> dict[str, int]:
    """Returns the class of each name that only one class has; sources' names first."""
    own = [(name,) for name in info.classes]
    known: dict[str, int] = {}
    for spelled in (_key, str):
        for names in (own, info.labels):
            owners: dict[str, set[int]] = {}
            for i, of_class in enumerate(names):
                for name in of_class:
                    owners.setdefault(spelled(name), set()).add(i)
            known |= {name: min(i) for name, i in owners.items() if len(i) == 1}
    return known
