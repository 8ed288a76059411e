"""Writes outputs safely: checks what may be replaced, and renames finished folders.

An output is made in a temporary folder on the same disk and renamed once complete.
A folder that another program created in the meantime is never replaced.
"""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from jaxarith import files, report

# This file beside merged weights records how they were made and which files were
# copied.
RECORD = "jaxarith_merge.json"
_PREFIX = ".jaxarith-"
# File endings in folders of models. A folder with files of other kinds is not replaced.
_SUFFIXES = frozenset(
    ".safetensors .json .jsonl .txt .md .model .jinja .msgpack .bin .h5 .onnx .gguf "
    ".ot .tiktoken .spm .bpe .vocab .codes .tokenizer .v1 .v2 .v3 .v7 .v11 .yaml .yml "
    ".png .jpg .svg .pdf".split()
)
# Files with these endings are more likely to be somebody's own work.
_OWN = frozenset(".txt .md .bin .jsonl".split())
_OF_MODELS = re.compile(
    r".*(vocab|merges|tokens|bpe|dict|labels|classes|licen[cs]e|notice|requirements|"
    r"policy|terms|read_?me|model_?card|change_?log|security|contributing|conduct|"
    r"explainability|bias|privacy|safety|acknowledge?ments?|model|training_args|"
    r"optimizer|scheduler|-of-\d+).*"
)
# Files that a merge writes and that its record does not list.
_MERGED = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
    r"(adapter_)?config\.json|README\.md"
)
_NAMES = frozenset(
    "license licence notice copying use_policy readme .gitattributes".split()
)
_MODEL = frozenset(
    "config.json adapter_config.json model.safetensors adapter_model.safetensors "
    "model.safetensors.index.json flax_model.msgpack".split()
)


def check_out(
    out: str | os.PathLike,
    overwrite: bool,
    inputs: Iterable[str | os.PathLike] = (),
    copied: Collection[str] = (),
    kept: bool = False,
) -> Path:
    """Checks that an output folder may be written, and returns its real path.

    Args:
      out: the folder.
      overwrite: whether a folder that exists may be replaced.
      inputs: folders and files that are read. They and the targets of their links must
        not be replaced.
      copied: names of files that will be written to the folder. It may already hold
        them.
      kept: whether files of other names stay in the folder.

    Raises:
      FileExistsError: the folder exists, and `overwrite` is False.
      ValueError: the folder holds one of the inputs; or it is not empty and does not
        hold a model; or replacing it would delete files that jaxarith did not write.

    Example:
      >>> check_out("merged", overwrite=False)  # doctest: +SKIP
      PosixPath('/home/me/merged')
    """
    out = Path(out)
    if not os.path.lexists(out):
        return out.parent.resolve() / out.name
    if out.is_symlink() or not out.is_dir() or _holds_current(out):
        raise FileExistsError(
            f"{out} is a file, a link, the current folder or a folder above it. Name a "
            "new folder."
        )
    if not overwrite:
        raise FileExistsError(
            f"{out} exists. Name a new folder, or replace it with overwrite=True "
            "(--overwrite)."
        )
    real = out.resolve()
    for path in map(Path, inputs):
        for file in [path, *(path.iterdir() if path.is_dir() else ())]:
            if file.resolve().is_relative_to(real):
                raise ValueError(
                    f"{out} holds {file}, which is an input. Name another folder."
                )
    _check_model(out, copied, kept)
    return real


def _holds_current(folder):
    try:
        return Path.cwd().resolve().is_relative_to(folder.resolve())
    except FileNotFoundError:  # the current folder was removed
        return False


def _check_model(out, copied, kept):
    """Raises a ValueError if a folder is neither empty nor the folder of a model."""
    entries = list(out.iterdir())
    if entries and not _MODEL & {path.name for path in entries}:
        raise ValueError(
            f"{out} has files but no config.json or weights, so it is not a model and "
            "is not replaced. Name another folder."
        )
    record = _written(out)
    written = {*(record or ()), *copied}
    if kept or record is None:
        unknown = _unknown(out, _is_of_kind if kept else _is_of_model)
        why = "which no model's folder has"
    else:
        unknown = (file for file in out.rglob("*") if not _is_merged(file))
        why = "which jaxarith did not write there"
    unknown = sorted(str(path.relative_to(out)) for path in unknown)
    if unknown := [name for name in unknown if name not in written]:
        raise ValueError(
            f"{out} holds {report.listed(unknown, 3)}, {why}, so it is not replaced. "
            "Move these files elsewhere, or name another folder."
        )


def _written(folder):
    """Returns the files that a merge wrote, if the folder has a record of them."""
    try:
        record = files.read_json(folder / RECORD)
    except (FileNotFoundError, ValueError):
        return None
    names = record.get("files") if isinstance(record, dict) else None
    if not isinstance(names, list):
        return None
    return [RECORD, *(name for name in names if isinstance(name, str))]


def _is_of_kind(name):
    """Whether models have files of this kind; the name is in lower case."""
    return Path(name).suffix in _SUFFIXES and not name.startswith(".")


def _is_of_model(name):
    """Like `_is_of_kind`, but False for kinds that people keep beside a model."""
    is_own = Path(name).suffix in _OWN and not _OF_MODELS.fullmatch(name)
    return _is_of_kind(name) and not is_own


def _is_merged(path):
    """Whether every merge writes a file or a folder of this name."""
    if path.is_dir() and not path.is_symlink():
        return not path.name.startswith(".")
    return _MERGED.fullmatch(path.name) is not None


def _unknown(folder, is_ours):
    """Returns entries that no model has: hidden files, sources, data, folder links."""
    # Some models bring their own code, and their configurations name it.
    code = any(_names_code(file) for file in folder.glob("*config.json"))
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if path.is_dir() and not path.is_symlink() and not name.startswith("."):
            yield from _unknown(path, is_ours)
        elif not path.is_file() or not (
            path.stem.lower() in _NAMES
            or is_ours(name)
            or (path.suffix == ".py" and code)
        ):
            yield path


def _names_code(file):
    return file.is_file() and b'"auto_map"' in file.read_bytes()


def state(out: Path) -> tuple[int, ...] | None:
    """Returns numbers that change when a folder is replaced or its entries change.

    Args:
      out: the folder.

    Returns:
      The numbers, to be compared with `==`; None if the folder does not exist.
    """
    try:
        found = out.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def publish(new: Path, out: Path, before: tuple[int, ...] | None, aside: Path) -> None:
    """Renames a complete folder to `out`, unless `out` has changed since `before`.

    Args:
      new: the complete folder.
      out: its new name. An old folder of this name is moved to `aside`.
      before: the `state` of `out` when the work began.
      aside: a free path on the same disk for the old folder.

    Raises:
      FileExistsError: another program made or changed `out` in the meantime.
    """
    if before is not None:
        sync(new)  # the old folder must not go before the new one is on the disk
    if state(out) != before:
        raise _came(out)
    try:
        if before is not None:
            os.replace(out, aside)
        try:
            out.mkdir()  # fails if another program made it first; `replace` would not
        except FileExistsError:
            raise _came(out) from None
        try:
            os.replace(new, out)  # onto an empty folder only
        except BaseException as error:
            with contextlib.suppress(OSError):
                out.rmdir()
            if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:
                raise _came(out) from None
            raise
    except BaseException:
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        raise
    if before is not None:
        sync_entries(out.parent)


def _came(out):
    return FileExistsError(
        f"another program made or changed {out} in the meantime, so it is left as it "
        "is. Name a new folder."
    )


def sync(path: Path) -> None:
    """Flushes a file, or a folder and everything in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    sync_entries(path)


def sync_entries(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Makes a temporary folder in `parent` and removes it at the end, also on errors.

    Missing parents are made, and removed again if they stay empty. Only a killed
    process leaves the folder behind, under a name that begins with `.jaxarith-`. The
    next run warns about it.

    Args:
      parent: the folder in which to make it, on the disk of the output.

    Returns:
      A context manager for the path of the temporary folder.

    Example:
      >>> with staging(out.parent) as temporary:  # doctest: +SKIP
      ...     publish(made_in(temporary), out, state(out), temporary / "old")
    """
    made = _make(parent)
    try:
        if left := _left_overs(parent):
            warnings.warn(
                f"a run that was killed left {report.listed(list(map(str, left)), 3)}. "
                "If it was replacing an output, the old output may be in `old` there. "
                "Otherwise remove it.",
                stacklevel=3,
            )
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
            with _locked(Path(name)):
                yield Path(name)
    finally:
        with contextlib.suppress(OSError):  # stop at the first that is not empty
            for folder in reversed(made):
                folder.rmdir()


def _make(folder):
    """Makes a folder and its parents; returns those that did not exist."""
    missing = []
    while not folder.is_dir():
        missing.insert(0, folder)
        folder = folder.parent
    made = []
    for folder in missing:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)
    return made


@contextlib.contextmanager
def _locked(folder):
    """Marks a folder as in use; the mark disappears when the process ends."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _left_overs(parent):
    """Returns temporary folders in which no process works any more."""
    return [path for path in sorted(parent.glob(f"{_PREFIX}*")) if _abandoned(path)]


def _abandoned(folder):
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # A folder made just now may not be locked yet.
        return time.time() - os.fstat(file).st_mtime > 1
    except OSError:
        return False
    finally:
        os.close(file)
