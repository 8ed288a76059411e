"""The image tasks of the task-arithmetic papers, from folders, TFDS or the hub.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023, and Ortiz-Jimenez et al.
Task Arithmetic in the Tangent Space. NeurIPS 2023, whose splits, class names and prompt
templates are in `vision_tasks.json`.

A tenth of the training split, at most 5,000 samples, is used for validation. The
samples are drawn by index, as in the papers' code. They are the papers' samples only if
the source keeps the papers' order: MNIST and SVHN on the hub; folders of GTSRB and
ImageNet with the original file names; of SUN397 with a flat folder for each class; and
of DTD with both training parts in one folder. TFDS shuffles when it prepares a set.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxarith import files, report, tree
from jaxarith.data import sources, splits
from jaxarith.data.images import ImageTask
from jaxarith.data.task_info import EIGHT as EIGHT
from jaxarith.data.task_info import (
    SOURCES,
    TASKS,
    Kind,
    Layout,
    TaskInfo,
    label_map,
)


class Found(NamedTuple):
    """Data that was found for a task: source, place, and functions to open splits."""

    source: Kind
    place: str
    splits: dict[str, Callable]


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    source: Kind | None = None,
) -> ImageTask:
    """Loads a task with the class names, templates and splits of the papers.

    Without `source`, the first of these that exists is used: the image folder
    `data_dir/NAME`, with `train/<class>/*` and `test/<class>/*`; a TFDS set prepared
    under `data_dir`; the dataset on the Hugging Face hub, which is downloaded. Labels
    are numbered by the source's names of classes, never by their order in the source.
    Validation splits that the papers do not use are not used.

    Sizes are not compared with the papers': `jaxarith data check NAME` does that.

    Args:
      name: one of `TASKS`.
      data_dir: the folder of the data. Without it there is no image folder, and TFDS
        uses its own folder.
      source: "folder", "tfds" or "hub", to use only this one.

    Returns:
      The task. Its sources yield raw samples, `{"image": PIL image, "label": int}`,
      which are decoded on access. They have `labels`, `i32[N]`, and can be pickled.

    Raises:
      ValueError: the task or the source is unknown, or the data has other classes or
        splits, an empty class, or a file in two splits.
      FileNotFoundError: no data was found; the message says how to prepare it.

    Example:
      >>> task = load("mnist", "data", source="folder")  # doctest: +SKIP
    """
    return assemble(*locate(name, data_dir, source))


def load_folder(name: str, folder: str | os.PathLike) -> ImageTask:
    """Loads a task of your own from an image folder.

    The folder has `train/<class>/*` and `test/<class>/*`. It may have
    `validation/<class>/*`; otherwise a tenth of the training samples is used for
    validation. Classes have the names of their folders, with `_` read as a space, and
    the template is "a photo of a {}.". A file `task.json` may state others:
    `{"classes": [...], "templates": [...]}`, or `"classes": {folder: name}`. Labels are
    numbered in its order, or else in the order of the sorted folders.

    Args:
      name: name of the task.
      folder: the image folder.

    Raises:
      ValueError: a split is missing, empty or overlaps another, a class is unknown or
        empty, or `task.json` has another form.
      FileNotFoundError: the folder does not exist.
    """
    return assemble(*locate_folder(name, folder))


def locate(
    name: str,
    data_dir: str | os.PathLike | None = None,
    source: Kind | None = None,
) -> tuple[TaskInfo, Found]:
    """Finds the facts and the data of a task, as `load` does before opening it."""
    if name not in TASKS:
        raise ValueError(
            f"there is no task {name!r}; the tasks are {', '.join(TASKS)}. "
            "For another image folder, use `load_folder`."
        )
    if source not in (None, *SOURCES):
        raise ValueError(f"source is {source!r}; expected one of {', '.join(SOURCES)}.")
    info, tried = TASKS[name], []
    finders = {"folder": _in_folder, "tfds": _in_tfds, "hub": _on_hub}
    for kind in SOURCES if source is None else (source,):
        found = finders[kind](info, data_dir)
        if isinstance(found, Found):
            return info, found
        tried.append(
            f"  {kind}: {found}\n    to prepare: {command(info, kind, data_dir)}"
        )
    raise FileNotFoundError(
        "\n".join([f"no data of {name} was found. Tried:", *tried])
        + (f"\n  note: {info.note}" if info.note else "")
    )


def locate_folder(name: str, folder: str | os.PathLike) -> tuple[TaskInfo, Found]:
    """Finds the facts about the task in an image folder, for `load_folder`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}. Check the path.")
    found = Found("folder", str(folder), sources.folder_splits(folder))
    if "train" not in found.splits:
        raise ValueError(
            f"{folder} has no split train; it has {_names(found.splits)}. "
            "It must contain train/<class>/* and test/<class>/*."
        )
    train = found.splits["train"]()
    path = Path(folder) / "task.json"
    raw = _task_file(path) if path.exists() else {}
    named = raw.get("classes", {n: n.replace("_", " ") for n in train.names})
    named = named if isinstance(named, dict) else {name: name for name in named}
    if len(set(named.values())) < len(named):
        raise ValueError(
            f"{path}: two classes have the same name: {_names(named.values())}"
        )
    layouts = (
        Layout(("train",), ("validation",), ("test",)),
        Layout(("train",), (), ("test",)),
    )
    info = TaskInfo(
        name,
        name,
        tuple(named.values()),
        tuple((label,) for label in named),
        tuple(raw.get("templates", ("a photo of a {}.",))),
        layouts={"folder": layouts},
    )
    return info, found


def assemble(info: TaskInfo, found: Found) -> ImageTask:
    """Opens the data that was found and makes the papers' parts, for `load`.

    Raises:
      ValueError: the data has other splits or classes, an empty class, or a file in two
        splits.
    """
    layout = layout_of(info, found)
    names = [split for part in layout for split in part]
    readers = {name: found.splits[name]() for name in names}
    maps = {
        name: label_map(info, reader.names, f"{found.place}, {name}")
        for name, reader in readers.items()
    }
    # In a user's own folder, validation and test splits may lack classes.
    partial = layout.validation + layout.test if info.train is None else ()
    complete = {name: m for name, m in maps.items() if name not in partial}
    _check_complete(info, complete, found)
    if found.source == "folder":
        _check_disjoint(readers)

    def samples(split, indices=None):
        return sources.Samples(
            [readers[name] for name in split], [maps[name] for name in split], indices
        )

    everything = samples(layout.train)
    if not layout.test:
        parts = one_split(everything.labels, len(info.classes))
        parts = [samples(layout.train, indices) for indices in parts]
    elif layout.validation:
        parts = [everything, samples(layout.validation), samples(layout.test)]
    else:
        parts = splits.train_validation(len(everything))
        parts = [samples(layout.train, indices) for indices in parts]
        parts.append(samples(layout.test))
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if not len(part):
            raise ValueError(
                f"{found.place} has too few samples in {_names(layout.train)} "
                f"({len(everything)}): none is left for {name}. Add samples, or a "
                f"split {name}."
            )
    origin = found.source
    if info.train is None:  # another own folder may have the same name
        files = [readers[name].checksum() for name in layout.train]
        origin = " ".join([origin, *(f"{checksum:08x}" for checksum in files)])
    train, validation, test = parts
    return ImageTask(
        name=info.name,
        classes=info.classes,
        templates=info.templates,
        train=train,
        validation=validation,
        test=test,
        origin=origin,
    )


def one_split(
    labels: ArrayLike, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of three parts of samples that come as one split.

    The samples are ordered by `splits.torch_permutation`. Let n be a tenth of the
    average class (270 for EuroSAT). Then the first n of each class are for validation,
    and the next n for testing.

    Args:
      labels: `i[N]`.
      classes: the number of classes.

    Returns:
      `(train, validation, test)`, disjoint, together `0..N-1`.
    """
    found = np.asarray(labels)
    order = splits.torch_permutation(len(found))
    share = len(found) // (10 * classes)
    taken = np.zeros(classes, int)
    part = np.zeros(len(found), int)
    for place, label in enumerate(found[order]):
        part[place] = 1 + taken[label] // share if taken[label] < 2 * share else 0
        taken[label] += 1
    train, validation, test = (order[part == i] for i in range(3))
    return train, validation, test


def command(
    info: TaskInfo, source: Kind, data_dir: str | os.PathLike | None = None
) -> str:
    """Returns the command that prepares a task's data for a source."""
    root = data_dir or "DATA_DIR"
    if source == "folder":
        layout = info.layouts["folder"][0]
        parts = " and ".join(
            f"{root}/{info.name}/{split}/<class>/" for part in layout for split in part
        )
        return f"put its images into {parts}"
    if source == "tfds" and info.tfds:
        where = f" --data_dir={data_dir}" if data_dir else ""
        return (
            "pip install tensorflow 'jaxarith[data]' && "
            f"tfds build {info.tfds}{where} --file_format=array_record"
        )
    if source == "hub" and info.hub:
        given = ", ".join(repr(v) for v in (info.hub.id, info.hub.config) if v)
        load = f"from datasets import load_dataset; load_dataset({given})"
        return f"pip install 'jaxarith[data]' && python -c \"{load}\""
    return "not possible"


def _in_folder(info, data_dir):
    if data_dir is None:
        return "no data_dir was given."
    folder = Path(data_dir) / info.name
    found = sources.folder_splits(folder)
    # The folder may be a TFDS set of this name; that has versions, not splits.
    if "train" in found:
        return Found("folder", str(folder), found)
    return f"{folder}/train is not a folder."


def _in_tfds(info, data_dir):
    if info.tfds is None:
        return f"TFDS has no {info.name} with the papers' splits."
    try:
        found = sources.tfds_splits(info.tfds, data_dir)
    except ImportError as error:
        return f"pip install 'jaxarith[data]' is needed: {error}."
    place = Path(data_dir or "~/tensorflow_datasets") / info.tfds
    return Found("tfds", str(place), found) if found else f"{place} is not prepared."


def _on_hub(info, data_dir):
    del data_dir
    if info.hub is None:
        return f"no dataset of {info.name} on the hub is known."
    hub, (layout,) = info.hub, info.layouts["hub"]
    opened = {}
    for split in itertools.chain(*layout):
        try:
            opened[split] = sources.open_hub(
                hub.id, hub.config, split, hub.image, hub.label
            )
        except ImportError as error:
            return f"pip install 'jaxarith[data]' is needed: {error}."
        except sources.NoColumn:
            raise
        except Exception as error:  # from the network, the hub or the dataset
            first = str(error).strip().split("\n")[0]
            return f"{hub.id}, {split}: {type(error).__name__}: {first}"
    place = " ".join(filter(None, (hub.id, hub.config)))
    return Found(
        "hub", place, {split: lambda r=reader: r for split, reader in opened.items()}
    )


def layout_of(info: TaskInfo, found: Found) -> Layout:
    """Returns the first of a task's layouts whose splits were found.

    Raises:
      ValueError: no layout's splits were found.
    """
    layouts = info.layouts[found.source]
    for layout in layouts:
        if all(split in found.splits for part in layout for split in part):
            return layout
    wanted = " or ".join(
        "+".join(split for part in layout for split in part) for layout in layouts
    )
    raise ValueError(
        f"{found.place} has the splits {_names(found.splits)}, but "
        f"{info.name} needs {wanted}."
    )


def _check_complete(info, maps, found):
    for name, labels in maps.items():
        missing = sorted(set(range(len(info.classes))) - set(labels.tolist()))
        if missing:
            raise ValueError(
                f"{found.place}, {name} lacks {len(missing)} of the "
                f"{len(info.classes)} classes of {info.name}: "
                f"{report.listed([info.classes[i] for i in missing])}. Add images."
            )


def _check_disjoint(readers):
    for a, b in itertools.combinations(readers, 2):
        shared = sources.shared_files(readers[a], readers[b])
        if shared:
            are = tree.counted(len(shared), "file is", "files are")
            raise ValueError(
                f"the splits {a} and {b} overlap: {are} in both, such as "
                f"{shared[0][1]}, which is {shared[0][0]}. Remove them from one of the "
                "splits."
            )


def _task_file(path) -> dict:
    form = '{"classes": [...] or {folder: name}, "templates": ["... {} ..."]}'
    try:
        raw = files.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}. Expected {form}.") from error
    if not _is_task(raw):
        raise ValueError(f"{path} must be {form}, with one {{}} in every template.")
    return raw


def _is_task(raw: Any) -> bool:
    if not isinstance(raw, dict) or not raw.keys() <= {"classes", "templates"}:
        return False
    classes, templates = raw.get("classes", []), raw.get("templates", ["{}"])
    if not isinstance(classes, list | dict) or not isinstance(templates, list):
        return False
    texts = [*classes, *templates]
    texts += classes.values() if isinstance(classes, dict) else []
    if not templates or not all(isinstance(text, str) for text in texts):
        return False
    return all(map(_is_template, templates))


def _is_template(text: str) -> bool:
    try:
        return text.count("{}") == 1 and text.format("x") == text.replace("{}", "x")
    except (LookupError, ValueError):  # other fields, or single braces
        return False


def _names(splits) -> str:
    return ", ".join(splits) or "none"
