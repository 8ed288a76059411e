"""Finds the models of a merge, and what adapters and task vectors add to them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from jaxarith import hub
from jaxarith.hub import Stored, lora, lycoris, packed, quantised, safetensors
from jaxarith.stream import policies, stacks, tying


def open_checkpoint(
    folder: str | os.PathLike, dequantize: DTypeLike | None = None
) -> hub.Checkpoint:
    """Finds the tensors of a checkpoint, which must be readable one by one.

    Args:
      folder: the folder, or a single file.
      dequantize: dtype in which packed weights are read; None refuses them.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ImportError: a file is in GGUF, and the package gguf is not installed.
      ValueError: a file is corrupt or in msgpack, or holds packed weights and
        `dequantize` is None.
    """
    if (file := quantised.gguf.find(Path(folder))) is not None:
        if dequantize is None:
            raise ValueError(
                f"{file} is in GGUF, llama.cpp's format. Let `jaxarith merge` unpack "
                "it (--dequantize), or give the model in floating point."
            )
        tensors, notes = quantised.gguf.read(file, dequantize)
        return hub.Checkpoint(tensors, {"format": "pt"}, file, notes)
    found = hub.open_checkpoint(folder)
    if found.file.name == hub.MSGPACK:
        raise ValueError(
            f"{folder} holds its weights only in {hub.MSGPACK}, which cannot be read "
            f"tensor by tensor. Run `jaxarith convert {folder} NEW_FOLDER` first."
        )
    config = read_config(folder)
    if dequantize is None:
        packed.check(Path(folder), found.tensors, config)
        return found
    tensors, notes = quantised.dequantised(
        Path(folder), found.tensors, config, dequantize
    )
    return found._replace(tensors=tensors, notes=notes)


def rounding_notes(base: bool, models: Mapping[str, bool]) -> list[str]:
    """Returns a warning if base and models were quantised separately.

    Args:
      base: whether the base was packed.
      models: whether each model that is a whole checkpoint was packed, by label.
    """
    labels = [label for label, was_packed in models.items() if base or was_packed]
    if not labels:
        return []
    return [
        f"warning: {', '.join(labels)} and the base were not quantised together. Their "
        "difference contains the rounding of the packed weights, about 3 % of a weight "
        "at 8 bits and 10 % at 4, and fine-tuning may move weights by less"
    ]


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of a checkpoint's `config.json`; empty if it has none."""
    exists = (Path(folder) / "config.json").is_file()
    return hub.read_json(folder) if exists else {}


def adapted(model: str) -> list[str]:
    """Splits `model+adapter` into its parts; another name is the only part.

    Raises:
      ValueError: a part is empty.
    """
    if "+" not in model or Path(model).expanduser().exists():
        return [model]
    parts = list(model.rpartition("+")[::2])
    if "" in parts:
        raise ValueError(
            f"{model!r} has an empty part; expected a model, or `model+adapter`."
        )
    return parts


class Place(NamedTuple):
    """The paths of a model: its folder, an adapter's folder, or a file of a change.

    A model has the first path, the second, or both. Or it has only the third: the file
    of a task vector, or of an adapter of kohya or LyCORIS. If a checkpoint is a single
    file, the first path is that file.
    """

    folder: Path | None = None
    adapter: Path | None = None
    vector: Path | None = None


def find(model: str) -> Place:
    """Finds a model, and downloads it if it is on the Hub.

    Raises:
      FileNotFoundError: the model does not exist.
      ValueError: a part of `model+adapter` is empty, or the second is not an adapter.
    """
    if len(parts := adapted(model)) == 2:
        folder, adapter = map(hub.find, parts)
        if not lora.is_adapter(adapter):
            raise ValueError(
                f"{adapter} is not a PEFT adapter: it has no {lora.CONFIG}. In "
                "`model+adapter`, the part after the + must be a PEFT adapter."
            )
        return Place(folder, adapter)
    path = Path(model).expanduser()
    if lycoris.is_lycoris(path):
        return Place(vector=path)
    if path.is_file() and not _is_tree(path):
        return Place(path)
    if hub.is_vector(model):
        return Place(vector=path)
    folder = hub.find(model)
    return Place(adapter=folder) if lora.is_adapter(folder) else Place(folder)


def _is_tree(file: Path) -> bool:
    """Whether its header shows that `hub.save_tree` wrote a file.

    The metadata then names a task, or the tensors have slash paths.
    """
    if not hub.is_vector(file):
        return False
    tensors, metadata = safetensors.open_file(file)
    return "task" in metadata or any("/" in name for name in tensors)


def find_base(base: str | os.PathLike) -> Path:
    """Finds the folder or the single file of a base model.

    Raises:
      FileNotFoundError: the model does not exist.
      ValueError: it is an adapter, or `hub.save_tree` wrote the file, for example of a
        task vector.
    """
    file = Path(base).expanduser()
    if not file.is_file():
        folder = hub.find(base)
        if lora.is_adapter(folder):
            raise ValueError(
                f"{base} is an adapter, but the base must be a whole model. Give "
                "adapters as models to merge, alone or as `model+adapter`."
            )
        return folder
    if _is_tree(file):
        raise ValueError(
            f"{file} is a task vector or another tree that jaxarith wrote. Give the "
            "folder or the file of the model from which task vectors are measured."
        )
    return file


def layers_of(model: str) -> int | None:
    """Returns a model's number of layers; None for an adapter or task vector alone."""
    if (folder := find(model).folder) is None:
        return None
    # Whether packed weights may be read is asked when the model is opened.
    found = open_checkpoint(folder, "bfloat16")
    return stacks.layers(found.tensors, read_config(folder))


_QUANTISED = re.compile(r"bnb|gptq|awq|fp8|\dbit|int[48]", re.IGNORECASE)


def changes_of(
    base: Mapping[str, Stored],
    models: Mapping[str, Mapping[str, Stored]],
    places: Sequence[Place],
    config: Mapping[str, Any],
    missing: policies.Missing,
) -> tuple[dict[str, lora.Adapter], tying.Pair | None, list[str]]:
    """Finds what adapters and task vectors add to each model or to the base.

    Returns:
      The changes by label, the pair that one of them unties, and notes.
    """
    changes = dict.fromkeys(models, lora.Adapter({}, {}))
    parted, notes = None, []
    tied = None
    if any(place.adapter for place in places):
        tied = tying.pair(base, config)
    for (label, found), place in zip(models.items(), places, strict=True):
        if place.vector is not None:
            changes[label], more = _vector(place.vector, base, label, missing)
            notes += more
        if place.adapter is None:
            continue
        under = base if place.folder is None else found
        changes[label], parts, more = _adapter(place.adapter, under, tied, label)
        notes += more
        if parts and tied is not None:
            tying.check_untied(config, label)
            notes.append(f"{label} moves {tied.embedding} and {tied.head} apart")
            parted = tied
    return changes, parted, notes


def trained_elsewhere(adapter: Path, model: str, label: str) -> list[str]:
    """Returns a note if an adapter was trained on a model other than its base.

    Folders and ids of the Hub count as one model if their last parts are equal. A
    quantised base has another name than the model, and gets another note.
    """
    stated = hub.read_json(adapter, lora.CONFIG).get("base_model_name_or_path")
    if not isinstance(stated, str) or not stated:
        return []
    if _called(stated) == _called(model) or _is_quantised(stated):
        return []
    return [f"{label}: trained on {stated} (its {lora.CONFIG}), but added to {model}"]


def _is_quantised(model: str) -> bool:
    path = Path(model)
    if _QUANTISED.search(path.name):
        return True
    return path.is_dir() and bool(packed.stated_format(read_config(path)))


def _called(model: str) -> str:
    path = Path(model).expanduser()
    name = path.resolve().name if path.is_dir() else path.name.partition("@")[0]
    return name.casefold()


def _vector(
    file: Path, base: Mapping[str, Stored], label: str, missing: policies.Missing
) -> tuple[lora.Adapter, list[str]]:
    """Returns what the task vector or adapter in a file adds to the base, and notes."""
    if lycoris.is_lycoris(file):
        change = lycoris.read(file, base)
        return change, [*change.notes]
    vector = hub.open_vector(file)
    method = "" if vector.method is None else f" by the method {vector.method}"
    deltas, notes = policies.fit_vector(base, vector.tensors, label, missing)
    return lora.Adapter(deltas, {}), [
        f"{label}: the task vector of {vector.task}{method}",
        *notes,
    ]


def _adapter(
    folder: Path, base: Mapping[str, Stored], tied: tying.Pair | None, label: str
) -> tuple[lora.Adapter, bool, list[str]]:
    """Returns an adapter's changes, whether they untie the head, and notes."""
    config = hub.read_json(folder, lora.CONFIG)
    trained_on = str(config.get("base_model_name_or_path"))
    notes = []
    if _is_quantised(trained_on):
        notes.append(f"{label}: trained on {trained_on}, which is quantised")
    if tied is None or tied.embedding not in base:
        change = lora.read_adapter(folder, base)
        return change, False, [*notes, *change.notes]
    change = lora.read_adapter(folder, {tied.head: base[tied.embedding], **base})
    notes += change.notes
    ensured = bool(config.get("ensure_weight_tying"))
    change, untied = tying.apply(change, tied, ensured)
    if not untied:
        change = tying.spread(change, tied, base, label)
    if not untied and (tied.embedding in change.deltas):
        notes.append(
            f"{label}: its factors move {tied.embedding} and {tied.head}, which are "
            "one tied matrix, as in PEFT's merge_and_unload"
        )
    return change, untied, notes
