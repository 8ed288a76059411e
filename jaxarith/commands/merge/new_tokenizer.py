"""Plans the files of a merge's tokenizer: vocabulary, special ids, chat template."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxarith import files, hub
from jaxarith.commands.merge import sides, template_syntax
from jaxarith.commands.merge.chat_templates import NAMED
from jaxarith.commands.merge.request import MergeRequest
from jaxarith.hub import tokenizer_files
from jaxarith.hub.config import parts
from jaxarith.hub.tokenizer_files import Tokenizer
from jaxarith.stream import Rerowing, inputs


class Planned(NamedTuple):
    """The plan of a merge for tokens.

    Attributes:
      folder: the folder whose tokenizer is copied; None if the file names none.
      rerowing: the sources of rows; None if all rows stay in place.
      made: files that are written instead of copied: their content by name.
      left: files that are not copied because they contain the old vocabulary.
      renumber: `renumber(config, name)` returns the content of the configuration file
        `name` with the ids of the new vocabulary, and notes; None if ids stay.
      notes: notes for the user.
    """

    folder: Path | None = None
    rerowing: Rerowing | None = None
    made: Mapping[str, str] = {}
    left: tuple[str, ...] = ()
    renumber: Callable[[dict, str], tuple[dict, list[str]]] | None = None
    notes: tuple[str, ...] = ()


def with_files(planned: Planned, out: Tokenizer, folder: Path) -> Planned:
    """Returns the plan with files for a tokenizer that has more tokens than its folder.

    Args:
      planned: the plan of a merge for tokens.
      out: the tokenizer.
      folder: the folder of the tokenizer before it got more tokens.
    """
    made = {tokenizer_files.FILE: _json(out.content)}
    settings = _settings(folder)
    new = tokenizer_files.with_added(settings, out.added)
    if new != settings:
        made[tokenizer_files.SETTINGS] = _json(new)
    return planned._replace(made=made, left=tokenizer_files.OTHERS)


def renumbering(
    before: Tokenizer, out: Tokenizer, folder: Path
) -> Callable[[dict, str], tuple[dict, list[str]]]:
    """Returns the function for `Planned.renumber`, which changes ids of tokens.

    If the new tokenizer's model has a key in its file of the same name, that value is
    used. Other keys name the same tokens as before, or become null if a token is lost.

    Args:
      before: the tokenizer with the ids of the files.
      out: the new tokenizer.
      folder: the folder of the new tokenizer's model.
    """
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


def with_template(
    planned: Planned, request: MergeRequest, places: Mapping[str, str]
) -> Planned:
    """Returns the plan with the chat template that is asked for.

    Args:
      planned: the plan of a merge for tokens.
      request: the merge that is asked for.
      places: the place of each model, by its name.
    """
    template = request.chat_template
    if template is None:
        return planned
    notes = [*planned.notes]
    if template == "auto":
        template, note = _most_frequent(places)
        notes.append(note)
        if template is None:
            return planned._replace(notes=tuple(notes))
        if template_syntax.checkable() and (fault := template_syntax.fault(template)):
            notes.append(f"that chat template is not valid Jinja: {fault}")
    elif template not in NAMED and not template_syntax.checkable():
        notes.append(template_syntax.NOT_CHECKED)
    template = NAMED.get(template, template)
    folder = planned.folder or folder_of(next(iter(places.values())))
    made = {**planned.made, tokenizer_files.TEMPLATE: template}
    text = made.get(tokenizer_files.SETTINGS)
    settings = _settings(folder) if text is None else json.loads(text)
    if settings.pop("chat_template", None) is not None:
        made[tokenizer_files.SETTINGS] = _json(settings)
    left = (*planned.left, "chat_template.json")
    return planned._replace(made=made, left=left, notes=tuple(notes))


def _most_frequent(places: Mapping[str, str]) -> tuple[str | None, str]:
    """Returns the most frequent chat template (the first of several), and a note."""
    owners: dict[str, list[str]] = {}
    for name, place in places.items():
        folders = [x for x in folders_of(place) if tokenizer_files.template(x)]
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


def folders_of(place: str) -> list[Path]:
    """Returns the folders of a model: first its adapter's, then its own."""
    found = inputs.find(place)
    return [x for x in (found.adapter, found.folder) if x is not None]


def folder_of(place: str) -> Path:
    """Returns the folder that has a model's tokenizer."""
    folders = folders_of(place)
    having = [x for x in folders if (x / tokenizer_files.FILE).is_file()]
    return [*having, *folders][0]
