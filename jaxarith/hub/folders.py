"""Finds the files and the tensors of checkpoint folders, without reading the tensors.

The weights are in `model.safetensors`, in shards of it, or in `flax_model.msgpack`. If
PyTorch is installed, `pytorch_model.bin` and shards of it are read too, as data only.
A checkpoint may also be a single file, which then has no configuration.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxarith import files, tree
from jaxarith.hub import checks, pickles, safetensors
from jaxarith.hub.stored import Stored

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MSGPACK = "flax_model.msgpack"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's; `lora` reads it
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")
# Files that training runs, other merges and quantised copies leave in a folder, and
# the card, which describes another model.
_LEFT_OVERS = re.compile(
    r".*\.index\.json|.*_results\.json|trainer_state\.json|log_history\.json|"
    r"adapter_config\.json|(hf_)?quant\w*_config\.json|recipe\.yaml|params\.json|"
    r"requirements\.txt|"
    r"jaxarith_merge\.json|mergekit_config\.ya?ml|README\.md|.*tfevents.*|.*\.(log|lock)"
)
# Weights in any format, and the states of optimizers.
_HEAVY = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|distcp|msgpack|h5|keras|ot|onnx\w*|gguf|ggml|npz|"
    r"npy|pkl|pickle|tflite|mlmodel|engine|nemo|tar|gz|zip)"
)
_MODULES = "modules.json"  # of sentence-transformers: names the folders of layers
_TEMPLATES = "additional_chat_templates"

_CONVERT = """PyTorch's own files are pickles, which PyTorch reads as data. For a whole
model, run pip install torch. Or convert the file once, where PyTorch is installed:
  import torch, safetensors.torch
  weights = torch.load("pytorch_model.bin", weights_only=True, map_location="cpu")
  weights = {name: w.clone().contiguous() for name, w in weights.items()}
  safetensors.torch.save_file(weights, "model.safetensors")"""


class Checkpoint(NamedTuple):
    """The weights of a folder, not read yet.

    Attributes:
      tensors: the tensors by their names in the file. Names in msgpack have slashes.
      metadata: the metadata in the header of the file, or of the first shard.
      file: the file that holds or lists the tensors.
      notes: sentences that say how packed tensors were unpacked.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    file: Path
    notes: tuple[str, ...] = ()


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Finds the tensors of a checkpoint, whatever their dtypes, without reading them.

    Args:
      folder: a folder, or a single file of safetensors or of PyTorch.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ImportError: the file is PyTorch's, and PyTorch is not installed.
      ValueError: a file is corrupt or of another kind, or shards lack tensors that
        their index names.

    Example:
      >>> print(open_checkpoint("merged").tensors["head.weight"])  # doctest: +SKIP
      f32[10, 512]
    """
    if (file := Path(folder)).is_file():
        return Checkpoint(*_open_file(file), file)
    folder = existing(folder)
    if (file := folder / WEIGHTS).is_file():
        return Checkpoint(*safetensors.open_file(file), file)
    if (file := folder / INDEX).is_file():
        return _open_shards(file)
    if (file := folder / MSGPACK).is_file():
        return Checkpoint(_open_msgpack(file), {}, file)
    if pickles.readable() and (file := folder / PICKLE).is_file():
        return Checkpoint(pickles.open_file(file), {}, file)
    if pickles.readable() and (file := folder / PICKLE_INDEX).is_file():
        return _open_shards(file)
    names = [file.name for file in folder.iterdir()]
    raise FileNotFoundError(no_weights(str(folder), names))


def open_tensors(folder: str | os.PathLike) -> tuple[Path, dict[str, Stored]]:
    """Finds the tensors of a checkpoint and checks that they are numbers.

    Args:
      folder: a folder or a single file, as for `open_checkpoint`.

    Returns:
      The file that holds or lists the weights, and all tensors by name, not read yet.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, or holds something other than arrays of numbers.
    """
    found = open_checkpoint(folder)
    checks.check_numeric(found.tensors)
    return found.file, found.tensors


def names(folder: str | os.PathLike) -> set[str]:
    """Returns the names of all tensors of a checkpoint, without reading the tensors.

    Args:
      folder: a folder or a single file, as for `open_checkpoint`.

    Returns:
      The names with slashes in place of dots.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt.
    """
    return {name.replace(".", "/") for name in open_checkpoint(folder).tensors}


def _open_file(file):
    """Returns the tensors of a file of any known kind, and its metadata."""
    if file.suffix == ".safetensors":
        return safetensors.open_file(file)
    if file.suffix in pickles.SUFFIXES:
        return pickles.open_file(file), {}
    raise ValueError(
        f"{file} is a file; expected the folder of a checkpoint, or a file that ends "
        f"with .safetensors or {', '.join(pickles.SUFFIXES)}."
    )


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights of a checkpoint or of an adapter.

    Args:
      folder: a folder, or a single file, which is then the only one returned.
    """
    if folder.is_file():
        return [folder]
    for single, index in ((WEIGHTS, INDEX), (MSGPACK, None), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if index is not None and (folder / index).is_file():
            return sorted(set(shards(folder / index).values()))
    if (file := folder / ADAPTER).is_file():
        return [file]
    return sorted(folder.glob("*.gguf"))  # only if no other format was found


def shards(index: Path) -> dict[str, Path]:
    """Returns the file that holds each tensor, as an index file states it.

    Args:
      index: the path of a `model.safetensors.index.json`.

    Returns:
      `{name of the tensor: path of its file}`.

    Raises:
      FileNotFoundError: a file does not exist in the folder of the index.
      ValueError: the file is not such an index.
    """
    shard_of = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(
            f"{index} has no weight_map, so it is not an index of shards. Download it "
            "again."
        )
    for shard in sorted(set(map(str, shard_of.values()))):
        path = index.parent / shard
        if path.parent != index.parent or not path.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shard!r}, which is not beside it. The "
                f"folder holds {_listing(index.parent)}. Download the shard again."
            )
    return {name: index.parent / str(shard) for name, shard in shard_of.items()}


def read_json(folder: str | os.PathLike, name: str = CONFIG) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint.

    Args:
      folder: the folder of the checkpoint.
      name: the name of the file in it.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file does not hold a JSON object.

    Example:
      >>> read_json("merged")["model_type"]  # doctest: +SKIP
      'clip'
    """
    path = existing(folder) / name
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no {name}; it holds {_listing(path.parent)}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a JSON object."
        )
    return content


def side_files(folder: Path) -> list[Path]:
    """Returns the files of a model other than its weights and its configuration.

    These are tokenizers, preprocessing, generation settings, code and licences, but not
    hidden files, and not files that training left. Also included are chat templates in
    a folder of their own, and the folders that the modules.json of
    sentence-transformers names, with their weights.

    Args:
      folder: the folder of the model.

    Raises:
      ValueError: one of the inner folders holds links to files elsewhere, pipes or
        devices.
    """
    found = [file for file in sorted(folder.iterdir()) if is_side_file(file.name)]
    found = [file for file in found if file.is_file()]
    for inner in _inner_folders(folder):
        files.check_folder(inner)
        found += [file for file in sorted(inner.rglob("*")) if _is_plain(file, inner)]
    return found


def is_side_file(name: str) -> bool:
    """Whether the name of a file at the top of a folder says it belongs to a model."""
    if name == CONFIG or name.startswith("."):
        return False
    return not (_LEFT_OVERS.fullmatch(name) or _HEAVY.fullmatch(name))


def left_behind(folder: Path) -> list[str]:
    """Returns the files and folders that a merged copy of a model will not contain."""
    kept = {file.relative_to(folder).parts[0] for file in side_files(folder)}
    kept |= {CONFIG, INDEX, PICKLE_INDEX, "README.md", "jaxarith_merge.json"}
    kept |= {MSGPACK, *(file.name for file in weight_files(folder))}
    return [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(folder.iterdir())
        if path.name not in kept and not path.name.startswith(".")
    ]


def copy_side_files(found: Iterable[Path], folder: Path, new: Path) -> None:
    """Copies files of a folder, or of its subfolders, to the same places in another."""
    for file in found:
        place = new / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _inner_folders(folder):
    names: list[str] = [_TEMPLATES]
    if (folder / _MODULES).is_file():
        modules = files.read_json(folder / _MODULES)
        entries = modules if isinstance(modules, list) else []
        paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
        names += [x for x in paths if isinstance(x, str) and not Path(x).is_absolute()]
    inner = [folder / name for name in dict.fromkeys(names)]
    return [path for path in inner if path.is_dir() and _is_inside(path, folder)]


def _is_inside(path, folder):
    """Whether a path lies below a folder without passing through links."""
    real = folder.resolve()
    return path != folder and path.resolve() == real / path.relative_to(folder)


def _is_plain(file, folder):
    parts = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith(".") for part in parts)


def existing(folder: str | os.PathLike) -> Path:
    """Returns the path of a folder after checking it.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: the folder holds links to files elsewhere, pipes or devices.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}. `hub.find` downloads a model from the Hub "
            "and returns its folder."
        )
    files.check_folder(folder)
    return folder


def no_weights(place: str, names: Iterable[str]) -> str:
    """Returns the error message for a place without weights that jaxarith can read."""
    names = sorted(names)
    found = ", ".join(tree.first_few(names, most=20)) or "nothing"
    text = (
        f"no checkpoint in {place}.\n  looked for {WEIGHTS}, {INDEX}, {MSGPACK}\n"
        f"  found {found}"
    )
    if any(name.startswith("open_clip_") for name in names):
        return (
            f"{text}\nThis is OpenCLIP's format. Run `jaxarith convert IN OUT` to turn "
            "it into a folder that transformers loads."
        )
    is_pickle = any(Path(name).suffix in pickles.SUFFIXES for name in names)
    return f"{text}\n{_CONVERT}" if is_pickle else text


def _listing(folder):
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(tree.first_few(names)) or "nothing"


def _open_shards(index):
    file_of = shards(index)
    opened = {path: _open_file(path) for path in sorted({*file_of.values()})}
    absent = [name for name, path in file_of.items() if name not in opened[path][0]]
    if absent:
        some = tree.counted(len(absent), "tensor that is", "tensors that are")
        raise ValueError(
            f"{index} names {some} not in their shards, such as {min(absent)!r}. The "
            "shards belong to another model. Download them again."
        )
    tensors = {}
    for held, _ in opened.values():
        tensors |= held
    # Several shards may hold the same tensor: the index decides which one is used.
    tensors |= {name: opened[path][0][name] for name, path in file_of.items()}
    return Checkpoint(tensors, next(iter(opened.values()))[1], index)


def _open_msgpack(path):
    from flax import serialization  # here: the rest of this file needs no flax

    try:
        content = serialization.msgpack_restore(path.read_bytes())
        arrays = tree.flatten(content)
    # On other bytes, msgpack and flax raise a dozen unrelated exceptions.
    except Exception as error:
        raise ValueError(safetensors.corrupt(path, error)) from error
    strange = [x for x in arrays.values() if not isinstance(x, np.ndarray | np.generic)]
    if strange or not isinstance(content, dict):
        raise ValueError(
            f"{path} does not hold a tree of arrays, so it is not a model's parameters."
        )
    return {name: _in_memory(array) for name, array in arrays.items()}


def _in_memory(array):
    return Stored.made(array.dtype, array.shape, lambda: np.asarray(array))
