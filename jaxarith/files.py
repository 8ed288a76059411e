"""Files that others made: read with limits, and only if they are files."""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

JSON_BYTES = 2**26  # the most that a file of JSON may have
_JSON_DEPTH = 64
_LONG_NUMBER = re.compile(r"\d{309}")  # as long as the largest float
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike, mode: int) -> None:
    """Raises a ValueError if what a path leads to is no file, nor a folder.

    Of a folder it raises an IsADirectoryError, as to open one does.

    Args:
      path: for the message.
      mode: `st_mode` of it.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise ValueError(f"{path} is {kind}; expected a file. Remove or replace it.")


def opened(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to be read, never a pipe or a device.

    Raises:
      OSError: it cannot be opened.
      ValueError: it is no file.
    """
    # Without O_NONBLOCK, to open a pipe is to wait for somebody who writes to it.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_regular(path, os.fstat(number).st_mode)
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


class Stamp(NamedTuple):
    """What tells that a file is still the one that it was."""

    device: int
    inode: int
    size: int
    modified: int


def stamp(file: str | os.PathLike | int) -> Stamp:
    """The stamp of a file, by its path or its number where it is open."""
    found = os.stat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def read(path: str | os.PathLike, most: int | None = None) -> bytes:
    """The content of a file, never of a pipe or a device.

    Args:
      path: the file.
      most: the most bytes that it may have; None allows any number.

    Raises:
      OSError: it cannot be opened or read.
      ValueError: it is no file, or too large.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"{path} has {size:,} bytes; expected at most {most:,}.")
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file that somebody else may have made.

    Raises:
      OSError: it cannot be opened or read.
      ValueError: it is no file, too large, no JSON in UTF-8, or nested too deeply, or
        has a number that is too large for a float.
    """
    return parse_json(read(path, JSON_BYTES).decode("utf-8"))


def parse_json(text: str, *, unique: bool = False) -> Any:
    """The value of a text in JSON, with the limits of `read_json`.

    Args:
      text: the text.
      unique: whether a key that an object has twice is an error.

    Raises:
      ValueError: it is no JSON, or beyond the limits.

    Example:
      >>> parse_json("[" * 100 + "]" * 100)
      Traceback (most recent call last):
      ValueError: it is nested more than 64 levels deep
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it is nested more than {_JSON_DEPTH} levels deep") from None
    _check_depth(value)
    if _LONG_NUMBER.search(text) is not None:  # seldom: the others are not looked at
        _check_numbers(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_JSON_DEPTH + 1):
        level = [
            child
            for parent in level
            for child in _children(parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_JSON_DEPTH} levels deep")


def _check_numbers(value: Any) -> None:
    waiting = [value]
    while waiting:
        leaf = waiting.pop()
        if type(leaf) is int and abs(leaf) > sys.float_info.max:
            raise ValueError(f"it has a whole number of {len(str(abs(leaf)))} digits")
        waiting += _children(leaf)


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_folder(folder: str | os.PathLike) -> None:
    """Checks that reading or copying a model's folder reads nothing outside it.

    Links to files must stay inside the folder, but for those to the blobs of the Hub's
    cache. Subfolders are not looked into; links to folders are nobody's files.

    Raises:
      ValueError: it holds such a link, a pipe, a socket or a device.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nothing, or to itself, is nothing that is read
            continue
        if stat.S_ISDIR(mode):
            continue
        check_regular(path, mode)
        if not entry.is_symlink():
            continue
        target = path.resolve()
        if not (target.is_relative_to(Path(folder).resolve()) or is_blob(path)):
            raise ValueError(
                f"{path} is a link to {target}, outside the model's folder. Remove it, "
                "or copy what it leads to in its place."
            )


def is_blob(path: str | os.PathLike) -> bool:
    """Whether a file is one of the Hub's cache: a link to a blob named by its hash."""
    path = Path(path)
    place, target = path.parent.resolve(), path.resolve()
    model = target.parent.parent
    return (
        path.is_symlink()
        and target.parent.name == "blobs"
        and place.is_relative_to(model / "snapshots")
    )
