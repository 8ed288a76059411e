"""The vocabulary of a merge: one tokenizer, and where the rows of its tokens come from.

The rules are mergekit's. A model keeps its own row of a token. One that lacks the token
gets the row that the file names; else that of the only model that has it; else the
base's; else the mean of those that have it. Models count in the order in which they are
named, and ids do not depend on anything else.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxarith import files, hub, tree
from jaxarith.commands.merge import sides
from jaxarith.commands.merge.request import MergeRequest, TokenRow
from jaxarith.hub import tokenizer_files
from jaxarith.hub.config import parts
from jaxarith.hub.tokenizer_files import Tokenizer
from jaxarith.stream import Rerowing, inputs, tying

_STAY = (
    "the files of the tokenizer are copied; rows of embeddings stay where they are, so "
    "tokens must have the same ids in all models"
)


class Planned(NamedTuple):
    """What a merge does about tokens.

    Attributes:
      folder: whose tokenizer is copied; None is as without a key.
      rerowing: where rows come from; None if they stay where they are.
      made: files that are written in place of copies: their content by name.
      left: files that are not copied, since they hold the old vocabulary.
      renumber: `renumber(config, name)` returns the content of a configuration file,
        by its name, with the ids of the new vocabulary, and notes; None if they stay.
      notes: what the user should know.
    """

    folder: Path | None = None
    rerowing: Rerowing | None = None
    made: Mapping[str, str] = {}
    left: tuple[str, ...] = ()
    renumber: Callable[[dict, str], tuple[dict, list[str]]] | None = None
    notes: tuple[str, ...] = ()


def plan(request: MergeRequest, places: Mapping[str, str]) -> Planned:
    """Finds the tokenizers of the models, and plans that of the merge.

    Args:
      request: what is asked for.
      places: where each model is, by its name: first the one whose files the merge has.

    Raises:
      FileNotFoundError: a model is not there.
      ValueError: a tokenizer that is needed cannot be read, or a row is not there.
    """
    source = request.tokenizer_source
    if source is None:
        return _with_template(Planned(), request, places)
    first = next(iter(places))
    folder = _folder(places[first]) if source == "union" else hub.find(source)
    own_rules = source == "union" or request.tokens or request.pad_to_multiple_of
    try:
        found = {name: _tokenizer(place, places) for name, place in places.items()}
        start = _required(tokenizer_files.read(folder), folder)
        if found[first] is None:
            found[first] = start
        rows = {name: _rows(place, places) for name, place in places.items()}
    except ValueError as error:
        if own_rules:
            raise
        notes = (_STAY, f"rows are not compared by their tokens: {error}")
        return _with_template(Planned(folder, notes=notes), request, places)
    notes = [
        f"{name} has no tokenizer; its tokens are taken to be those of {first}"
        for name, tokenizer in found.items()
        if tokenizer is None
    ]
    known = {name: x or _required(found[first], folder) for name, x in found.items()}
    out = start
    if source == "union":
        out, more = _united(start, known, rows)
        notes += more
    new = [row.token for row in request.tokens if row.token not in out.ids]
    out = tokenizer_files.with_tokens(out, map(tokenizer_files.plain, new))
    own = {name: _own(out, x, rows[name]) for name, x in known.items()}
    forced = [out.ids[row.token] for row in request.tokens if row.force]
    fills, more = _fills(request, out, known, own, rows)
    for table in own.values():
        table[forced] = -1
    rerowing = _rerowing(request, out, own, rows, fills, places)
    notes += more if rerowing is not None else []
    if rerowing is None:
        notes.append(
            f"all models have the same {len(out.ids)} tokens: rows of embeddings stay "
            "where they are"
        )
    else:
        notes += _counted(rerowing, own, rows[first])
    planned = Planned(folder, rerowing, notes=tuple(notes))
    if out is not start and out.content != start.content:
        planned = _with_files(planned, out, folder)
    if source not in ("union", first) and known[first].ids != out.ids:
        renumber = _renumbering(known[first], out, folder)
        planned = planned._replace(renumber=renumber)
    return _with_template(planned, request, places)


def _rerowing(request, out, own, rows, fills, places):
    """The new rows; None if all models have them where they shall be."""
    words, multiple = out.size, request.pad_to_multiple_of or 1
    count = -(-words // multiple) * multiple
    same = all((table == np.arange(words)).all() for table in own.values())
    if same and len({*rows.values()}) == 1:
        have = next(iter(rows.values()))
        if request.pad_to_multiple_of is None or have == count:
            return None
    return Rerowing(
        count=count,
        words=words,
        rows={places[name]: n for name, n in rows.items()},
        own={places[name]: table for name, table in own.items()},
        fills={
            row: [(places[name], theirs) for name, theirs in donors]
            for row, donors in fills.items()
        },
    )


def _counted(rerowing, own, before):
    yield (
        f"the vocabulary has {rerowing.words} tokens; embeddings and heads have "
        f"{rerowing.count} rows ({before} before), in the order of its ids"
    )
    for name, table in own.items():
        if lacking := int((table < 0).sum()):
            yield f"{name} has no rows of its own for {lacking} tokens"


def _own(out: Tokenizer, theirs: Tokenizer, rows: int) -> np.ndarray:
    """For each token of the new vocabulary its row in a model; -1 where it has none."""
    table = np.full(out.size, -1)
    for token, new in out.ids.items():
        old = theirs.ids.get(token, -1)
        table[new] = old if old < rows else -1
    return table


def _fills(
    request: MergeRequest,
    out: Tokenizer,
    known: Mapping[str, Tokenizer],
    own: Mapping[str, np.ndarray],
    rows: Mapping[str, int],
) -> tuple[dict[int, list[tuple[str, int]]], list[str]]:
    """The rows for models that lack a token, by the token's new row, and notes."""
    fills: dict[int, list[tuple[str, int]]] = {}
    nobody = []
    given = {row.token: row for row in request.tokens}
    lacked = np.flatnonzero(np.any([table < 0 for table in own.values()], axis=0))
    wanted = {int(row) for row in lacked} | {out.ids[token] for token in given}
    token_of = {row: token for token, row in out.ids.items() if row in wanted}
    for row in sorted(token_of):
        token, asked = token_of[row], given.get(token_of[row])
        having = [(name, int(table[row])) for name, table in own.items()]
        having = [(name, theirs) for name, theirs in having if theirs >= 0]
        of_base = [pair for pair in having if pair[0] == request.base]
        if asked is not None and asked.source != "default":
            fills[row] = _asked(asked, known, rows)
        else:
            fills[row] = of_base if of_base and len(having) > 1 else having
            nobody += [token] * (not having)
    few = ", ".join(tree.first_few([repr(x) for x in nobody], most=5))
    note = f"no model has a row for {len(nobody)} tokens, which are zero: {few}"
    return fills, [note] * bool(nobody)


def _asked(
    asked: TokenRow, known: Mapping[str, Tokenizer], rows: Mapping[str, int]
) -> list[tuple[str, int]]:
    if asked.source == "zero":
        return []
    if asked.model not in known:
        raise ValueError(
            f"{asked.place}: {asked.model} is none of the models that are merged, "
            f"which are {', '.join(known)}."
        )
    of = asked.token if asked.source == "model" else asked.of
    row = of if isinstance(of, int) else known[asked.model].ids.get(of, -1)
    if not 0 <= row < rows[asked.model]:
        raise ValueError(
            f"{asked.place}: {asked.model} has no row for the token {of!r}; it has "
            f"{rows[asked.model]} rows."
        )
    return [(asked.model, row)]


def _united(
    start: Tokenizer, known: Mapping[str, Tokenizer], rows: Mapping[str, int]
) -> tuple[Tokenizer, list[str]]:
    """The base's tokenizer with the tokens of all others, and notes."""
    words: dict[str, Any] = {}
    added: dict[str, Any] = dict(start.added)
    differing = []
    for name, theirs in known.items():
        for token, entry in theirs.added.items():
            if entry["id"] >= rows[name]:
                continue
            differing += [token] * (_found(added.get(token, entry)) != _found(entry))
            added.setdefault(token, entry)
    for name, theirs in known.items():
        for token, row in sorted(theirs.ids.items(), key=lambda pair: pair[1]):
            if row < rows[name] and token not in start.ids and token not in added:
                words.setdefault(token, tokenizer_files.plain(token))
    entries = [
        _found(entry) for entry in added.values() if entry not in start.added.values()
    ]
    new = tokenizer_files.with_tokens(start, [*words.values(), *entries])
    notes = []
    if words:
        few = ", ".join(tree.first_few([repr(x) for x in words], most=5))
        notes.append(
            f"{len(words)} tokens of other vocabularies ({few}) are added as words "
            "that the tokenizer finds in a text before all else; their merges are not "
            "united"
        )
    if differing:
        few = ", ".join(tree.first_few(list(dict.fromkeys(differing)), most=5))
        notes.append(f"added tokens with other settings in other models: {few}")
    return new, notes


def _found(entry):
    return {key: value for key, value in entry.items() if key != "id"}


def _with_files(planned: Planned, out: Tokenizer, folder: Path) -> Planned:
    made = {tokenizer_files.FILE: _json(out.content)}
    settings = _settings(folder)
    new = tokenizer_files.with_added(settings, out.added)
    if new != settings:
        made[tokenizer_files.SETTINGS] = _json(new)
    return planned._replace(made=made, left=tokenizer_files.OTHERS)


def _renumbering(
    before: Tokenizer, out: Tokenizer, folder: Path
) -> Callable[[dict, str], tuple[dict, list[str]]]:
    """How ids of the old vocabulary change in configuration files."""
    token_of = {row: token for token, row in before.ids.items()}

    def renumber(config: dict, name: str) -> tuple[dict, list[str]]:
        file = folder / name
        theirs = files.read_json(file) if file.is_file() else {}
        notes: list[str] = []
        new = _renumbered(config, theirs, token_of, out.ids, name, notes)
        return new, notes

    return renumber


def _renumbered(config, theirs, token_of, ids, name, notes):
    inner = parts(config)
    new = {}
    for key, value in config.items():
        if key in inner:
            part = theirs.get(key)
            own = part if isinstance(part, Mapping) else {}
            value = _renumbered(inner[key], own, token_of, ids, name, notes)
        elif sides.is_id(key) and value is not None:
            several = value if isinstance(value, list) else [value]
            mapped = [ids.get(token_of.get(row, "")) for row in several]
            if key in theirs:
                now = theirs[key]
            elif None in mapped:
                now = None
            else:
                now = mapped if isinstance(value, list) else mapped[0]
            if now != value:
                notes.append(f"{name}: {key} is now {now}, in place of {value}")
            value = now
        new[key] = value
    return new


def _with_template(
    planned: Planned, request: MergeRequest, places: Mapping[str, str]
) -> Planned:
    """The same with the chat template that is asked for."""
    template = request.chat_template
    if template is None:
        return planned
    notes = [*planned.notes]
    if template == "auto":
        template, note = _most_frequent(places)
        notes.append(note)
        if template is None:
            return planned._replace(notes=tuple(notes))
    folder = planned.folder or _folder(next(iter(places.values())))
    made = {**planned.made, tokenizer_files.TEMPLATE: template}
    text = made.get(tokenizer_files.SETTINGS)
    settings = _settings(folder) if text is None else json.loads(text)
    if settings.pop("chat_template", None) is not None:
        made[tokenizer_files.SETTINGS] = _json(settings)
    left = (*planned.left, "chat_template.json")
    return planned._replace(made=made, left=left, notes=tuple(notes))


def _most_frequent(places: Mapping[str, str]) -> tuple[str | None, str]:
    """The chat template of most models, the first one of several, and a note."""
    owners: dict[str, list[str]] = {}
    for name, place in places.items():
        folders = [x for x in _folders(place) if tokenizer_files.template(x)]
        if folders:
            template = tokenizer_files.template(folders[0]) or ""
            owners.setdefault(template.strip(), []).append(name)
    if not owners:
        return None, "no model has a chat template"
    best = max(owners, key=lambda template: len(owners[template]))
    return best, f"the chat template is that of {', '.join(owners[best])}"


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / tokenizer_files.SETTINGS
    return hub.read_json(folder, tokenizer_files.SETTINGS) if file.is_file() else {}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _folders(place: str) -> list[Path]:
    """The folders of a model: of its adapter, then its own."""
    found = inputs.find(place)
    return [x for x in (found.adapter, found.folder) if x is not None]


def _folder(place: str) -> Path:
    """The folder that has a model's tokenizer."""
    folders = _folders(place)
    having = [x for x in folders if (x / tokenizer_files.FILE).is_file()]
    return [*having, *folders][0]


def _under(place: str, places: Mapping[str, str]) -> list[Path]:
    """The folders of a model; of one that is no whole model, the base's as well."""
    found = inputs.find(place)
    rest = [] if found.folder else [_folder(next(iter(places.values())))]
    return [*_folders(place), *rest]


def _tokenizer(place: str, places: Mapping[str, str]) -> Tokenizer | None:
    for folder in _under(place, places):
        if (found := tokenizer_files.read(folder)) is not None:
            return found
        names = [x for x in tokenizer_files.OTHERS if (folder / x).is_file()]
        if names:
            _required(None, folder)
    return None


def _required(found: Tokenizer | None, folder: Path) -> Tokenizer:
    if found is None:
        raise ValueError(
            f"{folder} has no {tokenizer_files.FILE}. Load its tokenizer with "
            "transformers and save it again, which writes one."
        )
    return found


def _rows(place: str, places: Mapping[str, str]) -> int:
    folder = (
        inputs.find(place).folder or inputs.find(next(iter(places.values()))).folder
    )
    if folder is None:
        raise ValueError(f"{place} is no whole model; name a base model.")
    rows = tying.rows(inputs.open_checkpoint(folder).tensors)
    if not isinstance(rows, int):
        raise ValueError(f"{folder} has no embedding whose rows could follow tokens.")
    return rows
