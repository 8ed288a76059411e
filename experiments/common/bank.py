"""A bank of task vectors that all scripts share.

A script trains a vector once; later scripts read it from the bank:

    BANK/<model>/<method>/<task>.safetensors    the task vector
    BANK/<model>/<method>/<task>.json           its configuration and its metrics

A script uses a stored vector only if its configuration equals the requested one. An
external vector (`origin` is "external") was not trained here, so it has no recipe: only
its pre-trained model and its method are compared.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxarith import files, hub, report
from jaxarith.train import manifest
from jaxarith.train.config import TrainConfig, identity_of
from jaxarith.typing import Params, Tree

EXTERNAL = "external"  # the origin of vectors that were not trained here
_OF_EXTERNAL = ("method", "params_0")  # the entries that are compared for them


def vector_file(bank: Path, model: str, method: str, task: str) -> Path:
    """Returns the path of a task vector in the bank.

    For a model that is a folder, only the last part of its path is used.

    Example:
      >>> vector_file(Path("bank"), "openai/clip-vit-base-patch32", "linear", "dtd")
      PosixPath('bank/openai--clip-vit-base-patch32/linear/dtd.safetensors')
    """
    path = Path(model)
    name = path.name if path.is_dir() else model.replace("/", "--")
    return Path(bank) / name / method / f"{task}.safetensors"


def plain_recipe(config: TrainConfig) -> dict:
    """Returns the options of a recipe that change the vector, as plain data."""
    options = identity_of(config)
    if config.penalty is None:  # without a penalty its options change nothing
        options = {k: v for k, v in options.items() if not k.startswith("penalty_")}
    return options


def checksum(records: Sequence[dict]) -> int:
    """Returns one 32-bit checksum of samples, which are dicts of arrays."""
    crc32 = 0
    for record in records:
        for name in sorted(record):
            crc32 = zlib.crc32(np.ascontiguousarray(record[name]).tobytes(), crc32)
    return crc32


def read(file: Path, configuration: dict[str, Any]) -> Tree | None:
    """Reads a task vector from the bank; returns None if the bank lacks it.

    Args:
      file: path from `vector_file`.
      configuration: configuration that the vector must have, as plain data.

    Raises:
      ValueError: the vector was trained with another configuration.
    """
    return hub.load_tree(file)[0] if has(file, configuration) else None


def has(file: Path, configuration: dict[str, Any]) -> bool:
    """Returns whether the bank has a task vector; arguments and errors as in `read`."""
    if not file.exists():
        return False
    there, asked = record(file)["configuration"], _plain(configuration)
    if there.get("origin") == EXTERNAL:
        there, asked = (
            {key: values.get(key) for key in _OF_EXTERNAL} for values in (there, asked)
        )
    if different := manifest.differences(there, asked):
        lines = "\n  ".join(different)
        raise ValueError(
            f"{file} was trained with another configuration:\n  {lines}\nName another "
            "--bank, or remove the file to train it again."
        )
    return True


def is_external(file: Path) -> bool:
    """Returns whether a vector in the bank is external (not trained here)."""
    return record(file)["configuration"].get("origin") == EXTERNAL


def write(file: Path, tau: Params, configuration: dict, metrics: dict):
    """Adds a task vector to the bank, with its configuration and its metrics."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The record is written first: a vector that exists is then complete.
    report.write_json(
        file.with_suffix(".json"),
        {"configuration": _plain(configuration), "metrics": metrics},
    )
    hub.save_tree(file, tau, {"task": file.stem, "method": file.parent.name})


def add_metrics(file: Path, metrics: dict):
    """Adds metrics to the record of a vector in the bank."""
    content = record(file)
    content["metrics"] |= metrics
    report.write_json(file.with_suffix(".json"), content)


def record(file: Path) -> dict:
    """Returns the configuration and the metrics of a vector in the bank.

    Raises:
      ValueError: the JSON file that holds them is missing or damaged.
    """
    described = file.with_suffix(".json")
    try:
        content = files.read_json(described)
        return {name: content[name] for name in ("configuration", "metrics")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is in the bank, but its record {described.name} cannot be read: "
            f"{error!r}. Remove both files to train the vector again."
        ) from error


def _plain(configuration):
    return json.loads(json.dumps(configuration))
