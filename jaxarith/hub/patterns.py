r"""Matches regular expressions from foreign files in a time bounded by their size.

The `re` module tries one way after another, so `(a+)+b` can take it forever. Here the
places where a part of a pattern may end are a set, so each place is visited once. `re`
is used only to check the pattern and to match single characters (`[a-z]`, `\d`).
References to groups, looking ahead or back, and flags are refused.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

_LONGEST = 1000  # the most characters in a pattern or in a text

# A step maps the places where a part of a pattern may begin to those where it may end.
_Step: TypeAlias = Callable[[str, set[int]], set[int]]

_QUANTIFIER = re.compile(
    r"(?:(?P<sign>[*+?])|\{(?!\})(?P<least>[0-9]*)(?P<most>,[0-9]*)?\})(?P<kind>[?+]?)"
)
_SIGNS = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-3][0-7]{2}|.)", re.DOTALL
)
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
# Unsupported groups, by how they begin.
_REFUSED = {
    "(?=": "assert",
    "(?!": "assert_not",
    "(?<=": "assert",
    "(?<!": "assert_not",
    "(?P=": "groupref",
    "(?(": "groupref_exists",
    "(?>": "atomic_group",
    "(?#": "comment",
}


def fits_end(pattern: str, name: str) -> bool:
    """Whether a pattern fits whole words at the end of a name with dots.

    Raises:
      ValueError: the pattern is not a regular expression, or uses a refused feature.

    Example:
      >>> fits_end(r"layers\\.[0-3]\\..*proj", "model.layers.2.mlp.up_proj")
      True
      >>> fits_end("proj", "model.layers.2.mlp.up_proj")
      False
    """
    if max(len(pattern), len(name)) > _LONGEST:
        raise ValueError(
            f"the pattern {pattern[:60]!r}, or the name that it is matched with, has "
            f"more than {_LONGEST} characters. Shorten it."
        )
    starts = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
    try:
        return len(name) in _parsed(pattern)(name, starts)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern[:60]!r} is not a regular expression: {error}."
        ) from error


@functools.cache
def _parsed(pattern: str) -> _Step:
    # It is sound where the functions below parse it.
    if re.compile(pattern).flags & ~re.UNICODE.value:
        raise ValueError(f"the pattern {pattern[:60]!r} has flags; remove them.")
    step, _ = _branches(pattern, 0)
    return step


# Each of these parses the part that begins at a place, and returns its step and the
# place after it.


def _branches(pattern: str, place: int) -> tuple[_Step, int]:
    step, place = _sequence(pattern, place)
    steps = [step]
    while pattern[place : place + 1] == "|":
        step, place = _sequence(pattern, place + 1)
        steps.append(step)
    return functools.partial(_one_of, steps), place


def _sequence(pattern: str, place: int) -> tuple[_Step, int]:
    steps = []
    while place < len(pattern) and pattern[place] not in "|)":
        step, place = _part(pattern, place)
        if found := _QUANTIFIER.match(pattern, place):
            if found["kind"] == "+":
                _refuse("possessive_repeat")
            step, place = (
                functools.partial(_repeated, *_counts(found), step),
                found.end(),
            )
        steps.append(step)
    return functools.partial(_in_turn, steps), place


def _counts(found: re.Match) -> tuple[int, float]:
    if found["sign"]:
        return _SIGNS[found["sign"]]
    least = int(found["least"] or 0)
    match found["most"]:
        case None:
            return least, least
        case ",":
            return least, math.inf
        case most:
            return least, int(most[1:])


def _part(pattern: str, place: int) -> tuple[_Step, int]:
    letter = pattern[place]
    if letter == "(":
        return _group(pattern, place)
    if letter in "^$":
        return _at_start if letter == "^" else _at_end, place + 1
    if found := {"[": _CLASS, "\\": _ESCAPE}.get(letter):
        match = found.match(pattern, place)
        assert match is not None  # `re` found it sound
        return _special(match[0]), match.end()
    one = letter if letter == "." else re.escape(letter)
    return functools.partial(_letter, re.compile(one)), place + 1


def _group(pattern: str, place: int) -> tuple[_Step, int]:
    if (opening := _GROUP.match(pattern, place)) is None:
        found = (x for begin, x in _REFUSED.items() if pattern.startswith(begin, place))
        _refuse(next(found, "a group with flags"))
    step, place = _branches(pattern, opening.end())
    return step, place + 1  # after its closing bracket


def _special(text: str) -> _Step:
    """Returns the step for a class of characters or an escape."""
    if text in (r"\A", r"\Z"):
        return _at_start if text == r"\A" else _at_end
    if text in (r"\b", r"\B"):
        _refuse("at")
    if re.fullmatch(r"\\[1-9]", text):
        _refuse("groupref")
    return functools.partial(_letter, re.compile(text))


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"a pattern has {what}, which is not supported. Rewrite it.")


# These are the steps.


def _one_of(steps: Sequence[_Step], text: str, places: set[int]) -> set[int]:
    return set().union(*(step(text, places) for step in steps))


def _in_turn(steps: Sequence[_Step], text: str, places: set[int]) -> set[int]:
    for step in steps:
        if not places:
            break
        places = step(text, places)
    return places


def _repeated(
    least: int, most: float, step: _Step, text: str, places: set[int]
) -> set[int]:
    for _ in range(least):
        if (found := step(text, places)) == places:
            break  # only empty matches, or none
        places = found
    ends = new = places
    for _ in range(least, int(min(most, least + len(text) + 1))):
        if not (new := step(text, new) - ends):
            break
        ends = ends | new
    return ends


def _letter(one: re.Pattern, text: str, places: set[int]) -> set[int]:
    inside = (place for place in places if place < len(text))
    return {i + 1 for i in inside if one.fullmatch(text, i, i + 1)}


def _at_start(text: str, places: set[int]) -> set[int]:
    return places & {0}


def _at_end(text: str, places: set[int]) -> set[int]:
    return places & {len(text)}
