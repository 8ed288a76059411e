"""A bank of task vectors, which all scripts share: what one has trained, others take.

    BANK/<model>/<method>/<task>.safetensors    the task vector
    BANK/<model>/<method>/<task>.json           its configuration and its metrics

A vector is taken only where its configuration is the one that is asked for. One from
outside (`origin` is "external") was not trained here and so has no recipe: it is taken
wherever the pre-trained model and the method are those that are asked for.
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
_OF_EXTERNAL = ("method", "params_0")  # what of a configuration they have


def vector_file(bank: Path, model: str, method: str, task: str) -> Path:
    """Where a task vector is; of a model that is a folder, its last part counts.

    Example:
      >>> vector_file(Path("bank"), "openai/clip-vit-base-patch32", "linear", "dtd")
      PosixPath('bank/openai--clip-vit-base-patch32/linear/dtd.safetensors')
    """
    path = Path(model)
    name = path.name if path.is_dir() else model.replace("/", "--")
    return Path(bank) / name / method / f"{task}.safetensors"


def plain_recipe(config: TrainConfig) -> dict:
    """What of a recipe decides on a vector, as plain data."""
    options = identity_of(config)
    if config.penalty is None:  # whose options then change nothing
        options = {k: v for k, v in options.items() if not k.startswith("penalty_")}
    return options


def checksum(records: Sequence[dict]) -> int:
    """One number of 32 bits for samples of arrays, such as texts as tokens."""
    crc32 = 0
    for record in records:
        for name in sorted(record):
            crc32 = zlib.crc32(np.ascontiguousarray(record[name]).tobytes(), crc32)
    return crc32


def read(file: Path, configuration: dict[str, Any]) -> Tree | None:
    """A task vector from the bank; None if the bank lacks it.

    Args:
      file: from `vector_file`.
      configuration: what the vector must have been trained with, as plain data.

    Raises:
      ValueError: the vector was trained with another configuration.
    """
    return hub.load_tree(file)[0] if has(file, configuration) else None


def has(file: Path, configuration: dict[str, Any]) -> bool:
    """Whether the bank has a task vector; arguments and errors as for `read`."""
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
    """Whether a vector that is in the bank comes from outside."""
    return record(file)["configuration"].get("origin") == EXTERNAL


def write(file: Path, tau: Params, configuration: dict, metrics: dict):
    """Adds a task vector with what it was trained with and what was measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # First what describes the vector: a vector that is there is complete.
    report.write_json(
        file.with_suffix(".json"),
        {"configuration": _plain(configuration), "metrics": metrics},
    )
    hub.save_tree(file, tau, {"task": file.stem, "method": file.parent.name})


def add_metrics(file: Path, metrics: dict):
    """Adds what was measured of a vector that is in the bank."""
    content = record(file)
    content["metrics"] |= metrics
    report.write_json(file.with_suffix(".json"), content)


def record(file: Path) -> dict:
    """The configuration and the metrics of a vector that is in the bank.

    Raises:
      ValueError: the file that holds them is missing or damaged.
    """
    described = file.with_suffix(".json")
    try:
        content = files.read_json(described)
        return {name: content[name] for name in ("configuration", "metrics")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is in the bank, and {described.name}, which says what it is, "
            f"cannot be read: {error!r}. Remove both to train it again."
        ) from error


def _plain(configuration):
    return json.loads(json.dumps(configuration))
