"""Checkpoint files <-> trees of arrays, in the format of the Hugging Face Hub.

Reads `model.safetensors`, shards of it, and `flax_model.msgpack`; writes
`model.safetensors`. No pickle is ever opened.

The names in a tree are those of Hugging Face's Flax models, so msgpack files need no
conversion; `layouts` converts the names and orientations of PyTorch.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxarith import tree
from jaxarith.hub import layouts
from jaxarith.typing import Params, Tree

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MSGPACK = "flax_model.msgpack"
_CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's; `lora` reads it
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".py")
# Of training runs, other merges and quantised copies.
_LEFT_OVERS = re.compile(
    r".*\.index\.json|.*_results\.json|trainer_state\.json|log_history\.json|"
    r"adapter_config\.json|quantize_config\.json|params\.json|requirements\.txt|"
    r"jaxarith_merge\.json"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 8  # lines of an error that list leaves, before the rest is only counted

_CONVERT = """jaxarith opens no pickle. Convert the file once, where PyTorch is:
  import torch, safetensors.torch
  weights = torch.load("pytorch_model.bin", weights_only=True, map_location="cpu")
  weights = {name: w.clone().contiguous() for name, w in weights.items()}
  safetensors.torch.save_file(weights, "model.safetensors")"""


def find(model: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or one downloaded from the Hub.

    Configuration, tokenizer and weights are downloaded, the weights in one format:
    safetensors where the repository has them, else msgpack. A copy that was downloaded
    before is used where the Hub cannot be reached.

    Args:
      model: a folder, or the id of a model such as `openai/clip-vit-base-patch32`.
      revision: a branch, tag or commit on the Hub, such as `refs/pr/32`.

    Raises:
      FileNotFoundError: there is neither a folder nor a model that can be downloaded.
      ValueError: the model's weights are in no format that jaxarith reads.

    Example:
      >>> find("google-t5/t5-small")  # doctest: +SKIP
      PosixPath('…/models--google-t5--t5-small/snapshots/…')
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub  # here: local folders do not need it
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        info = huggingface_hub.model_info(str(model), revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {str(model)!r}{at} for you: {str(error).strip()}\n"
            "Check the spelling; where access is restricted, run `hf auth login`."
        ) from error
    # Any failure to reach the Hub, for which its client has many exceptions.
    except Exception as unreachable:
        try:
            cached = huggingface_hub.snapshot_download(
                str(model), revision=revision, local_files_only=True
            )
        except Exception:
            raise FileNotFoundError(
                f"{str(model)!r}{at} is not a folder, is not in the download cache, "
                f"and the Hub did not give it: {str(unreachable).strip()}\n"
                "Check the spelling and the connection, or give the path of a folder "
                f"that holds {_CONFIG} and {_WEIGHTS}."
            ) from unreachable
        return Path(cached)
    names = [file.rfilename for file in info.siblings or []]
    if any(name in (_WEIGHTS, _INDEX) for name in names):
        weights = "model*.safetensors"
    elif _MSGPACK in names:
        weights = _MSGPACK
    elif ADAPTER in names:
        weights = ADAPTER
    else:
        raise ValueError(_no_weights(f"{model}{at}", names))
    patterns = [*(f"*{suffix}" for suffix in _SIDE_FILES), weights]
    return Path(
        huggingface_hub.snapshot_download(
            str(model), revision=revision, allow_patterns=patterns
        )
    )


def load(
    folder,
    layout: Tree,
    *,
    select: str | None = None,
    ignore: str | None = None,
    copies: Mapping[str, str] | None = None,
    dtype=np.float32,
) -> dict:
    """Reads the parameters of a model from a checkpoint in a local folder.

    A file may hold one tower with or without its name in front (transformers 5 writes a
    `CLIPVisionModel` without): names that do not fit as they are may fit under one of
    the keys at the top of the layout. Names of `ignore` and `copies` are those of the
    file with slashes, with or without such a key in front.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the
        shards that it names, or `flax_model.msgpack`; the first that is there is read.
      layout: the expected tree, of anything with `shape` and `dtype`, such as
        `clip.layout(config)`.
      select: a regular expression for whole slash paths. Only the leaves that it
        matches are expected, and whatever else the file holds is left out.
      ignore: a regular expression for whole names of tensors outside the layout that
        are left out, such as buffers.
      copies: `{name: path}` of tensors that a file may hold beside the leaf to which
        the model ties them, or in its place.
      dtype: of the result; None keeps the file's.

    Returns:
      A nested dict of NumPy arrays with exactly the layout's (selected) leaves.

    Raises:
      FileNotFoundError: the folder, the checkpoint or one of its shards is not there.
      ValueError: a file is corrupt, or does not match the layout leaf by leaf (the
        message lists the paths), or holds NaN or infinite values, or two different
        tensors where the model has a tied one.

    Example:
      >>> from jaxarith.models import clip
      >>> folder = find("openai/clip-vit-base-patch32")  # doctest: +SKIP
      >>> config = clip.CLIPConfig.from_json(read_json(folder))  # doctest: +SKIP
      >>> params = load(folder, clip.layout(config))  # doctest: +SKIP
    """
    file, stored = _open(Path(folder))
    expected = tree.flatten(layout)
    stored = layouts.to_flax(stored, set(expected))
    stored = layouts.without_extras(stored, set(expected), ignore, copies or {})
    if select is not None:
        expected = tree.flatten(tree.select(layout, select))
        stored = {path: leaf for path, leaf in stored.items() if path in expected}
    layouts.check(file, expected, stored)
    leaves = {path: _array(stored[path].read(), dtype) for path in expected}
    _check_values(leaves, str(file))
    return tree.unflatten(leaves)


def save(folder, params: Params, config: dict, *, dtype=None, copy_from=None):
    """Writes a checkpoint that transformers loads: `model.safetensors`, `config.json`.

    Everything is first written under temporary names. A new folder appears whole or
    not at all. In a folder that exists, whole files are replaced, the weights last.

    Args:
      folder: created where it does not exist; other files in it are kept.
      params: a nested dict of arrays with Flax names.
      config: what `config.json` shall hold.
      dtype: of the file; None keeps each leaf's.
      copy_from: a folder whose tokenizer and preprocessing files go along.

    Raises:
      ValueError: `params` holds NaN or infinite values, or something else than arrays.
    """
    tensors = layouts.to_torch(_arrays(params, dtype))
    write(folder, tensors, config, copy_from=copy_from)


def write(folder, tensors: dict[str, Any], config: dict, *, copy_from=None):
    """Writes tensors under the names that they have, as `save` does.

    Args:
      folder: created where it does not exist; other files in it are kept.
      tensors: arrays by name, as `read` returns them.
      config: what `config.json` shall hold.
      copy_from: a folder whose tokenizer and preprocessing files go along.

    Raises:
      ValueError: a tensor holds NaN or infinite values, or is no array.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a checkpoint needs a folder.")
    tensors = _arrays(tensors, None)
    text = json.dumps(config, indent=2) + "\n"
    extras = [] if copy_from is None else side_files(_existing(Path(copy_from)))
    with staging(folder if folder.is_dir() else folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        for extra in extras:
            shutil.copyfile(extra, new / extra.name)
        (new / _CONFIG).write_text(text, encoding="utf-8")
        _write(new / _WEIGHTS, tensors, {"format": "pt"})
        if folder.is_dir():
            for file in sorted(new.iterdir(), key=lambda file: file.name == _WEIGHTS):
                os.replace(file, folder / file.name)
        else:
            os.replace(new, folder)


def names(folder) -> set[str]:
    """The names of all tensors of a checkpoint, with slashes; none is read.

    Raises:
      FileNotFoundError: the folder, the checkpoint or one of its shards is not there.
      ValueError: a file is corrupt.
    """
    return {name.replace(".", "/") for name in _open(Path(folder))[1]}


def read(folder) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, whatever model it is of, under PyTorch's names.

    Raises:
      FileNotFoundError: the folder, the checkpoint or one of its shards is not there.
      ValueError: a file is corrupt, or a tensor holds NaN or infinite values.
    """
    file, stored = open_tensors(Path(folder))
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    _check_values(tensors, str(file))
    return layouts.to_torch(tensors) if file.name == _MSGPACK else tensors


def read_json(folder, name: str = _CONFIG) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no JSON object.
    """
    path = _existing(Path(folder)) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no {name}; it holds {_listing(path.parent)}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def save_tree(path, values: Tree, metadata: dict[str, str] | None = None):
    """Writes any tree of arrays, such as a task vector, to one safetensors file.

    The tensors are named by their slash paths. The file appears whole or not at all.

    Raises:
      ValueError: a leaf holds NaN or infinite values, or is no array.

    Example:
      >>> save_tree("tau.safetensors", tau, {"task": "mnist"})  # doctest: +SKIP
      >>> tau, metadata = load_tree("tau.safetensors")  # doctest: +SKIP
    """
    path = Path(path).absolute()
    leaves = _arrays(values, None)
    with staging(path.parent) as temporary:
        _write(temporary / path.name, leaves, metadata)
        os.replace(temporary / path.name, path)


def load_tree(path) -> tuple[dict, dict[str, str]]:
    """Reads what `save_tree` wrote: a nested dict of NumPy arrays, and the metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt, or holds NaN or infinite values.
    """
    path = Path(path)
    stored, metadata = _open_safetensors(path)
    for name, leaf in stored.items():
        _check_numbers(name, leaf.dtype)
    leaves = {name: leaf.read() for name, leaf in stored.items()}
    _check_values(leaves, str(path))
    return tree.unflatten(leaves), metadata


def side_files(folder: Path) -> list[Path]:
    """The files that belong to a model beside its weights and its configuration.

    Tokenizers, preprocessing, generation and code; not what training left.
    """
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in _SIDE_FILES
        and file.name != _CONFIG
        and not _LEFT_OVERS.fullmatch(file.name)
    ]


# Reading and writing files.


def open_tensors(folder: Path) -> tuple[Path, dict[str, layouts.Stored]]:
    """The file that holds or lists the weights, and all tensors by name, not read.

    Raises:
      FileNotFoundError: the folder, the checkpoint or one of its shards is not there.
      ValueError: a file is corrupt, or holds other than arrays of numbers.
    """
    file, stored = _open(folder)
    for name, tensor in stored.items():
        _check_numbers(name, tensor.dtype)
    return file, stored


def _open(folder):
    _existing(folder)
    if (file := folder / _WEIGHTS).is_file():
        return file, _open_safetensors(file)[0]
    if (file := folder / _INDEX).is_file():
        return file, _open_shards(file)
    if (file := folder / _MSGPACK).is_file():
        return file, _open_msgpack(file)
    names = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(_no_weights(str(folder), names))


def _open_safetensors(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(_corrupt(path, error)) from error
    stored = {}
    for name in file.keys():
        header = file.get_slice(name)
        stored[name] = layouts.Stored(
            header.get_dtype().lower(),
            tuple(header.get_shape()),
            lambda name=name: file.get_tensor(name),
        )
    return stored, file.metadata() or {}


def shards(index: Path) -> dict[str, Path]:
    """By tensor, the file that holds it, of a `model.safetensors.index.json`.

    Raises:
      FileNotFoundError: a file is not there, or not in the folder of the index.
      ValueError: it is no such index.
    """
    shard_of = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map: it is no index of safetensors.")
    for shard in sorted(set(map(str, shard_of.values()))):
        path = index.parent / shard
        if path.parent != index.parent or not path.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shard!r}, which is not beside it. Download "
                f"it again; the folder holds {_listing(index.parent)}."
            )
    return {name: index.parent / str(shard) for name, shard in shard_of.items()}


def _open_shards(index):
    shard_of = shards(index)
    stored = {}
    for path in sorted(set(shard_of.values())):
        stored.update(_open_safetensors(path)[0])
    if absent := sorted(set(shard_of) - set(stored)):
        raise ValueError(
            f"{index} names {len(absent)} tensors that no shard holds, such as "
            f"{absent[0]!r}. The shards are of another model: download them again."
        )
    return stored


def _open_msgpack(path):
    from flax import serialization  # here: the rest of this file needs no flax

    try:
        content = serialization.msgpack_restore(path.read_bytes())
        arrays = tree.flatten(content)
    # msgpack and flax raise a dozen unrelated exceptions on bytes that are not theirs.
    except Exception as error:
        raise ValueError(_corrupt(path, error)) from error
    strange = [x for x in arrays.values() if not isinstance(x, np.ndarray | np.generic)]
    if strange or not isinstance(content, dict):
        raise ValueError(f"{path} is no tree of arrays, so not a model's parameters.")
    return {name: _in_memory(array) for name, array in arrays.items()}


def _in_memory(array):
    dtype = layouts.short(array.dtype)
    return layouts.Stored(dtype, array.shape, lambda: np.asarray(array))


def _array(value, dtype):
    with np.errstate(over="ignore"):  # reported with its path, by _check_values
        return np.asarray(value, dtype, order="C")


def _arrays(values, dtype):
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(values).items()}
    for path, leaf in leaves.items():
        _check_numbers(path, layouts.short(leaf.dtype))
    leaves = {path: _array(leaf, dtype) for path, leaf in leaves.items()}
    _check_values(leaves, "the tree")
    return leaves


def _write(path, tensors, metadata):
    path.touch()
    mode = path.stat().st_mode
    # The memory is written as it lies. (ascontiguousarray would make 0-d arrays 1-d.)
    tensors = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors makes its files readable to their owner only


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A folder on the same disk to write in, gone afterwards, whatever happens.

    Only a process that is killed leaves it, under a name that begins `.jaxarith-`.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jaxarith-", dir=parent) as name:
        yield Path(name)


# Errors.


def _existing(folder):
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}. `hub.find` downloads a model from the Hub "
            "and returns its folder."
        )
    return folder


def _listing(folder):
    names = sorted(file.name for file in folder.iterdir())
    more = [f"and {len(names) - _SHOWN} more"] * (len(names) > _SHOWN)
    return ", ".join(names[:_SHOWN] + more) or "nothing"


def _no_weights(place, names):
    found = ", ".join(sorted(names)[:20]) or "nothing"
    text = (
        f"no checkpoint in {place}.\n  looked for {_WEIGHTS}, {_INDEX}, {_MSGPACK}\n"
        f"  found {found}"
    )
    pickles = any(Path(name).suffix in _PICKLES for name in names)
    return f"{text}\n{_CONVERT}" if pickles else text


def _corrupt(path, error):
    return (
        f"{path} ({path.stat().st_size} bytes) is truncated or corrupt: {error}. "
        "Download or write it again."
    )


def _check_numbers(path, dtype):
    if not re.fullmatch(r"bf16|[fiu]\d+|bool", dtype):
        raise ValueError(f"{path} is of type {dtype}; expected an array of numbers.")


def _check_values(leaves, place):
    bad = {path: int((~np.isfinite(leaf)).sum()) for path, leaf in leaves.items()}
    bad = [f"{path} ({n} of {leaves[path].size})" for path, n in bad.items() if n]
    if bad:
        more = f" and {len(bad) - _SHOWN} more leaves" if len(bad) > _SHOWN else ""
        raise ValueError(
            f"{place} has NaN or infinite values in {', '.join(bad[:_SHOWN])}{more}."
        )
