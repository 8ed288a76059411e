"""Reads vocabularies from the files that the tokenizers library writes."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxarith import files

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Files that repeat the vocabulary for tokenizers written in Python.
OTHERS = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
)
# Default settings for finding an added token in a text.
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


class Tokenizer(NamedTuple):
    """A tokenizer's vocabulary.

    Attributes:
      ids: the id of every token, both of the model's and of added ones.
      added: for each added token, the settings for finding it in a text.
      content: the content of `tokenizer.json`.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    content: dict[str, Any]

    @property
    def size(self) -> int:
        """Returns the number of rows that an embedding needs for all tokens."""
        return max(self.ids.values(), default=-1) + 1


def read(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder; returns None if it has no `tokenizer.json`.

    Raises:
      ValueError: the file is not a tokenizer's JSON, or `tokenizer_config.json` adds
        something other than tokens.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = files.read_json(file)
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, Mapping):  # Unigram has pieces with scores
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        entries = {x["content"]: dict(x) for x in content.get("added_tokens") or ()}
        ids = {**vocabulary, **{token: x["id"] for token, x in entries.items()}}
        _check_ids(ids)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a file of the tokenizers library ({error!r}). Load the "
            "tokenizer with transformers and save it again."
        ) from error
    settings = folder / SETTINGS
    taken = set(ids.values())
    try:
        more = files.read_json(settings) if settings.is_file() else {}
        known = more.get("added_tokens_decoder") if isinstance(more, Mapping) else None
        for key, entry in (known or {}).items():
            if entry["content"] not in ids and int(key) not in taken:
                ids[entry["content"]] = int(key)
                entries[entry["content"]] = {"id": int(key), **entry}
        _check_ids(ids)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{settings} is not a file of transformers ({error!r}). Load the tokenizer "
            "with transformers and save it again."
        ) from error
    return Tokenizer(ids, entries, content)


def _check_ids(ids: Mapping[Any, Any]) -> None:
    """Raises a ValueError unless all tokens are texts and all ids whole numbers."""
    for token, row in ids.items():
        if not isinstance(token, str) or type(row) is not int or row < 0:
            raise ValueError(
                f"the token {token!r} has the id {row!r}; expected a text with a whole "
                "number"
            )


def plain(token: str) -> dict[str, Any]:
    """Returns the default entry for an added token with this text."""
    return {"content": token, **_PLAIN}


def with_tokens(
    tokenizer: Tokenizer, entries: Iterable[Mapping[str, Any]]
) -> Tokenizer:
    """Returns the tokenizer with more added tokens; new ones get the next ids in order.

    Args:
      tokenizer: the tokenizer.
      entries: entries as in `added_tokens` of its file, without ids. An entry for a
        token of the vocabulary replaces the settings for finding it.

    Raises:
      ValueError: the ids have gaps. The tokenizers library would put new tokens into
        them.
    """
    ids, added = dict(tokenizer.ids), dict(tokenizer.added)
    has_gaps = len(ids) != tokenizer.size
    for entry in entries:
        token = entry["content"]
        if token not in ids and has_gaps:
            raise ValueError(
                "the ids of the base's tokenizer have gaps, so no tokens can be added. "
                "Choose another model as the base, or as the source."
            )
        ids.setdefault(token, len(ids))
        added[token] = {**entry, "id": ids[token]}
    content = copy.copy(tokenizer.content)
    content["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    return Tokenizer(ids, added, content)


def with_added(
    settings: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json` with these added tokens."""
    if "added_tokens_decoder" not in settings:
        return dict(settings)
    decoder = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
        for entry in sorted(added.values(), key=lambda entry: entry["id"])
    }
    return {**settings, "added_tokens_decoder": decoder}


def template(folder: Path) -> str | None:
    """Returns the chat template of a folder; None if it has none."""
    if (file := folder / TEMPLATE).is_file():
        return files.read(file).decode("utf-8")
    for name in ("chat_template.json", SETTINGS):
        if not (file := folder / name).is_file():
            continue
        content = files.read_json(file)
        found = content.get("chat_template") if isinstance(content, Mapping) else None
        if isinstance(found, list):  # several templates with names
            named = {x.get("name"): x.get("template") for x in found}
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None
