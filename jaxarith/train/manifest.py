"""Manifests: JSON files that list a folder's files with checksums.

A manifest is written last, under a temporary name, and then renamed. So a folder with a
manifest is complete. It holds a checksum of every other file and of itself.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxarith import files, report

NAME = "manifest.json"


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Completes a folder with a manifest of its files and `content`, plain data."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    crc32s = {path.relative_to(folder).as_posix(): _file_crc32(path) for path in paths}
    content = {**content, "files": crc32s}
    report.write_json(folder / NAME, {**content, "crc32": _crc32(content)})


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the content of the manifest, or None if it is missing or damaged."""
    try:
        content = files.read_json(folder / NAME)
        intact = content.pop("crc32") == _crc32(content)
        return content if intact and _are_files(content["files"]) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _are_files(listed):
    """Whether `listed` maps names of files in the folder to checksums."""
    return isinstance(listed, dict) and all(
        type(crc32) is int and not {"/", ".."} & {*PurePosixPath(name).parts}
        for name, crc32 in listed.items()
    )


def flaw(folder: Path) -> str | None:
    """Returns the first damage found in the files of a folder, or None."""
    if (content := read(folder)) is None:
        return f"{NAME} is not what was written"
    for name, crc32 in content["files"].items():
        try:
            if _file_crc32(folder / name) != crc32:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
        except ValueError as error:  # not a regular file, but a device, say
            return str(error)
    return None


def _crc32(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _file_crc32(path):
    crc32 = 0
    with files.opened(path) as file:
        while block := file.read(2**20):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def differences(there: Mapping, here: Mapping) -> list[str]:
    """Returns one line for each field in which two nested dicts differ.

    Example:
      >>> differences({"train": {"steps": 2}}, {"train": {"steps": 3}})
      ['train/steps: 2 there, 3 here']
    """
    there, here = _fields(there), _fields(here)
    return [
        f"{field}: {there.get(field, 'absent')} there, {here.get(field, 'absent')} here"
        for field in dict.fromkeys([*there, *here])
        if field not in there or field not in here or there[field] != here[field]
    ]


def _fields(value, parents=()):
    """Returns the values of a nested dict by slash path."""
    if not isinstance(value, Mapping) or not value:
        return {"/".join(parents): value}
    parts = [_fields(child, (*parents, key)) for key, child in value.items()]
    return {field: value for part in parts for field, value in part.items()}
