"""Replaces names of models by folders: results of other documents, or headers.

A request with these folders as models runs like any other. Messages about it, and the
files beside its weights, contain the names again.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from jaxarith.commands.merge.request import MergeRequest
from jaxarith.stream.inputs import adapted


@dataclasses.dataclass(frozen=True)
class Located:
    """The folders of models, by their names in a file."""

    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def folder(self, name: str) -> str:
        """Returns the folder of a model (both of `model+adapter`), or else its name."""
        if name in self.folders or not self.folders:
            return self.folders.get(name, name)
        return "+".join(self.folders.get(part, part) for part in adapted(name))

    def named(self, text: str) -> str:
        """Returns a text with the names of models in place of their folders."""
        name_of = {folder: name for name, folder in self.folders.items()}
        if not name_of:
            return text
        found = "|".join(map(re.escape, sorted(name_of, key=len, reverse=True)))
        # A folder may be the beginning of another one's name.
        whole = rf"(?:{found})(?![\w-]|\.\w)"
        return re.sub(whole, lambda match: name_of[match[0]], text)

    def request(self, request: MergeRequest) -> MergeRequest:
        """Returns a request with the names of models in place of their folders."""
        return located(request, self.named)

    def also(self, name: str, folder: str) -> "Located":
        """Returns the same folders and one more."""
        return Located({**self.folders, name: folder})


def located(request: MergeRequest, folder_of: Callable[[str], str]) -> MergeRequest:
    """Returns a request with `folder_of(name)` in place of each model's name."""

    def model(one):
        return one._replace(name=folder_of(one.name))

    def slice_(one):
        sources = tuple(x._replace(model=model(x.model)) for x in one.sources)
        return one._replace(sources=sources, base=maybe(one.base))

    def maybe(name):
        return None if name is None else folder_of(name)

    source = request.tokenizer_source
    return dataclasses.replace(
        request,
        models=tuple(map(model, request.models)),
        base=maybe(request.base),
        slices=tuple(map(slice_, request.slices)),
        tokens=tuple(
            row._replace(model=folder_of(row.model)) if row.model else row
            for row in request.tokens
        ),
        tokenizer_source=source if source == "union" else maybe(source),
    )
