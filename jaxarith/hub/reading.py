"""Whole checkpoints and trees from files.

The names in a tree are those of Hugging Face's Flax models, so msgpack files need no
conversion; `layouts` converts the names and orientations of PyTorch.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxarith import tree
from jaxarith.hub import checks, folders, layouts, safetensors
from jaxarith.hub.stored import Stored
from jaxarith.typing import Tree


def load(
    folder: str | os.PathLike,
    layout: Tree,
    *,
    select: str | None = None,
    ignore: str | None = None,
    copies: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = np.float32,
) -> dict[str, Any]:
    """Reads the parameters of a model from a checkpoint in a local folder.

    A file of one tower may leave out the tower's name (transformers 5 does so for a
    `CLIPVisionModel`). Names that do not fit are therefore also tried under each key at
    the top of the layout. `ignore` and `copies` use the names of the file, with slashes
    and with or without such a key in front.

    Args:
      folder: a folder with `model.safetensors`, or `model.safetensors.index.json` and
        the shards that it names, or `flax_model.msgpack`. The first that exists is
        read.
      layout: the expected tree. Its leaves have `shape` and `dtype`, as those of
        `clip.layout(config)`.
      select: a regular expression for whole slash paths. Only leaves that match are
        expected; everything else in the file is left out.
      ignore: a regular expression for whole names of tensors outside the layout, for
        example buffers. They are left out.
      copies: `{name: path}`. The model ties tensor `name` to leaf `path`; the file may
        hold one of them or both.
      dtype: dtype of the result; None keeps that of the file.

    Returns:
      A nested dict of NumPy arrays with exactly the layout's (selected) leaves.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, does not match the layout leaf by leaf (the message
        lists the paths), holds NaN or infinite values, or holds two different tensors
        where the model has one tied tensor.

    Example:
      >>> from jaxarith.models import clip
      >>> folder = find("openai/clip-vit-base-patch32")  # doctest: +SKIP
      >>> config = clip.CLIPConfig.from_json(read_json(folder))  # doctest: +SKIP
      >>> params = load(folder, clip.layout(config))  # doctest: +SKIP
    """
    found = folders.open_checkpoint(folder)
    return filled(
        layout,
        found.tensors,
        found.file,
        select=select,
        ignore=ignore,
        copies=copies,
        dtype=dtype,
    )


def filled(
    layout: Tree,
    tensors: Mapping[str, Stored],
    file: Path,
    *,
    select: str | None = None,
    ignore: str | None = None,
    copies: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = np.float32,
) -> dict[str, Any]:
    """Reads the parameters of a model from opened tensors.

    Args:
      layout, select, ignore, copies, dtype: as for `load`.
      tensors: tensors that are not read yet, by PyTorch's or Flax's names.
      file: the file to name in errors.

    Returns:
      A nested dict of NumPy arrays with exactly the layout's (selected) leaves.

    Raises:
      ValueError: as for `load`.
    """
    expected = tree.flatten(layout)
    stored = layouts.to_flax(tensors, set(expected))
    stored = layouts.without_extras(stored, set(expected), ignore, copies or {})
    if select is not None:
        expected = tree.flatten(tree.select(layout, select))
        stored = {path: leaf for path, leaf in stored.items() if path in expected}
    layouts.check(file, expected, stored)
    leaves = {path: converted(stored[path].read(), dtype) for path in expected}
    checks.check_finite(leaves, str(file))
    return tree.unflatten(leaves)


def converted(value: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    """Returns the array in a dtype, in row-major order."""
    with np.errstate(over="ignore"):  # reported with its path, by `check_finite`
        return np.asarray(value, dtype, order="C")


def read(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint of any model, under PyTorch's names.

    Args:
      folder: a folder or a single file, as for `open_checkpoint`.

    Returns:
      `{name: array}`, in the shapes and dtypes of the file; kernels of a msgpack file
      are transposed to PyTorch's orientation.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, or a tensor holds NaN or infinite values.

    Example:
      >>> read("merged")["head.weight"].shape  # doctest: +SKIP
      (10, 512)
    """
    file, stored = folders.open_tensors(folder)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    checks.check_finite(tensors, str(file))
    return layouts.to_torch(tensors) if file.name == folders.MSGPACK else tensors


def load_tree(
    path: str | os.PathLike, like: Tree | None = None
) -> tuple[Tree, dict[str, str]]:
    """Reads a file that `save_tree` wrote.

    Args:
      path: the file.
      like: a tree with the structure that was saved, for example `params_0`. It may
        have more leaves than the file. A file stores only slash paths, so without
        `like` the tree is a nested dict.

    Returns:
      The tree of NumPy arrays, with the structure of that part of `like`, and the
      metadata.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is corrupt or holds NaN or infinite values, or one of its
        leaves is missing in `like` or has another shape there.

    Example:
      >>> tau, metadata = load_tree("tau.safetensors", params_0)  # doctest: +SKIP
    """
    stored, metadata = safetensors.open_file(Path(path))
    checks.check_numeric(stored)
    leaves = {name: leaf.read() for name, leaf in stored.items()}
    checks.check_finite(leaves, str(path))
    if like is None:
        return tree.unflatten(leaves), metadata
    tree.check_part(leaves, like, f"tree in {path}", "tree that it should be like")
    part = tree.restrict(like, leaves)
    return tree.map_with_path(lambda name, _: leaves[name], part), metadata
