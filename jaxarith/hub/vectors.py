"""Files of task vectors, which `save_tree` writes: read under PyTorch's names."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxarith.hub import checks, layouts, safetensors
from jaxarith.hub.stored import Stored


class Vector(NamedTuple):
    """A task vector in a file, not read yet.

    Attributes:
      tensors: by PyTorch's names and in its orientations, in float32 at least.
      task: what it was trained on, by its metadata.
      method: how, where the metadata says so.
    """

    tensors: dict[str, Stored]
    task: str
    method: str | None


def is_vector(model: str | os.PathLike) -> bool:
    """Whether what names a model is the path of a file, rather than of a folder.

    Example:
      >>> is_vector("bank/clip/nonlinear/dtd.safetensors"), is_vector("openai/clip")
      (True, False)
    """
    path = Path(model).expanduser()
    return path.suffix == ".safetensors" and not path.is_dir()


def open_vector(path: str | os.PathLike) -> Vector:
    """Opens a file of a task vector.

    Args:
      path: a file of `save_tree` whose metadata names the task.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt, or is of something else than a task vector.

    Example:
      >>> open_vector("bank/clip/nonlinear/dtd.safetensors").task  # doctest: +SKIP
      'dtd'
    """
    path = Path(path).expanduser()
    stored, metadata = safetensors.open_file(path)
    if "task" not in metadata:
        raise ValueError(
            f"{path} is no task vector: its metadata names no task. Task vectors are "
            'written by hub.save_tree(path, tau, {"task": NAME}). Of a checkpoint, '
            "name the folder."
        )
    checks.check_numeric(stored)
    stored = layouts.stored_to_torch(stored)
    tensors = {name: _widened(leaf) for name, leaf in stored.items()}
    return Vector(tensors, metadata["task"], metadata.get("method"))


def _widened(leaf: Stored) -> Stored:
    """Sums of task vectors are in float32 at least."""
    if leaf.dtype.itemsize >= 4:
        return leaf
    return Stored.made(np.float32, leaf.shape, lambda: leaf.read().astype(np.float32))
