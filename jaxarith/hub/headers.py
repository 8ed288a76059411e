"""Makes model folders that contain only the headers of weights, and no numbers.

The files have the true headers and the true lengths, but take no space on the disk:
bytes that were never written are a hole in the file. So code that looks only at names,
shapes and dtypes of tensors works for a model that is not downloaded or not merged yet.
All numbers are zero. The exception: if no two tensors may be equal, one number in each
differs, because equal tensors count as tied unless the configuration says otherwise.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from jaxarith.hub.config import parts
from jaxarith.hub.download import check_id
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
    """Writes planned files of weights with their headers, but without the weights.

    Args:
      folder: the folder to write them in.
      shards: the planned files.
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
                # Setting the low byte makes a small finite number in every dtype.
                file.write(bytes([number % 255 + 1])[: end - start])


def fetch(model: str, folder: Path) -> Path:
    """Downloads only the headers of a model on the Hub to a new folder.

    If the Hub cannot be reached, a copy from an earlier download is used.

    Args:
      model: the id of a model, with or without `@revision`.
      folder: the folder to make.

    Returns:
      The folder, or the folder of the earlier copy.

    Raises:
      FileNotFoundError: the Hub has no such model, or cannot be reached.
      ValueError: the model has no weights in safetensors.
    """
    name, _, revision = model.partition("@")
    check_id(name)
    import huggingface_hub  # here: local folders do not need it

    try:
        info = huggingface_hub.model_info(name, revision=revision or None)
    # The client raises many exceptions when it cannot reach the Hub.
    except Exception as unreachable:
        try:
            cached = huggingface_hub.snapshot_download(
                name, revision=revision or None, local_files_only=True
            )
        except Exception:
            raise FileNotFoundError(
                f"{model!r} is not a folder and not in the download cache, and it "
                f"could not be downloaded: {str(unreachable).strip()}\nCheck the "
                "spelling and the connection. If access is restricted, run `hf auth "
                "login`."
            ) from unreachable
        return Path(cached)
    names = [file.rfilename for file in info.siblings or []]
    wanted = [x for x in (WEIGHTS, INDEX, ADAPTER) if x in names][:1]
    if not wanted:
        raise ValueError(
            f"{no_weights(model, names)}\nOnly safetensors files have headers that can "
            "be read without the weights. Download the model first."
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
    except Exception as error:  # the client raises many kinds, as above
        raise FileNotFoundError(
            f"the Hub has {model}, but not all of its headers could be downloaded: "
            f"{str(error).strip()}"
        ) from error
    return folder


def _shards(model, folder):
    """Returns the files that an index names, all of them beside it."""
    of_name = read_json(folder, INDEX).get("weight_map")
    files = sorted({*map(str, of_name.values())}) if isinstance(of_name, dict) else []
    if not files or any("/" in file for file in files):
        raise ValueError(f"{INDEX} of {model} must name files beside it, and does not.")
    return files


def _write_found(path, found, tied):
    """Writes a file with a header that the Hub's client has read."""
    header = {"__metadata__": dict(found.metadata)} if found.metadata else {}
    for name, info in found.tensors.items():
        entry = dataclasses.asdict(info)
        header[name] = {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
    ends = [info.data_offsets[1] for info in found.tensors.values()]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    _write(path, start, len(start) + max(ends, default=0), tied)
