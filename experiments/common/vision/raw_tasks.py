"""Loads tasks as raw images.

Tasks come from `jaxarith.data.vision`, with the splits and prompts of the papers, or
from plain image folders. A smoke run uses three tasks of the quickstart.
"""

import dataclasses
import zlib
from pathlib import Path

import numpy as np

from experiments.common import script
from experiments.common.vision import small_tasks, sources, stand_ins
from experiments.common.vision.options import NO_CONTROL, Options
from jaxarith.data import images, vision


def of_options(options: Options, control: bool) -> list[images.ImageTask]:
    """Loads the tasks as raw images, the control last; reports all problems at once."""
    control = control and options.control != NO_CONTROL
    specs = [*options.tasks, *([options.control] if control else [])]
    names = [name_of(spec) for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"every task, control included, may be given once; got {specs}. Remove the "
            "repeated ones."
        )
    errors = (FileNotFoundError, ValueError)

    def read(spec):
        try:
            return named(spec, options)
        except errors as error:
            if not control or spec != options.control:
                raise
            raise ValueError(
                f"{error}\nThis is the control task: name another one by --control, or "
                f"do without one by --control {NO_CONTROL}."
            ) from error

    return script.collected(specs, read, errors=errors)


def name_of(spec: str) -> str:
    """Returns the name of a task that is given as NAME or as NAME=FOLDER.

    Example:
      >>> name_of("dtd"), name_of("dogs=images/dogs")
      ('dtd', 'dogs')
    """
    return spec.partition("=")[0]


def title_of(name: str) -> str:
    """Returns the papers' name of a task, or its own name."""
    return vision.TASKS[name].title if name in vision.TASKS else name


def named(spec: str, options: Options) -> images.ImageTask:
    """Loads a task of raw images by its name, or by `NAME=FOLDER`."""
    name, equals, folder = spec.partition("=")
    if options.smoke:
        task = small_tasks.load(name, np.asarray)
    elif equals:
        task = vision.load_folder(name, Path(folder))
    elif options.source == "small":
        task = small_tasks.load(name, np.asarray)
    elif options.plan:
        task = stand_ins.named(name)
    else:
        task = vision.load(name, options.data_dir, source=options.source)
    if options.plan:
        task = stand_ins.of(task)
    if options.samples is None:
        return task
    splits = {
        split: sources.limited(getattr(task, split), options.samples)
        for split in ("train", "validation", "test")
    }
    return dataclasses.replace(task, **splits)


def identity_of(task: images.ImageTask) -> dict:
    """Returns number, origin and checksum of labels of a task's training samples.

    TFDS sets have no checksum: TFDS would read whole samples to find the labels, and it
    has only one set of each name.
    """
    identity = {"samples": len(task.train), "source": task.origin}
    if task.origin != "tfds":
        identity["labels"] = zlib.crc32(sources.labels(task.train).tobytes())
    return identity
