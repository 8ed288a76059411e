"""Reading files that others made: only regular files, and with limits on size."""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

JSON_BYTES = 2**26  # largest size of a JSON file
_JSON_DEPTH = 64
_LONG_NUMBER = re.compile(r"\d{309}")  # the largest float has as many digits
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike, mode: int) -> None:
    """Raises an error unless a path leads to a regular file.

    Args:
      path: the path, for the message.
      mode: its `st_mode`.

    Raises:
      IsADirectoryError: the path is a folder.
      ValueError: it is a pipe, a socket or a device.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise ValueError(f"{path} is {kind}; expected a file. Remove or replace it.")


def opened(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading, but never a pipe or a device.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the path is not a regular file.
    """
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_regular(path, os.fstat(number).st_mode)
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


class Stamp(NamedTuple):
    """Four numbers that change when a file is replaced or modified."""

    device: int
    inode: int
    size: int
    modified: int


def stamp(file: str | os.PathLike | int) -> Stamp:
    """Returns the stamp of a file, given its path or its open file descriptor."""
    found = os.stat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def read(path: str | os.PathLike, most: int | None = None) -> bytes:
    """Returns the content of a file, but never of a pipe or a device.

    Args:
      path: path of the file.
      most: largest size in bytes; None allows any size.

    Raises:
      OSError: the file cannot be opened or read.
      ValueError: the path is not a regular file, or the file is too large.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"{path} has {size:,} bytes; expected at most {most:,}.")
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file that somebody else may have made.

    Raises:
      OSError: the file cannot be opened or read.
      ValueError: the path is not a regular file, or the file is too large, is not JSON
        in UTF-8, is nested too deeply or has a number that is too large for a float.
    """
    return parse_json(read(path, JSON_BYTES).decode("utf-8"))


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Returns the value of a JSON text, with the limits of `read_json`.

    Args:
      text: the JSON text.
      unique: whether an object that has a key twice is an error.

    Raises:
      ValueError: the text is not JSON, or it breaks a limit.

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
    if _LONG_NUMBER.search(text) is not None:  # rare, so most texts skip the check
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

    Links to files must stay inside the folder. Links to blobs in the Hub's cache are
    allowed too. Subfolders are not checked. Links to folders are skipped, because no
    reader opens them.

    Raises:
      ValueError: the folder holds another link, a pipe, a socket or a device.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        try:
            mode = entry.stat().st_mode
        except OSError:  # nobody can read a link to nothing or to itself
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
                "or replace it by a copy of the file that it leads to."
            )


def is_blob(path: str | os.PathLike) -> bool:
    """Returns whether a file is a link to a blob in the Hub's cache."""
    path = Path(path)
    place, target = path.parent.resolve(), path.resolve()
    model = target.parent.parent
    return (
        path.is_symlink()
        and target.parent.name == "blobs"
        and place.is_relative_to(model / "snapshots")
    )
