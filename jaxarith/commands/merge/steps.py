"""Runs the merges of a file with several documents, one after the other."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxarith import hub, stream, tree
from jaxarith.commands.merge import documents, kept, mergekit_yaml
from jaxarith.commands.merge.documents import Document
from jaxarith.commands.merge.located import Located
from jaxarith.commands.merge.prepared import Prepared, prepared
from jaxarith.report import printable, shown


def described(
    found: Sequence[Document],
    args: argparse.Namespace,
    temporary: Path,
    names: Located | None = None,
) -> Iterator[tuple[Document, Prepared, str]]:
    """Yields each document with a text about its merge; no weights are read.

    The results of other documents are described by the headers that they will write.

    Args:
      found: the documents, in order.
      args: the flags of the command.
      temporary: a folder for the headers.
      names: the folders of models by their names.

    Raises:
      FileNotFoundError, ValueError: a merge would fail, as its headers show.
    """
    names = names or Located()
    for one in found:
        with (
            _named_errors(one, found, names),
            _opened(one, found, args, names) as ready,
        ):
            yield one, ready, ready.described()
            if one is not found[-1]:
                ready.sketch(temporary / str(one.name))
                names = names.also(str(one.name), str(temporary / str(one.name)))


def plans(
    found: Sequence[Document],
    args: argparse.Namespace,
    temporary: Path,
    names: Located | None = None,
) -> str:
    """Returns a text that says what all merges would do.

    Args:
      found, args, temporary, names: as for `described`.
    """
    texts, before = [], {}
    for one, ready, text in described(found, args, temporary, names):
        if len(found) > 1:
            place = _fate(one, found, ready, args, before)
            before[one.name] = _of_record(one, ready.facts({}), before)
            text = f"document {one.label}\ngoes to  {place}\n{text}"
        texts.append(text)
    return printable("\n\n".join(texts))


def _fate(one, found, ready, args, before):
    """Returns a text that says where the result of a document goes."""
    if one is found[-1]:
        return str(args.out or args.folder or "the new folder")
    folder = args.intermediate_dir and args.intermediate_dir / one.name
    if not folder:
        return "a temporary folder, which is removed"
    if not folder.exists():
        return f"{folder}, where it is kept"
    if why := kept.changed(folder, ready, _used(one, before)):
        return f"{folder}, made again: {why}"
    return f"{folder}, where it is; used if the hashes of its models are the same"


def run(found: Sequence[Document], args: argparse.Namespace, out: Path) -> None:
    """Runs the merges of all documents; the last one makes `out`.

    All are checked from headers before the first one begins.

    Args:
      found: the documents, in order.
      args: the flags of the command.
      out: the new folder.

    Raises:
      FileNotFoundError, ValueError, OSError: a merge fails; the message has the line
        of its document. `out` does not exist then.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for _ in described(found, args, Path(temporary)):
            pass
    with contextlib.ExitStack() as stack:
        folder = args.intermediate_dir
        if folder is None:
            folder = stack.enter_context(hub.staging(out.parent.resolve()))
        folder = folder.resolve()
        names, before = Located(), {}
        for note in [] if args.quiet else documents.shadowed(found):
            _tell(note)
        for one in found:
            is_last = one is found[-1]
            place = out if is_last else folder / str(one.name)
            with (
                _named_errors(one, found, names),
                _opened(one, found, args, names) as ready,
            ):
                ready.check_apart(place)
                _made(one, ready, place, args, _used(one, before), is_last)
            facts = hub.read_json(place, hub.RECORD)
            before[one.name] = _of_record(one, facts, before)
            names = names.also(str(one.name), str(place))


def check_folders(
    found: Sequence[Document], args: argparse.Namespace, out: Path
) -> None:
    """Raises a ValueError if results would replace others or contain the new folder."""
    if args.intermediate_dir is None:
        return
    if args.intermediate_dir.is_file():
        raise ValueError(
            f"{args.intermediate_dir} is a file. Name another --intermediate-dir."
        )
    for one in found[:-1]:
        folder = (args.intermediate_dir / str(one.name)).resolve()
        if folder.exists() and not kept.is_kept(folder):
            raise ValueError(
                f"{folder} exists, but `jaxarith merge` did not keep it there. Name "
                "another --intermediate-dir."
            )
        new = out.resolve()
        if new.is_relative_to(folder) or folder.is_relative_to(new):
            raise ValueError(
                f"{folder} and {out} overlap. Name another --intermediate-dir."
            )


def _made(one, ready, place, args, used, is_last):
    """Merges a document, unless a kept result can be used."""
    keeps = not is_last and args.intermediate_dir is not None
    if keeps and place.exists():
        why = kept.changed(place, ready, used) or kept.stale(place, ready)
        if why is None:
            if not args.quiet:
                _tell(f"{one.name}: {place} is used as it is")
            return
        if not args.quiet:
            _tell(f"{one.name}: made again, because {why}")
    facts = kept.facts(ready) if keeps else {}

    def more(folder: Path) -> dict[str, Any]:
        whole = keeps and args.hashes
        found = kept.with_weights(facts, folder) if whole else facts
        return {**found, "documents": used}

    if not args.quiet:
        for note in ready.notes:
            _tell(f"{one.name or 'the result'}: {note}")
    report = ready.merge(place, overwrite=keeps or args.overwrite, more=more)
    if not args.quiet:
        where = place if is_last or keeps else one.name
        print(done(ready, where, report))


def done(ready: Prepared, place: Any, report: stream.Report) -> str:
    """Returns a line that says what a merge did."""
    recipe = ready.recipe
    return (
        f"{recipe.request.method} of {tree.counted(len(recipe.models), 'model')}: "
        f"{place} "
        f"({_size(report.bytes_read)} read, {_size(report.bytes_written)} written, "
        f"{report.seconds:.1f} s)"
    )


def _tell(note):
    print(shown(f"note: {note}"), file=sys.stderr)


def _of_record(one, facts, before):
    """Returns a document and those before it, for the record of a later one."""
    own = {"name": one.name, "recipe": facts["recipe"], "inputs": facts["inputs"]}
    return {"uses": one.uses, "own": own, "before": _used(one, before)}


def _used(one, before):
    """Returns all documents that a document needs, in order and each once."""
    found = {}
    for name in one.uses:
        for earlier in (*before[name]["before"], before[name]["own"]):
            found[earlier["name"]] = earlier
    return [*found.values()]


@contextlib.contextmanager
def _opened(
    one: Document, found: Sequence[Document], args: argparse.Namespace, names: Located
) -> Iterator[Prepared]:
    if one is not found[-1]:  # --dtype does not round intermediate results
        args = argparse.Namespace(**{**vars(args), "dtype": None})
    recipe = mergekit_yaml.build(one.root, seed=args.seed, folder_of=names.folder)
    with prepared(recipe, args, names) as ready:
        yield ready


@contextlib.contextmanager
def _named_errors(
    one: Document, found: Sequence[Document], names: Located
) -> Iterator[None]:
    """Adds the document to errors, with the names of its models."""

    def text(error):
        said = names.named(str(error))
        if len(found) == 1 or said.startswith(one.root.file):
            return said
        return f"{one.root.place}: {said}"

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(text(error)) from error
    except ValueError as error:
        raise ValueError(text(error)) from error


def _size(count):
    """Returns a number of bytes in GB, or in MB if it is small."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
