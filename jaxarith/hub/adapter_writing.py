"""Writes adapters as folders that PEFT loads, tensor by tensor."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxarith.hub import folders, safetensors
from jaxarith.hub.adapter_config import CONFIG
from jaxarith.hub.adapter_tensors import PREFIX
from jaxarith.hub.stored import Stored


class Spill:
    """A temporary file for arrays whose final file cannot be written yet.

    Raises:
      ValueError: in `put`, if an array has NaN or infinite values.
    """

    def __init__(self, path: Path):
        self._path, self._used = path, 0

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, label: str, array: np.ndarray) -> Stored:
        """Writes an array and returns a tensor that reads it back when it is used."""
        if not np.isfinite(array).all():
            raise ValueError(
                f"{label}: the result has NaN or infinite values, or overflows "
                f"{array.dtype}. Check the models, or write float32."
            )
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._file.flush()
        start, self._used = self._used, self._used + array.nbytes
        read = functools.partial(_read, self._path, start, array.dtype)
        return Stored(array.dtype, array.shape, read)


def _read(path, start, dtype, count):
    found = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=start)
    return found.view(dtype)


def factor_names(module: str, embedding: bool = False) -> tuple[str, str]:
    """Returns the names of the factors A and B of a module in a file.

    Example:
      >>> factor_names("fc")
      ('base_model.model.fc.lora_A.weight', 'base_model.model.fc.lora_B.weight')
    """
    if embedding:
        return (
            f"{PREFIX}{module}.lora_embedding_A",
            f"{PREFIX}{module}.lora_embedding_B",
        )
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def config(
    ranks: Mapping[str, int],
    base: str | None,
    *,
    task_type: str | None = None,
    modules_to_save: list[str] | None = None,
    fan_in_fan_out: bool = False,
    bias: str = "none",
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the `adapter_config.json` for factors with the scale 1.

    `r` is the largest rank and α is `r`, so readers that ignore patterns also scale
    correctly.

    Args:
      ranks: the rank of each module, by the module's whole name.
      base: name of the model that is adapted.
      task_type: PEFT's task type, for example `CAUSAL_LM`.
      modules_to_save: names of modules that the adapter replaces.
      fan_in_fan_out: whether layers are Conv1D, as in GPT-2.
      bias: which biases the adapter replaces: PEFT's "none" or "all".
      more: further keys.

    Example:
      >>> config({"a.fc": 2, "b.fc": 4}, "base")["rank_pattern"]
      {'^a\\\\.fc': 2}
    """
    largest = max(ranks.values())
    patterns = {
        f"^{re.escape(module)}": rank
        for module, rank in sorted(ranks.items())
        if rank != largest
    }
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "modules_to_save": modules_to_save,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **(more or {}),
    }


def write(
    folder: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> int:
    """Writes the two files of an adapter into a folder.

    Args:
      folder: a folder that exists.
      tensors: the tensors by their names in the file.
      config: the content of `adapter_config.json`.

    Returns:
      The number of bytes of weights.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    [shard] = safetensors.plan(tensors, size + 1, {"format": "pt"})
    shard = shard._replace(name=folders.ADAPTER)
    with safetensors.Writer(folder, [shard]) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor.read())
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return shard.nbytes
