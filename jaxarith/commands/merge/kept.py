"""Checks whether results that were kept from earlier runs can be used again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxarith import files, hub, stream
from jaxarith.commands.merge.prepared import Prepared

# Facts that must not have changed, with the reason to state if they have.
_SAME = {
    "jaxarith": "it was made by another version of jaxarith",
    "recipe": "its recipe has changed",
    "dtype": "the dtype has changed",
    "seed": "the seed has changed",
    "options": "the flags have changed",
}
_OPTIONS = ("vocabulary", "missing", "dequantize", "shard_size")


def facts(one: Prepared) -> dict[str, Any]:
    """Returns the additional facts in the record of a result that is kept.

    Args:
      one: the merge, before it is done.
    """
    options = {name: getattr(one.args, name) for name in _OPTIONS}
    return {
        "options": {**options, "device": one.args.device or jax.default_backend()},
        "files_beside": _beside(one),
    }


def with_weights(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the facts with the hashes of the weights in a folder."""
    return {**found, "weights": stream.sha256([folder])[str(folder)]}


def is_kept(folder: Path) -> bool:
    """Whether the record of a folder says that an earlier run kept it."""
    return "files_beside" in (_record(folder) or {})


def changed(folder: Path, one: Prepared, documents: list) -> str | None:
    """Returns why a folder cannot replace a merge, from its record; None if it may.

    Args:
      folder: the folder of an earlier run.
      one: the merge that would be done.
      documents: the earlier documents, as records have them.
    """
    record = _record(folder)
    if record is None:
        return f"it has no readable {hub.RECORD}"
    now = _plain({**one.facts({}), **facts(one)})
    for key, why in _SAME.items():
        if record.get(key) != now[key]:
            return why
    if _recipes(record.get("documents", [])) != _recipes(documents):
        return "the recipe of a document that it merges has changed"
    names = [(x.get("model"), x.get("role")) for x in record.get("inputs", [])]
    if names != [(x["model"], x["role"]) for x in now["inputs"]]:
        return "its models have other names"
    if not one.args.hashes or not all(x.get("sha256") for x in record["inputs"]):
        return "without hashes (--no-hashes) it is unknown whether its models changed"
    return None


def stale(folder: Path, one: Prepared) -> str | None:
    """Returns why a folder differs from what the merge would make; None if it does not.

    It compares the hashes of all files.

    Args:
      folder: the folder of an earlier run, of the same recipe.
      one: the merge that would be done.
    """
    record = _record(folder) or {}
    now = _plain(one.facts(stream.sha256(one.opened.folders)))
    for before, model in zip(record["inputs"], now["inputs"], strict=True):
        if before["sha256"] != model["sha256"]:
            return f"the weights of {model['model']} have changed"
    if record.get("files_beside") != _beside(one):
        return "configurations or tokenizers of its models have changed"
    try:
        weights = stream.sha256([folder]).get(str(folder))
    except OSError as error:
        return f"it cannot be read: {error}"
    if record.get("weights") != weights:
        return "its weights are not those that were written"
    return None


def _record(folder: Path) -> dict[str, Any] | None:
    """Returns the record of a folder; None if it has none, or one of another form."""
    try:
        record = files.read_json(folder / hub.RECORD)
        documents = record.get("documents", [])
        entries = [*record["inputs"], *documents]
        whole = all(isinstance(x, dict) for x in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _recipes(documents: list[dict[str, Any]]) -> list[Any]:
    return [(x.get("name"), _plain(x.get("recipe"))) for x in documents]


def _plain(values: Any) -> Any:
    """Returns the values in the form that JSON gives them."""
    return json.loads(json.dumps(values))


def _beside(one: Prepared) -> str:
    """Returns one hash of all files of the models that are read, except weights."""
    folders = [*one.opened.folders, *([one.tokenizer] if one.tokenizer else [])]
    total = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        for file in _small(folder) if folder.is_dir() else ():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def _small(folder: Path) -> Iterable[Path]:
    """Yields the files of a model other than weights, such as tokenizers."""
    found = {*hub.side_files(folder), *folder.glob("*.json")}
    return sorted(file for file in found if file.name != hub.RECORD)
