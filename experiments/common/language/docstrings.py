"""Makes three tasks from the first lines of docstrings of installed packages.

The sentences are real English on one subject. The tasks are: which library a line comes
from, whether it describes a class or a function, and whether its words are in order.
"""

import ast
import importlib.util
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxarith.data import text

PACKAGES = ("matplotlib", "numpy", "scipy", "sklearn")


class Line(NamedTuple):
    """The first line of a docstring, its package, and its kind: class or function."""

    text: str
    package: str
    kind: str


def lines(files: int | None = None) -> list[Line]:
    """Returns the lines of all packages, each text once, sorted by checksum.

    Args:
      files: number of files of a package that are read; by default all.

    Raises:
      ImportError: a package is not installed.
    """
    found: dict[str, Line] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(
                f"{package} is missing. Install it: pip install 'jaxarith[demo]'."
            )
        root = Path(spec.origin).parent
        sources = [file for file in root.rglob("*.py") if "tests" not in file.parts]
        for file in sorted(sources)[:files]:
            for line in _lines_of(file, package):
                found.setdefault(line.text, line)
    return sorted(found.values(), key=lambda line: _checksum(line.text))


def _lines_of(file: Path, package: str) -> Iterator[Line]:
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        first = (ast.get_docstring(node) or "").split("\n\n")[0]
        sentence = " ".join(first.split())
        words = sentence.split()
        if not 5 <= len(words) <= 24 or not re.match(r"[A-Z][a-z].*\.$", sentence):
            continue
        if any(name in sentence.lower() for name in PACKAGES):
            continue
        yield Line(sentence, package, kinds[type(node)])


def _checksum(sentence):
    return zlib.crc32(sentence.encode())


def tasks(
    train: int, validation: int, test: int, files: int | None = None
) -> list[text.TextTask]:
    """Returns the tasks `library`, `kind` and `order`, with balanced classes.

    A text is in the same part of all tasks. So no task is trained on a text that
    another task is tested on.

    Args:
      train, validation, test: largest number of records of each part.
      files: as for `lines`.
    """
    found = lines(files)
    rng = np.random.default_rng(0)

    def shuffled(sentence):
        words = sentence.removesuffix(".").lower().split()
        return " ".join(rng.permutation(words))

    def in_order(sentence):
        return " ".join(sentence.removesuffix(".").lower().split())

    labelled = {
        "library": [(line.text, line.package) for line in found],
        "kind": [(line.text, line.kind) for line in found],
        "order": [
            (shuffled(line.text), "shuffled")
            if i // 2 % 2
            else (in_order(line.text), "written")
            for i, line in enumerate(found)
        ],
    }
    places = {
        "train": [i for i in range(len(found)) if i % 5 and i % 10 != 1],
        "validation": range(1, len(found), 10),
        "test": range(0, len(found), 5),
    }

    def records(name, part, most):
        return _balanced([labelled[name][i] for i in places[part]], most)

    return [
        text.task(
            name,
            records(name, "train", train),
            records(name, "validation", validation),
            records(name, "test", test),
        )
        for name in labelled
    ]


def _balanced(pairs, most):
    """Returns the first records, equally many of every class."""
    by_class: dict[str, list[dict]] = {}
    for sentence, label in pairs:
        record = {"text": sentence, "label": label}
        by_class.setdefault(label, []).append(record)
    each = min(most // len(by_class), *map(len, by_class.values()))
    return [record for records in by_class.values() for record in records[:each]]
