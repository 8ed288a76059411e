"""Chooses which files are copied beside the weights of a merge, and which are not."""

import contextlib
import filecmp
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxarith import files, hub, tree
from jaxarith.hub import folders, lora
from jaxarith.hub.config import parts

_TOKENIZER = re.compile(
    r"tokenizer|tekken|special_tokens|added_tokens|vocab|merges|chat_template|spiece|bpe|"
    r"additional_chat_templates/|.*\.(model|spm|tiktoken|codes|tokenizer|vocab)$"
)
_TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
_FIRST_BYTES = 2**16
_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def choose(
    inputs: Sequence[Path], tokenizer: Path | None, made: Collection[str] = ()
) -> tuple[dict[str, Path], list[str]]:
    """Returns the files to copy, by their names in the new folder, and notes.

    They are the base's files. The tokenizer is that of `tokenizer`, with its code. If
    it is None, an adapter's files of a tokenizer replace those of the base.

    Args:
      inputs: the folders of the base, the models and the adapters.
      tokenizer: the folder whose tokenizer is copied; None chooses as above.
      made: names of files that are written by the merge and need no note.

    Raises:
      ValueError: `tokenizer` has no tokenizer, or other code of the same name.
    """
    base, *others = dict.fromkeys(inputs)
    found, notes = _named(base), []
    if tokenizer is not None and not tokenizer.samefile(base):
        found = _with_source(found, tokenizer)
    elif tokenizer is None:
        adapters = [folder for folder in others if lora.is_adapter(folder)]
        found, notes = _with_adapters(found, adapters)
    kept = set(found.values())
    for folder in others:
        theirs = _named(folder)
        if lora.is_adapter(folder):
            theirs = {n: f for n, f in theirs.items() if _TOKENIZER.match(n)}
        theirs = {name: file for name, file in theirs.items() if name not in made}
        notes += _differences(found, theirs, kept, folder)
    if left := folders.left_behind(base):
        notes.append(f"not copied: {', '.join(tree.first_few(left, most=12))}")
    return found, notes


def _named(folder: Path) -> dict[str, Path]:
    return {str(f.relative_to(folder)): f for f in hub.side_files(folder)}


def _tokenizer(found: Mapping[str, Path]) -> dict[str, Path]:
    return {name: f for name, f in found.items() if _TOKENIZER.match(name)}


def _with_source(found: Mapping[str, Path], source: Path) -> dict[str, Path]:
    theirs = _named(source)
    new = _tokenizer(theirs)
    if not new:
        raise ValueError(
            f"tokenizer_source: {source} has no files of a tokenizer. Name a model "
            "that has them."
        )
    for name in _code(source):
        if name in theirs:
            new[name] = theirs[name]
            if name in found and not _equal(found[name], theirs[name]):
                raise ValueError(
                    f"tokenizer_source: {theirs[name]} differs from {found[name]}, but "
                    "the new folder needs both. Rename one, also in the configuration "
                    "that names it."
                )
    rest = {name: file for name, file in found.items() if not _TOKENIZER.match(name)}
    return rest | new


def _code(folder: Path) -> Iterator[str]:
    """Yields the code files that a tokenizer's configuration names, with imports."""
    if not (folder / _SETTINGS).is_file():
        return
    named = hub.read_json(folder, _SETTINGS).get("auto_map")
    text = str(named.get("AutoTokenizer")) if isinstance(named, Mapping) else ""
    waiting = re.findall(r"'(\w+)\.\w+'", text) or re.findall(r"^(\w+)\.\w+$", text)
    seen = set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        if (file := folder / f"{name}.py").is_file():
            waiting += _IMPORT.findall(files.read(file).decode("utf-8", "replace"))
            yield file.name


def _with_adapters(
    found: Mapping[str, Path], adapters: Sequence[Path]
) -> tuple[dict[str, Path], list[str]]:
    named = {folder: _tokenizer(_named(folder)) for folder in adapters}
    having = {folder: theirs for folder, theirs in named.items() if theirs}
    if not having:
        return dict(found), []
    [(first, new), *more] = having.items()
    if any(not _same(new, other) for _, other in more):
        note = (
            "the adapters have different tokenizers or chat templates, so the base's "
            "are copied; choose others with tokenizer_source"
        )
        return dict(found), [note]
    result = {**found, **new}
    if _TEMPLATE not in new and _states_template(first):
        result.pop(_TEMPLATE, None)  # it would override that of tokenizer_config.json
    names = ", ".join(tree.first_few(sorted(new), most=6))
    return result, [f"the tokenizer's files {names} come from the adapter {first}"]


def _states_template(folder):
    settings = folder / _SETTINGS
    return settings.is_file() and "chat_template" in hub.read_json(folder, _SETTINGS)


def _same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        _equal(file, theirs[name]) for name, file in ours.items()
    )


def _equal(a, b):
    return filecmp.cmp(a, b, shallow=False)


def _differences(
    found: Mapping[str, Path], theirs: Mapping[str, Path], kept: set[Path], folder: Path
) -> Iterator[str]:
    """Notes on the files of a model that are not in the new folder."""
    lost = {name: file for name, file in theirs.items() if file not in kept}
    other = sorted(n for n, f in lost.items() if n in found and not _equal(f, found[n]))
    alone = sorted(lost.keys() - found.keys())
    for names, what in ((other, "differ and stay behind"), (alone, "are not copied")):
        if names:
            few = ", ".join(tree.first_few(names, most=6))
            hint = " (tokenizer_source takes a tokenizer)"
            is_tokenizer = any(map(_TOKENIZER.match, names))
            yield f"of {folder} {few} {what}{hint * is_tokenizer}"


def beyond(
    config: Mapping[str, Any], found: Mapping[str, Path], rows: float
) -> list[str]:
    """Returns special and added tokens with ids beyond the rows, and where they are.

    Args:
      config: the content of `config.json`.
      found: files by their names; those of the tokenizer are searched.
      rows: the number of rows.
    """
    named = [("config.json", key, value) for key, value in _ids(config)]
    if (file := found.get("generation_config.json")) is not None:
        ids = _ids(_object(file))
        named += [("generation_config.json", key, value) for key, value in ids]
    if (file := found.get("added_tokens.json")) is not None:
        named += [(file.name, key, value) for key, value in _object(file).items()]
    if (file := found.get(_SETTINGS)) is not None:
        tokens = _object(file).get("added_tokens_decoder")
        for key, token in tokens.items() if isinstance(tokens, Mapping) else ():
            content = token.get("content") if isinstance(token, Mapping) else token
            named += [(file.name, content, int(key) if key.isdigit() else None)]
    if (file := found.get("tokenizer.json")) is not None:
        named += [(file.name, t.get("content"), t.get("id")) for t in _added(file)]
    return [
        f"{key} is {value} in {file}"
        for file, key, value in named
        if isinstance(value, int) and value >= rows
    ]


def _added(file: Path) -> list[Mapping[str, Any]]:
    """Returns the added tokens of a `tokenizer.json`, without parsing all of it.

    They are a few entries at the top, above vocabularies of 100,000 entries. A token
    with the key's name in a vocabulary has a number as its value, and no list.
    """
    content = b""
    with files.opened(file) as source:
        while more := source.read(max(len(content), _FIRST_BYTES)):
            content += more
            if (found := _ADDED_TOKENS.search(content)) is None:
                continue
            text = content[found.end() :].decode("utf-8", "replace")
            with contextlib.suppress(ValueError, RecursionError):  # it may be cut
                tokens, _ = json.JSONDecoder().raw_decode(text)
                return [token for token in tokens if isinstance(token, Mapping)]
            if len(content) > files.JSON_BYTES:
                break
    return []  # loading the tokenizer will raise a better error


def _object(file):
    try:
        content = files.read_json(file)
    except ValueError:  # loading the tokenizer will raise a better error
        return {}
    return content if isinstance(content, dict) else {}


def _ids(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    inner = parts(config)
    for key, value in config.items():
        if key in inner:
            yield from ((f"{key}.{k}", x) for k, x in _ids(inner[key]))
        elif is_id(key):
            yield from (
                (key, x) for x in (value if isinstance(value, list) else [value])
            )


def is_id(key: str) -> bool:
    """Whether a key of a configuration holds ids of tokens."""
    return key.endswith(("token_id", "token_ids", "token_index"))
