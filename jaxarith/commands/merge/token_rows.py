"""Finds the sources of tokens' rows, and the union of vocabularies.

The rules are mergekit's. A model keeps its own row of a token. A model that lacks the
token gets the row that the file names; else that of the only model that has it; else
the base's; else the mean of those that have it. Ids depend only on the order in which
the models are named.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxarith import tree
from jaxarith.commands.merge.request import MergeRequest, TokenRow
from jaxarith.hub import tokenizer_files
from jaxarith.hub.tokenizer_files import Tokenizer
from jaxarith.stream import Rerowing


def rerowing(
    request: MergeRequest,
    out: Tokenizer,
    known: Mapping[str, Tokenizer],
    rows: Mapping[str, int],
    places: Mapping[str, str],
) -> tuple[Rerowing | None, list[str]]:
    """Finds the sources of all rows of tokens.

    Args:
      request: the merge that is asked for.
      out: the new tokenizer.
      known: the tokenizer of each model.
      rows: the number of rows of each model's embedding.
      places: the place of each model, by its name.

    Returns:
      The sources, or None if all models already have all rows in place; and notes.

    Raises:
      ValueError: a row that the request names does not exist.
    """
    own = {name: _own(out, theirs, rows[name]) for name, theirs in known.items()}
    fills, notes = _fills(request, out, known, own, rows)
    forced = [out.ids[row.token] for row in request.tokens if row.force]
    for table in own.values():
        table[forced] = -1
    multiple = request.pad_to_multiple_of or 1
    count = -(-out.size // multiple) * multiple
    ids = np.array(sorted(out.ids.values()))
    if all((table[ids] == ids).all() for table in own.values()):
        [have, *others] = {*rows.values()}
        if not others and (request.pad_to_multiple_of is None or have == count):
            note = (
                f"all models have the same {tree.counted(len(ids), 'token')}: rows of "
                "embeddings stay where they are"
            )
            return None, [note]
    before = next(iter(rows.values()))
    notes.append(
        f"the vocabulary has {tree.counted(len(ids), 'token')}; embeddings and heads "
        f"have {tree.counted(count, 'row')} ({before} before), in the order of its ids"
    )
    for name, table in own.items():
        if lacking := int((table[ids] < 0).sum()):
            tokens = tree.counted(lacking, "token")
            notes.append(f"{name} has no rows of its own for {tokens}")
        theirs = known[name].ids
        if lost := [token for token in theirs if token not in out.ids]:
            few = ", ".join(tree.first_few([repr(x) for x in lost], most=5))
            notes.append(
                f"{name} has {tree.counted(len(lost), 'token')} that the new "
                f"vocabulary lacks; their rows are left out: {few}"
            )
    new = Rerowing(
        count=count,
        words=out.size,
        rows={places[name]: n for name, n in rows.items()},
        own={places[name]: table for name, table in own.items()},
        fills={
            row: [(places[name], theirs) for name, theirs in donors]
            for row, donors in fills.items()
        },
    )
    return new, notes


def _own(out: Tokenizer, theirs: Tokenizer, rows: int) -> np.ndarray:
    """Returns a model's row for each token of the new vocabulary; -1 without a row."""
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
    """Returns the rows for models that lack a token, by its new row, and notes."""
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
    zero = tree.counted(len(nobody), "token, which is", "tokens, which are")
    note = f"no model has a row for {zero} zero: {few}"
    return fills, [note] * bool(nobody)


def _asked(
    asked: TokenRow, known: Mapping[str, Tokenizer], rows: Mapping[str, int]
) -> list[tuple[str, int]]:
    if asked.source == "zero":
        return []
    if asked.model not in known:
        raise ValueError(
            f"{asked.place}: {asked.model} is not one of the merged models, which are "
            f"{', '.join(known)}."
        )
    of = asked.token if asked.source == "model" else asked.of
    row = of if isinstance(of, int) else known[asked.model].ids.get(of, -1)
    if not 0 <= row < rows[asked.model]:
        raise ValueError(
            f"{asked.place}: {asked.model} has no row for the token {of!r}; it has "
            f"{tree.counted(rows[asked.model], 'row')}."
        )
    return [(asked.model, row)]


def united(
    start: Tokenizer, known: Mapping[str, Tokenizer], rows: Mapping[str, int]
) -> tuple[Tokenizer, list[str]]:
    """Returns the base's tokenizer with the tokens of all others, and notes.

    The words of other models are appended model by model, then their added tokens. If
    models define an added token differently, the first definition is used.

    Args:
      start: the base's tokenizer.
      known: the tokenizer of each model.
      rows: the number of rows of each model's embedding; tokens beyond are left out.
    """
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
    entries = [_found(x) for token, x in added.items() if token not in start.added]
    new = tokenizer_files.with_tokens(start, [*words.values(), *entries])
    notes = []
    if words:
        few = ", ".join(tree.first_few([repr(x) for x in words], most=5))
        of = f"of other vocabularies ({few})"
        are = tree.counted(
            len(words),
            f"token {of} is added as a word",
            f"tokens {of} are added as words",
        )
        notes.append(
            f"{are} that the tokenizer finds in a text before all else; their merges "
            "are not united"
        )
    if differing:
        few = ", ".join(tree.first_few(list(dict.fromkeys(differing)), most=5))
        notes.append(f"added tokens with other settings in other models: {few}")
    return new, notes


def _found(entry):
    return {key: value for key, value in entry.items() if key != "id"}
