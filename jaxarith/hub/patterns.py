"""Regular expressions of foreign files, matched in a time that their size limits.

The `re` module tries one way after another: `(a+)+b` takes it longer than anybody
waits. Here the places where a part of a pattern may end are a set, so that each is
visited once. References to groups, looking ahead or back, and flags are refused.
"""

import functools
import re
from re import _constants as sre  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

_LONGEST = 1000  # characters of a pattern, and of a text

_STARTS = {sre.AT_BEGINNING, sre.AT_BEGINNING_STRING}
_ENDS = {sre.AT_END, sre.AT_END_STRING}
_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}


def fits_end(pattern: str, name: str) -> bool:
    """Whether a pattern fits whole words at the end of a name with dots.

    Raises:
      ValueError: it is no regular expression, or of a kind that is refused.

    Example:
      >>> fits_end(r"layers\\.[0-3]\\..*proj", "model.layers.2.mlp.up_proj")
      True
      >>> fits_end("proj", "model.layers.2.mlp.up_proj")
      False
    """
    if max(len(pattern), len(name)) > _LONGEST:
        raise ValueError(
            f"the pattern {pattern[:60]!r} or the name that it is tried on has more "
            f"than {_LONGEST} characters."
        )
    starts = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
    try:
        return len(name) in _sequence(_parsed(pattern), name, starts)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern[:60]!r} is no regular expression: {error}."
        ) from error


@functools.cache
def _parsed(pattern):
    parsed = parser.parse(pattern)
    if parsed.state.flags & ~re.UNICODE.value:
        raise ValueError(f"the pattern {pattern[:60]!r} has flags; remove them.")
    return parsed


def _sequence(parts, text, places):
    """The places where the parts may end that begin at one of some places."""
    for kind, value in parts:
        if not places:
            return places
        places = _part(kind, value, text, places)
    return places


def _part(kind: Any, value: Any, text: str, places: set[int]) -> set[int]:
    if kind is sre.AT and value in _STARTS:
        return places & {0}
    if kind is sre.AT and value in _ENDS:
        return places & {len(text)}
    if kind is sre.SUBPATTERN and not (value[1] or value[2]):
        return _sequence(value[3], text, places)
    if kind is sre.BRANCH:
        return set().union(*(_sequence(parts, text, places) for parts in value[1]))
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, parts = value
        return _repeated(least, most, parts, text, places)
    if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
        inside = {place for place in places if place < len(text)}
        return {i + 1 for i in inside if _is_of(kind, value, text[i])}
    raise ValueError(f"a pattern has {str(kind).lower()}, which is not supported.")


def _repeated(least, most, parts, text, places):
    for _ in range(least):
        if (found := _sequence(parts, text, places)) == places:
            break  # of nothing but empty matches, or of none
        places = found
    ends = new = places
    for _ in range(least, min(int(most), least + len(text) + 1)):
        if not (new := _sequence(parts, text, new) - ends):
            break
        ends = ends | new
    return ends


def _is_of(kind: Any, value: Any, letter: str) -> bool:
    """Whether a character is a literal, or in a class."""
    match kind:
        case sre.ANY:
            return letter != "\n"
        case sre.LITERAL:
            return ord(letter) == value
        case sre.NOT_LITERAL:
            return ord(letter) != value
        case sre.RANGE:
            return value[0] <= ord(letter) <= value[1]
        case sre.CATEGORY:
            return re.match(_CATEGORIES[value], letter) is not None
    negated = value[0][0] is sre.NEGATE
    return negated != any(_is_of(op, item, letter) for op, item in value[negated:])
