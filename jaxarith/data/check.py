"""`jaxarith data check`: reports which image tasks were found, and what they lack."""

import contextlib
import itertools
import os
from pathlib import Path

import numpy as np
import tqdm

from jaxarith import report, tree
from jaxarith.data import images, sources, vision
from jaxarith.data.images import ImageTask
from jaxarith.data.task_info import Kind

PARTS = ("train", "validation", "test")
_HEADER = ("part", "samples", "papers", "classes", "least", "median", "most")


def main(
    name: str,
    data_dir: str | os.PathLike | None = None,
    source: Kind | None = None,
    every: bool = False,
) -> bool:
    """Prints where the data of one task or of all tasks was found, and its problems.

    Nothing is downloaded: only those of the hub's datasets count that are in its cache.

    Args:
      name: one of `vision.TASKS`, "all", or an image folder of your own.
      data_dir, source: as for `vision.load`.
      every: whether to decode every image; otherwise only the first of each part.

    Returns:
      Whether everything is as in the papers.
    """
    names = tuple(vision.TASKS) if name == "all" else (name,)
    bad = [name for name in names if not _check(name, data_dir, source, every)]
    if len(names) > 1:
        print(f"{len(names) - len(bad)} of {len(names)} tasks are complete.")
        if bad:
            print(f"Not complete: {', '.join(bad)}.")
    return not bad


def _check(name, data_dir, source, every) -> bool:
    own = name not in vision.TASKS and Path(name).is_dir()
    try:
        with _offline():
            if own:
                info, found = vision.locate_folder(Path(name).resolve().name, name)
            else:
                info, found = vision.locate(name, data_dir, source)
        print(f"{info.name} ({info.title}): {found.source}, {found.place}")
        warnings = _report(info, found, every)
    except (ValueError, OSError) as error:
        if name not in vision.TASKS and not own:
            raise
        print(f"{error}\n")
        return False
    for warning in warnings:
        print(f"WARNING: {warning}")
    if info.note:
        print(f"note: {info.note}")
    print()
    return not warnings


def _report(info, found, every) -> list[str]:
    """Prints the parts and their classes; returns their problems."""
    task = vision.assemble(info, found)
    print(report.markdown_table(_HEADER, list(_rows(info, task))))
    print(_naming(info, found))
    return [
        *_sizes(info, task),
        *_classes(info, task),
        *_copies(info, found),
        *_readable(task, every),
    ]


@contextlib.contextmanager
def _offline():
    try:
        import datasets  # noqa: F401, because its import copies the constant
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _parts(task: ImageTask):
    return [(part, getattr(task, part)) for part in PARTS]


def _counts(info, samples) -> np.ndarray:
    return np.bincount(samples.labels, minlength=len(info.classes))


def _rows(info, task):
    sizes = info.sizes or (None,) * len(PARTS)
    for (part, samples), size in zip(_parts(task), sizes, strict=True):
        counts = _counts(info, samples)
        classes = f"{np.count_nonzero(counts)} of {len(counts)}"
        spread = int(counts.min()), float(np.median(counts)), int(counts.max())
        yield [part, len(samples), size, classes, *map(_number, spread)]


def _number(value):
    return int(value) if value == int(value) else value


def _naming(info, found) -> str:
    split = vision.layout_of(info, found).train[0]
    names = found.splits[split]().names
    order = vision.label_map(info, names, found.place)
    same = (order == np.arange(len(order))).all()
    return f"The {len(names)} class names match" + (
        "." if same else ", in another order: labels are numbered by name."
    )


def _sizes(info, task):
    if info.sizes is None:
        return
    for (part, samples), size in zip(_parts(task), info.sizes, strict=True):
        if len(samples) != size:
            count = tree.counted(len(samples), "sample")
            yield f"{part} has {count}; the papers' has {size}."


def _classes(info, task):
    for part, samples in _parts(task):
        # A tenth of a small training split may lack some classes.
        if part == "validation":
            continue
        absent = np.flatnonzero(_counts(info, samples) == 0)
        if len(absent):
            listed = report.listed([info.classes[i] for i in absent])
            count = tree.counted(len(absent), "class", "classes")
            yield f"{part} has no sample of {count}: {listed}."


def _copies(info, found):
    if found.source != "folder":
        return
    names = [split for part in vision.layout_of(info, found) for split in part]
    for a, b in itertools.combinations(names, 2):
        pairs = sources.identical_files(found.splits[a](), found.splits[b]())
        if pairs:
            are = tree.counted(len(pairs), f"file of {b} is", f"files of {b} are")
            yield (
                f"{are} in {a} as well, such as {pairs[0][1]}, a copy of {pairs[0][0]}."
            )


def _readable(task, every: bool):
    for part, samples in _parts(task):
        which = range(len(samples)) if every else range(min(1, len(samples)))
        for i in tqdm.tqdm(which, f"{part}: images", disable=not every):
            try:
                image = samples[i]["image"]
            except ValueError as error:
                yield f"{part}: {error}"
                continue
            try:
                images.rgb(image)
            except ValueError as error:
                yield f"{part}, sample {i}: {error}"
