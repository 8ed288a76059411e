"""Models that are elsewhere than their names say: results of other documents, headers.

A request whose models are the folders runs as any other. What is told of it, and
written beside its weights, has the names again.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from jaxarith.commands.merge.request import MergeRequest
from jaxarith.stream.inputs import adapted


@dataclasses.dataclass(frozen=True)
class Located:
    """The folders of models, by the names that a file has for them."""

    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def folder(self, name: str) -> str:
        """The folder of a model, of both parts of `model+adapter`; else its name."""
        if name in self.folders or not self.folders:
            return self.folders.get(name, name)
        return "+".join(self.folders.get(part, part) for part in adapted(name))

    def named(self, text: str) -> str:
        """A text with the names of models in place of their folders."""
        name_of = {folder: name for name, folder in self.folders.items()}
        if not name_of:
            return text
        found = "|".join(map(re.escape, sorted(name_of, key=len, reverse=True)))
        # A folder may be the beginning of another one's name.
        whole = rf"(?:{found})(?![\w-]|\.\w)"
        return re.sub(whole, lambda match: name_of[match[0]], text)

    def request(self, request: MergeRequest) -> MergeRequest:
        """A request with the names of models in place of their folders."""
        return located(request, self.named)

    def also(self, name: str, folder: str) -> "Located":
        """The same with one more."""
        return Located({**self.folders, name: folder})


def located(request: MergeRequest, folder_of: Callable[[str], str]) -> MergeRequest:
    """A request with a function of the names of models in place of the names."""

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
