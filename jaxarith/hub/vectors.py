"""Opens files of task vectors, which `save_tree` writes, under PyTorch's names."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxarith.hub import checks, layouts, safetensors
from jaxarith.hub.stored import Stored


class Vector(NamedTuple):
    """A task vector in a file, not read yet.

    Attributes:
      tensors: the tensors under PyTorch's names and in its orientations. Smaller dtypes
        are widened to float32.
      task: the task that it was trained on, from the metadata.
      method: how it was trained, if the metadata says so.
    """

    tensors: dict[str, Stored]
    task: str
    method: str | None


def is_vector(model: str | os.PathLike) -> bool:
    """Whether `model` is the path of a task vector's file rather than of a model.

    Args:
      model: the path of a file or folder, or a model's id on the Hub.

    Returns:
      True if it ends with `.safetensors` and is not a folder. The file need not exist.

    Example:
      >>> is_vector("bank/clip/nonlinear/dtd.safetensors"), is_vector("openai/clip")
      (True, False)
    """
    path = Path(model).expanduser()
    return path.suffix == ".safetensors" and not path.is_dir()


def open_vector(path: str | os.PathLike) -> Vector:
    """Opens a file of a task vector.

    Args:
      path: a file that `save_tree` wrote, with the task's name in the metadata.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is corrupt, or does not hold a task vector.

    Example:
      >>> open_vector("bank/clip/nonlinear/dtd.safetensors").task  # doctest: +SKIP
      'dtd'
    """
    path = Path(path).expanduser()
    stored, metadata = safetensors.open_file(path)
    if "task" not in metadata:
        raise ValueError(
            f"{path} is not a task vector: its metadata names no task. Write task "
            'vectors with hub.save_tree(path, tau, {"task": NAME}). For a checkpoint, '
            "name the folder."
        )
    checks.check_numeric(stored)
    stored = layouts.stored_to_torch(stored)
    tensors = {name: _widened(leaf) for name, leaf in stored.items()}
    return Vector(tensors, metadata["task"], metadata.get("method"))


def _widened(leaf: Stored) -> Stored:
    """Returns the tensor in float32 at least, because task vectors are summed."""
    if leaf.dtype.itemsize >= 4:
        return leaf
    return Stored.made(np.float32, leaf.shape, lambda: leaf.read().astype(np.float32))
