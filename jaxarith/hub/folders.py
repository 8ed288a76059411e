"""Folders of checkpoints: which files they hold, and which tensors, none of them read.

The weights are in `model.safetensors`, in shards of it, or in `flax_model.msgpack`; or,
where PyTorch is installed to read them as data, in `pytorch_model.bin` or shards of it.
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
# What training runs, other merges and quantised copies leave in a folder, and the
# card, which is of another model.
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

_CONVERT = """PyTorch's own files are pickles, which PyTorch reads as data: pip install
torch, for a whole model, or convert the file once, where PyTorch is:
  import torch, safetensors.torch
  weights = torch.load("pytorch_model.bin", weights_only=True, map_location="cpu")
  weights = {name: w.clone().contiguous() for name, w in weights.items()}
  safetensors.torch.save_file(weights, "model.safetensors")"""


class Checkpoint(NamedTuple):
    """The weights of a folder, not read yet.

    Attributes:
      tensors: the tensors by their names in the file; those of msgpack have slashes.
      metadata: what the header of the file says, or that of the first shard.
      file: the file that holds or lists the tensors.
      notes: what was done to tensors of a packed checkpoint.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    file: Path
    notes: tuple[str, ...] = ()


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Finds the tensors of a checkpoint, of whatever types.

    Args:
      folder: a folder, or a single file of safetensors or of PyTorch.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ImportError: the file is PyTorch's, and PyTorch is not installed.
      ValueError: a file is corrupt or of another kind, or shards lack tensors that
        their index names.
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
    """The file that holds or lists the weights, and all tensors by name, not read.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, or holds something other than arrays of numbers.
    """
    found = open_checkpoint(folder)
    checks.check_numeric(found.tensors)
    return found.file, found.tensors


def names(folder: str | os.PathLike) -> set[str]:
    """The names of all tensors of a checkpoint, with slashes; none is read.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt.
    """
    return {name.replace(".", "/") for name in open_checkpoint(folder).tensors}


def _open_file(file):
    """The tensors of a file of whatever kind, and its metadata."""
    if file.suffix == ".safetensors":
        return safetensors.open_file(file)
    if file.suffix in pickles.SUFFIXES:
        return pickles.open_file(file), {}
    raise ValueError(
        f"{file} is a file; expected the folder of a checkpoint, or a file that ends "
        f"with .safetensors or {', '.join(pickles.SUFFIXES)}."
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint or of an adapter.

    Args:
      folder: a folder, or a single file, which is the one.
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
    return sorted(folder.glob("*.gguf"))  # where there is nothing else


def shards(index: Path) -> dict[str, Path]:
    """By tensor, the file that holds it, of a `model.safetensors.index.json`.

    Raises:
      FileNotFoundError: a file does not exist in the folder of the index.
      ValueError: it is no such index.
    """
    shard_of = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map: it is no index of shards.")
    for shard in sorted(set(map(str, shard_of.values()))):
        path = index.parent / shard
        if path.parent != index.parent or not path.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shard!r}, which is not beside it. Download "
                f"it again; the folder holds {_listing(index.parent)}."
            )
    return {name: index.parent / str(shard) for name, shard in shard_of.items()}


def read_json(folder: str | os.PathLike, name: str = CONFIG) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is no JSON object.
    """
    path = existing(folder) / name
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no {name}; it holds {_listing(path.parent)}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def side_files(folder: Path) -> list[Path]:
    """The files that belong to a model beside its weights and its configuration.

    All but weights, hidden files and what training left: tokenizers, preprocessing,
    generation, code, licences. So are chat templates in a folder of their own and, with
    their weights, the folders that the modules.json of sentence-transformers names.
    """
    found = [file for file in sorted(folder.iterdir()) if is_side_file(file.name)]
    found = [file for file in found if file.is_file()]
    for inner in _inner_folders(folder):
        files.check_folder(inner)
        found += [file for file in sorted(inner.rglob("*")) if _is_plain(file, inner)]
    return found


def is_side_file(name: str) -> bool:
    """Whether a file at the top of a folder belongs to a model, by its name."""
    if name == CONFIG or name.startswith("."):
        return False
    return not (_LEFT_OVERS.fullmatch(name) or _HEAVY.fullmatch(name))


def left_behind(folder: Path) -> list[str]:
    """What a copy of a model does not have of its folder, but for merged weights."""
    kept = {file.relative_to(folder).parts[0] for file in side_files(folder)}
    kept |= {CONFIG, INDEX, PICKLE_INDEX, "README.md", "jaxarith_merge.json"}
    kept |= {MSGPACK, *(file.name for file in weight_files(folder))}
    return [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(folder.iterdir())
        if path.name not in kept and not path.name.startswith(".")
    ]


def copy_side_files(found: Iterable[Path], folder: Path, new: Path) -> None:
    """Copies files of a folder, or of folders in it, to the same places in another."""
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
    """Whether a path is below a folder, and not through links."""
    real = folder.resolve()
    return path != folder and path.resolve() == real / path.relative_to(folder)


def _is_plain(file, folder):
    parts = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith(".") for part in parts)


def existing(folder: str | os.PathLike) -> Path:
    """The path of a folder.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds links to files elsewhere, pipes or devices.
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
    """What an error says about a place without weights that jaxarith reads."""
    names = sorted(names)
    found = ", ".join(tree.first_few(names, most=20)) or "nothing"
    text = (
        f"no checkpoint in {place}.\n  looked for {WEIGHTS}, {INDEX}, {MSGPACK}\n"
        f"  found {found}"
    )
    if any(name.startswith("open_clip_") for name in names):
        return (
            f"{text}\nThat is OpenCLIP's format, from which `jaxarith convert IN OUT` "
            "makes a folder of transformers."
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
            "shards are of another model: download them again."
        )
    tensors = {}
    for held, _ in opened.values():
        tensors |= held
    # The index decides where a tensor stands that several shards hold.
    tensors |= {name: opened[path][0][name] for name, path in file_of.items()}
    return Checkpoint(tensors, next(iter(opened.values()))[1], index)


def _open_msgpack(path):
    from flax import serialization  # here: the rest of this file needs no flax

    try:
        content = serialization.msgpack_restore(path.read_bytes())
        arrays = tree.flatten(content)
    # msgpack and flax raise a dozen unrelated exceptions on bytes that are not theirs.
    except Exception as error:
        raise ValueError(safetensors.corrupt(path, error)) from error
    strange = [x for x in arrays.values() if not isinstance(x, np.ndarray | np.generic)]
    if strange or not isinstance(content, dict):
        raise ValueError(f"{path} is no tree of arrays, so not a model's parameters.")
    return {name: _in_memory(array) for name, array in arrays.items()}


def _in_memory(array):
    return Stored.made(array.dtype, array.shape, lambda: np.asarray(array))
