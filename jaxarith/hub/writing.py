"""Writes checkpoints and trees to files, each whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jaxarith import tree
from jaxarith.hub import checks, layouts, places
from jaxarith.hub.folders import (
    CONFIG,
    WEIGHTS,
    copy_side_files,
    existing,
    side_files,
)
from jaxarith.hub.reading import converted
from jaxarith.typing import Params, Tree


def save(
    folder: str | os.PathLike,
    params: Params,
    config: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    copy_from: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that transformers loads: `model.safetensors`, `config.json`.

    Everything is first written under temporary names. A new folder appears whole or
    not at all. With `overwrite`, the files of an existing folder are replaced one by
    one, the weights last, and its other files are kept.

    Args:
      folder: the new folder.
      params: a nested dict of arrays with Flax names.
      config: the content of `config.json`.
      dtype: dtype of the file; None keeps that of each leaf.
      copy_from: a folder whose tokenizer and preprocessing files are copied.
      overwrite: whether to write into a folder that exists.

    Raises:
      FileExistsError: the folder exists, and `overwrite` does not allow it.
      ValueError: `params` holds NaN or infinite values, or leaves that are not arrays.

    Example:
      >>> save("merged", params, read_json(model.folder))  # doctest: +SKIP
      >>> save("merged", better, config, overwrite=True)  # doctest: +SKIP
    """
    _check_folder(folder, overwrite, copy_from)
    tensors = layouts.to_torch(_arrays(params, dtype))
    write(folder, tensors, config, copy_from=copy_from, overwrite=overwrite)


def write(
    folder: str | os.PathLike,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    copy_from: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors as `save` does, but under their own names.

    Args:
      folder: the new folder.
      tensors: arrays by name, as `read` returns them.
      config: the content of `config.json`.
      copy_from: a folder whose tokenizer and preprocessing files are copied.
      overwrite: whether to write into a folder that exists.

    Raises:
      FileExistsError: the folder exists, and `overwrite` does not allow it.
      ValueError: a tensor holds NaN or infinite values, or is not an array.

    Example:
      >>> write("copy", read("model"), read_json("model"))  # doctest: +SKIP
    """
    folder = _check_folder(folder, overwrite, copy_from)
    tensors = _arrays(dict(tensors), None)
    text = json.dumps(config, indent=2) + "\n"
    extras = [] if copy_from is None else side_files(existing(copy_from))
    before = places.state(folder)
    with places.staging(folder if before else folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        if copy_from is not None:
            copy_side_files(extras, Path(copy_from), new)
        (new / CONFIG).write_text(text, encoding="utf-8")
        _write(new / WEIGHTS, tensors, {"format": "pt"})
        if before is None:
            places.publish(new, folder, before, temporary / "old")
            return
        places.sync(new)
        files = [file for file in new.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file == new / WEIGHTS):
            place = folder / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        places.sync_entries(folder)


def _check_folder(folder, overwrite, copy_from):
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder. Name a new folder.")
    copied = []
    if copy_from is not None:
        sides = side_files(existing(copy_from))
        copied = [str(file.relative_to(copy_from)) for file in sides]
    return places.check_out(folder, overwrite, copied=copied, kept=True)


def save_tree(
    path: str | os.PathLike, values: Tree, metadata: dict[str, str] | None = None
) -> None:
    """Writes any tree of arrays, for example a task vector, to one safetensors file.

    The tensors are named by their slash paths. The file appears whole or not at all,
    and replaces an older one.

    Args:
      path: the file to write.
      values: the tree; dtypes and shapes are kept.
      metadata: texts to store in the header of the file.

    Raises:
      ValueError: a leaf holds NaN or infinite values, is not an array, or is named
        `__metadata__`, which the format reserves.

    Example:
      >>> save_tree("tau.safetensors", tau, {"task": "mnist"})  # doctest: +SKIP
      >>> tau, metadata = load_tree("tau.safetensors")  # doctest: +SKIP
    """
    path = Path(path).absolute()
    leaves = _arrays(values, None)
    if "__metadata__" in leaves:
        raise ValueError(
            "a leaf is called __metadata__, a name that safetensors files reserve. "
            "Rename the leaf."
        )
    with places.staging(path.parent) as temporary:
        _write(temporary / path.name, leaves, metadata)
        if replaced := path.exists():
            places.sync(temporary / path.name)
        os.replace(temporary / path.name, path)
    if replaced:
        places.sync_entries(path.parent)


def _arrays(values, dtype):
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(values).items()}
    checks.check_numeric(leaves)
    leaves = {path: converted(leaf, dtype) for path, leaf in leaves.items()}
    checks.check_finite(leaves, "the tree")
    return leaves


def _write(path, tensors, metadata):
    path.touch()
    mode = path.stat().st_mode
    # save_file writes the memory as it is, so arrays must be in row-major order.
    # (ascontiguousarray would make 0-d arrays 1-d.)
    tensors = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors makes files that only their owner can read
