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

    A file may hold one tower with or without its name in front (transformers 5 writes a
    `CLIPVisionModel` without): names that do not fit as they are may fit under one of
    the keys at the top of the layout. Names of `ignore` and `copies` are those of the
    file with slashes, with or without such a key in front.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the
        shards that it names, or `flax_model.msgpack`; the first that exists is read.
      layout: the expected tree, of anything with `shape` and `dtype`, such as
        `clip.layout(config)`.
      select: a regular expression for whole slash paths. Only the leaves that it
        matches are expected, and whatever else the file holds is left out.
      ignore: a regular expression for whole names of tensors outside the layout that
        are left out, such as buffers.
      copies: `{name: path}` of tensors that a file may hold beside the leaf to which
        the model ties them, or in its place.
      dtype: dtype of the result; None keeps that of the file.

    Returns:
      A nested dict of NumPy arrays with exactly the layout's (selected) leaves.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, or does not match the layout leaf by leaf (the
        message lists the paths), or holds NaN or infinite values, or two different
        tensors where the model has a tied one.

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
    """The parameters of a model from tensors that are not read yet.

    Args:
      layout, select, ignore, copies, dtype: as for `load`.
      tensors: by PyTorch's or Flax's names.
      file: named in errors.

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
    """The array in a dtype, in the order of rows."""
    with np.errstate(over="ignore"):  # reported with its path, by `check_finite`
        return np.asarray(value, dtype, order="C")


def read(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint of any model, under PyTorch's names.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, or a tensor holds NaN or infinite values.
    """
    file, stored = folders.open_tensors(folder)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    checks.check_finite(tensors, str(file))
    return layouts.to_torch(tensors) if file.name == folders.MSGPACK else tensors


def load_tree(
    path: str | os.PathLike, like: Tree | None = None
) -> tuple[Tree, dict[str, str]]:
    """Reads what `save_tree` wrote: a tree of NumPy arrays, and the metadata.

    Args:
      path: the file.
      like: a tree of the structure that was saved, such as `params_0`, which may have
        more leaves; a file has only slash paths. By default the tree is a nested dict.

    Returns:
      The leaves of the file, in the structure of that part of `like`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is corrupt, holds NaN or infinite values, or has a leaf that
        `like` lacks or has in another shape.
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
