"""Plans the vocabulary of a merge: the tokenizer, and the rows for its tokens."""

from collections.abc import Mapping
from pathlib import Path

from jaxarith import hub
from jaxarith.commands.merge import token_rows
from jaxarith.commands.merge.new_tokenizer import (
    Planned,
    folder_of,
    folders_of,
    renumbering,
    with_files,
    with_template,
)
from jaxarith.commands.merge.request import MergeRequest
from jaxarith.hub import tokenizer_files
from jaxarith.hub.tokenizer_files import Tokenizer
from jaxarith.stream import inputs, tying

_STAY = (
    "the files of the tokenizer are copied; rows of embeddings stay where they are, so "
    "tokens must have the same ids in all models"
)


def plan(request: MergeRequest, places: Mapping[str, str]) -> Planned:
    """Finds the tokenizers of the models, and plans the tokenizer of the merge.

    Args:
      request: the merge that is asked for.
      places: the place of each model by its name; the first is the model whose files
        the merge gets.

    Raises:
      FileNotFoundError: a model does not exist.
      ValueError: a needed tokenizer cannot be read, or a row does not exist.
    """
    source = request.tokenizer_source
    if source is None:
        return with_template(Planned(), request, places)
    first = next(iter(places))
    folder = folder_of(places[first]) if source == "union" else hub.find(source)
    own_rules = source == "union" or request.tokens or request.pad_to_multiple_of
    try:
        found = {name: _tokenizer(place, places) for name, place in places.items()}
        start = _required(tokenizer_files.read(folder), folder)
        rows = {name: _rows(place, places) for name, place in places.items()}
    except ValueError as error:
        if own_rules:
            raise
        notes = (_STAY, f"rows are not compared by their tokens: {error}")
        return with_template(Planned(folder, notes=notes), request, places)
    theirs, owner = (found[first] or start), (first if found[first] else folder)
    notes = [
        f"{name} has no tokenizer; its tokens are assumed to be those of {owner}"
        for name, tokenizer in found.items()
        if tokenizer is None
    ]
    known = {name: tokenizer or theirs for name, tokenizer in found.items()}
    out = start
    if source == "union":
        out, more = token_rows.united(start, known, rows)
        notes += more
    new = [row.token for row in request.tokens if row.token not in out.ids]
    out = tokenizer_files.with_tokens(out, map(tokenizer_files.plain, new))
    rerowing, more = token_rows.rerowing(request, out, known, rows, places)
    notes += more
    planned = Planned(folder, rerowing, notes=tuple(notes))
    if out is not start and out.content != start.content:
        planned = with_files(planned, out, folder)
    if source not in ("union", first) and known[first].ids != out.ids:
        renumber = renumbering(known[first], out, folder)
        planned = planned._replace(renumber=renumber)
    return with_template(planned, request, places)


def _under(place: str, places: Mapping[str, str]) -> list[Path]:
    """Returns the folders of a model, and the base's if it is not a whole model."""
    found = inputs.find(place)
    rest = [] if found.folder else [folder_of(next(iter(places.values())))]
    return [*folders_of(place), *rest]


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
        raise ValueError(f"{place} is not a whole model. Name a base model.")
    rows = tying.rows(hub.open_checkpoint(folder).tensors)
    if not isinstance(rows, int):
        raise ValueError(f"{folder} has no embedding whose rows could follow tokens.")
    return rows
