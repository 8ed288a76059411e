"""Folders with the headers of weights alone: all of a model but its numbers.

Their files have the true headers and the true lengths, and take no space: what was
never written is a hole. So whatever looks at names, shapes and types of tensors works
on them, for a model that is not downloaded, or that is yet to be merged. All numbers
are zero, but for one in each tensor where no two are to be equal: equal ones are taken
to be tied where the configuration does not say whether they are.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from jaxarith.hub.config import parts
from jaxarith.hub.folders import (
    ADAPTER,
    CONFIG,
    INDEX,
    WEIGHTS,
    is_side_file,
    no_weights,
    read_json,
)
from jaxarith.hub.safetensors import Shard

_TIED = "tie_word_embeddings"
_BESIDE = (CONFIG, INDEX, "adapter_config.json")


def sketch(folder: Path, shards: Iterable[Shard], *, tied: bool) -> None:
    """Writes planned files of weights, but for the weights.

    Args:
      folder: where to write them.
      shards: the files.
      tied: whether the configuration ties embedding and head.
    """
    shards = list(shards)
    for shard in shards:
        _write(folder / shard.name, shard.header, shard.nbytes, tied)
    if len(shards) > 1:
        of_name = {name: shard.name for shard in shards for name in shard.offsets}
        (folder / INDEX).write_text(json.dumps({"weight_map": of_name}))


def _write(path: Path, header: bytes, nbytes: int, tied: bool) -> None:
    path.write_bytes(header)
    os.truncate(path, nbytes)
    if tied:
        return
    entries = json.loads(header[8:])
    with path.open("r+b") as file:
        for number, (name, entry) in enumerate(entries.items()):
            if name != "__metadata__" and entry["dtype"] in ("F32", "F16", "BF16"):
                start, end = entry["data_offsets"]
                file.seek(len(header) + start)
                # The low byte of small numbers that are finite, whatever the dtype.
                file.write(bytes([number % 255 + 1])[: end - start])


def fetch(model: str, folder: Path) -> Path:
    """A model of the Hub with its headers alone, downloaded to a new folder.

    Where the Hub is out of reach, a copy that was downloaded before is taken.

    Args:
      model: the id of a model, perhaps with `@revision`.
      folder: where to make it.

    Returns:
      The folder, or that of the earlier copy.

    Raises:
      FileNotFoundError: the Hub has no such model, or is out of reach.
      ValueError: the model has no weights in safetensors.
    """
    import huggingface_hub  # here: local folders do not need it

    name, _, revision = model.partition("@")
    try:
        info = huggingface_hub.model_info(name, revision=revision or None)
    # Any failure to reach the Hub, for which its client has many exceptions.
    except Exception as unreachable:
        try:
            cached = huggingface_hub.snapshot_download(
                name, revision=revision or None, local_files_only=True
            )
        except Exception:
            raise FileNotFoundError(
                f"{model!r} is no folder, is not in the download cache, and the Hub "
                f"did not give it: {str(unreachable).strip()}\nCheck the spelling and "
                "the connection; where access is restricted, run `hf auth login`."
            ) from unreachable
        return Path(cached)
    names = [file.rfilename for file in info.siblings or []]
    wanted = [x for x in (WEIGHTS, INDEX, ADAPTER) if x in names][:1]
    if not wanted:
        raise ValueError(
            f"{no_weights(model, names)}\nOnly files of safetensors have headers that "
            "can be read without the weights."
        )
    folder.mkdir(parents=True)
    at = info.sha or revision or None  # all files of one commit
    beside = [x for x in names if "/" not in x and (x in _BESIDE or is_side_file(x))]
    try:
        huggingface_hub.snapshot_download(
            name, revision=at, allow_patterns=beside, local_dir=folder
        )
        if wanted == [INDEX]:
            wanted = _shards(model, folder)
        config = read_json(folder) if (folder / CONFIG).is_file() else {}
        tied = any(x.get(_TIED) for x in (config, *parts(config).values()))
        for file in wanted:
            found = huggingface_hub.parse_safetensors_file_metadata(
                name, file, revision=at
            )
            _write_found(folder / file, found, tied)
    except ValueError:
        raise
    except Exception as error:  # of the client, as above
        raise FileNotFoundError(
            f"the Hub has {model} and did not give all of it: {str(error).strip()}"
        ) from error
    return folder


def _shards(model, folder):
    """The files of an index, all of them beside it."""
    of_name = read_json(folder, INDEX).get("weight_map")
    files = sorted({*map(str, of_name.values())}) if isinstance(of_name, dict) else []
    if not files or any("/" in file for file in files):
        raise ValueError(f"{INDEX} of {model} names no files beside it.")
    return files


def _write_found(path, found, tied):
    """A file with a header that the Hub's client has read."""
    header = {"__metadata__": dict(found.metadata)} if found.metadata else {}
    for name, info in found.tensors.items():
        entry = dataclasses.asdict(info)
        header[name] = {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
    ends = [info.data_offsets[1] for info in found.tensors.values()]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    _write(path, start, len(start) + max(ends, default=0), tied)
