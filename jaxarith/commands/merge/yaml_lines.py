"""Reads YAML with the line of every value, so that errors can name the line."""

import collections
import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import yaml

from jaxarith import files

_Word = TypeVar("_Word", bound=str)


@dataclasses.dataclass(frozen=True)
class Node:
    """A value of a YAML file.

    Attributes:
      file: the name of the file.
      line: the line where the value begins, from 1.
      value: a scalar, a list of nodes, or a dict of nodes.
    """

    file: str
    line: int
    value: Any

    @property
    def place(self) -> str:
        """The file and the line, as errors name them."""
        return f"{self.file}, line {self.line}"

    def error(self, text: str) -> ValueError:
        """Returns an error about this value, to be raised."""
        return ValueError(f"{self.place}: {text}")

    def fields(self, known: Collection[str], name: str) -> dict[str, "Node"]:
        """Returns the entries of a mapping with known keys.

        Raises:
          ValueError: the value is not a mapping, or has an unknown key.
        """
        entries = self.mapping(name)
        for key, node in entries.items():
            if key not in known:
                raise node.error(
                    f"the key {key!r} of {name} is not supported; supported are "
                    f"{', '.join(known) or 'none'}."
                )
        return entries

    def mapping(self, name: str) -> dict[str, "Node"]:
        """Returns the entries of a mapping; none for an empty value."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.error(f"{name} must be a mapping; found {self.shown()}.")
        return self.value

    def items(self, name: str) -> list["Node"]:
        """Returns the items of a list that is not empty."""
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"{name} must be a list; found {self.shown()}.")
        return self.value

    def text(self, name: str) -> str:
        """Returns a string that is not empty."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"{name} must be a text; found {self.shown()}.")
        return self.value

    def word(self, known: Sequence[_Word], name: str) -> _Word:
        """Returns one of the known words."""
        text = self.text(name)
        for word in known:
            if word == text:
                return word
        raise self.error(f"{name} is {text!r}; it must be one of {', '.join(known)}.")

    def shown(self) -> str:
        """Returns the value as errors show it."""
        kinds = {dict: "a mapping", list: "a list" if self.value else "an empty list"}
        shown = kinds.get(type(self.value)) or repr(self.value)
        return "nothing" if self.value is None else shown


def read(path: str | os.PathLike) -> Node:
    """Reads a YAML file of scalars, lists and mappings, in one document.

    Raises:
      OSError: the file does not exist.
      ValueError: the file is not YAML, is empty, has a key twice, contains itself, or
        has several documents.
    """
    first, *more = read_all(path)
    if more:
        raise more[0].error("this is a second document; expected only one.")
    return first


def read_all(path: str | os.PathLike) -> list[Node]:
    """Reads all documents of a YAML file, which begin with `---`, except empty ones.

    Raises:
      OSError: the file does not exist.
      ValueError: the file is not YAML, has only empty documents, or a document has a
        key twice or contains itself.
    """
    file = str(path)
    try:
        loader = yaml.SafeLoader(_content(path))
        found = []
        while loader.check_node():
            node = _node(loader, loader.get_node(), file, {})
            if node.value is not None:
                found.append(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = file if mark is None else f"{file}, line {mark.line + 1}"
        raise ValueError(f"{place}: this is not YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply, or contains itself.") from None
    if not found:
        raise ValueError(f"{file} is empty; expected the YAML of a merge.")
    return found


def _content(path):
    try:
        return files.read(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {path}; expected the YAML of a merge, which names "
            "merge_method and models."
        ) from None
    except IsADirectoryError:
        raise IsADirectoryError(
            f"{path} is a folder; expected the YAML file of a merge. To merge by "
            "flags, name each folder with --model."
        ) from None


def _node(loader, found, file, done):
    # Nodes are compared by identity: an alias is its node, and is read once.
    line = found.start_mark.line + 1
    if id(found) in done:
        if (node := done[id(found)]) is None:
            raise ValueError(f"{file}, line {line}: the anchor contains itself.")
        return node
    done[id(found)] = None
    if isinstance(found, yaml.MappingNode):
        value = _mapping(loader, found, file, done)
    elif isinstance(found, yaml.SequenceNode):
        value = [_node(loader, item, file, done) for item in found.value]
    else:
        try:
            value = loader.construct_object(found)
        except ValueError as error:  # for example the date 2024-13-01
            raise ValueError(f"{file}, line {line}: {error}.") from error
    done[id(found)] = Node(file, line, value)
    return done[id(found)]


def _mapping(loader, found, file, done):
    counts = collections.Counter(
        key.value for key, _ in found.value if isinstance(key, yaml.ScalarNode)
    )
    for key, _ in found.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{file}, line {line}: a key must be a word.")
        if counts[key.value] > 1:
            raise ValueError(
                f"{file}, line {line}: the key {key.value!r} is given twice."
            )
    loader.flatten_mapping(found)  # `<<: *anchor`; what is beside it comes last
    entries = {}
    for key, value in found.value:
        node = _node(loader, value, file, done)
        # Errors about an entry name its own line, even if the value is an alias.
        entries[key.value] = Node(file, key.start_mark.line + 1, node.value)
    return entries
