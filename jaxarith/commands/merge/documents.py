"""Reads files with several documents: merges that refer to each other by name."""

import dataclasses
import graphlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxarith.commands.merge import mergekit_yaml, yaml_lines
from jaxarith.commands.merge.yaml_lines import Node
from jaxarith.stream import inputs

_NAME = re.compile(r"\w[\w.-]*")  # also a valid name of a folder
_RESERVED = ("base", "union", "auto")  # words for tokenizers and templates
# Keys under which a file names models.
_MODEL_KEYS = ("model", "base_model")
_TOKENIZER_KEYS = ("tokenizer_source", "source")


@dataclasses.dataclass(frozen=True)
class Document:
    """A merge that other documents may refer to.

    Attributes:
      root: the content of the document.
      name: name of the document; None if no other refers to it.
      models: the names of models in it, each with the place where it appears first.
      tokenizers: the same for sources of tokenizers.
      uses: the documents whose results it merges, in the order of the file.
    """

    root: Node
    name: str | None
    models: dict[str, Node]
    tokenizers: dict[str, Node]
    uses: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name of the document in messages."""
        return f"{self.name or 'the result'} ({self.root.place})"


def read(path: str | os.PathLike) -> list[Document]:
    """Reads the documents of a file, each after all documents that it refers to.

    The last one is the document that no other refers to.

    Args:
      path: a YAML file.

    Raises:
      OSError: the file does not exist.
      ValueError: the file is not YAML; a name is invalid or is given twice; documents
        refer to each other in a circle, or to none; or no other document refers to
        several of them.
    """
    roots = yaml_lines.read_all(path)
    names = [_name(root) for root in roots]
    _check_names(roots, names)
    order = {name: i for i, name in enumerate(names) if name is not None}
    found = []
    for root, name in zip(roots, names, strict=True):
        models, tokenizers = _named(root, _MODEL_KEYS), _named(root, _TOKENIZER_KEYS)
        parts = {part for model in {**models, **tokenizers} for part in adapted(model)}
        uses = tuple(sorted(parts & order.keys(), key=order.__getitem__))
        found.append(Document(root, name, models, tokenizers, uses))
    return _in_order(found)


def _name(root: Node) -> str | None:
    if (node := mergekit_yaml.fields(root).get("name")) is None:
        return None
    name = node.text("name")
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise node.error(
            f"name is {name!r}; it must be the name of a folder, of letters, digits, "
            f"'_', '-' and '.', and not {', '.join(_RESERVED)}."
        )
    return name


def _check_names(roots: Sequence[Node], names: Sequence[str | None]) -> None:
    seen: dict[str | None, Node] = {}
    for root, name in zip(roots, names, strict=True):
        node = root if name is None else root.value["name"]
        if name in seen:
            first = seen[name].line
            if name is None:
                raise node.error(
                    f"this document and that of line {first} have no names. One "
                    "document goes to the new folder; the others need names."
                )
            raise node.error(
                f"the name {name!r} is given twice, first in line {first}. Change one."
            )
        seen[name] = node


def _named(root: Node, keys: Sequence[str]) -> dict[str, Node]:
    """Returns the names under some keys, with the first place of each."""
    found: dict[str, Node] = {}
    seen = set()
    waiting = [root]
    while waiting:
        value = waiting.pop().value
        # Each alias is followed once: aliases of aliases could go on forever.
        if not isinstance(value, dict | list) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list):
            waiting += value
            continue
        for key, node in value.items():
            if key in keys and isinstance(node.value, str):
                first = found.setdefault(node.value, node)
                found[node.value] = min(first, node, key=lambda x: x.line)
        waiting += value.values()
    return found


def adapted(model: str) -> list[str]:
    """Returns the parts of `model+adapter`, or the whole name if it is invalid."""
    try:
        return inputs.adapted(model)
    except ValueError:  # opening the model raises a better error
        return [model]


def _in_order(found: Sequence[Document]) -> list[Document]:
    by_name = {one.name: one for one in found}
    graph = {one.name: [by_name[name].name for name in one.uses] for one in found}
    try:
        names = [*graphlib.TopologicalSorter(graph).static_order()]
    except graphlib.CycleError as error:
        circle = error.args[1]
        nodes = [by_name[name].root for name in circle]
        first = min(nodes, key=lambda node: node.line)
        raise first.error(
            f"documents refer to each other in a circle: {' <- '.join(circle)}. Remove "
            "one of the references."
        ) from None
    used = {name for one in found for name in one.uses}
    last = [one for one in found if one.name not in used]
    if len(last) > 1:
        lines = ", ".join(str(one.root.line) for one in last)
        raise last[-1].root.error(
            f"no document refers to those of the lines {lines}, but only one of them "
            "can go to the new folder. Refer to the others, or put them in other files."
        )
    return [by_name[name] for name in names]


def check_models(found: Sequence[Document]) -> None:
    """Finds all models that are not documents, before anything is merged in vain.

    Raises:
      FileNotFoundError: a model does not exist; the message has the line.
      ValueError: a name is not that of a model.
    """
    names = [one.name for one in found if one.name is not None]
    for one in found:
        for model, node in one.models.items():
            parts = adapted(model)
            rest = [part for part in parts if part not in names]
            try:
                for part in [model] if rest == parts else rest:
                    inputs.find(part)
            except FileNotFoundError as error:
                said = " ".join(str(error).split())
                raise FileNotFoundError(
                    f"{node.place}: {said} The documents are {', '.join(names)}."
                ) from error
            except ValueError as error:
                raise node.error(str(error)) from error


def shadowed(found: Sequence[Document]) -> list[str]:
    """Returns notes on local folders with the name of a document, which is used."""
    return [
        f"{name} is the document of that name, not the folder {Path(name).resolve()}"
        for name in dict.fromkeys(name for one in found for name in one.uses)
        if Path(name).is_dir()
    ]
