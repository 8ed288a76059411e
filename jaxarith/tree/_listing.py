"""The first few of many items, for messages that would else be too long."""

from collections.abc import Collection
from itertools import islice
from typing import Any


def first_few(items: Collection[Any], most: int = 8) -> list[str]:
    """Returns the first items as texts, and a last text that counts the rest.

    Args:
      items: items of any type.
      most: largest number of items to show.

    Example:
      >>> ", ".join(first_few("abcde", most=2))
      'a, b, … and 3 more'
    """
    shown = [str(item) for item in islice(items, most)]
    rest = len(items) - len(shown)
    return [*shown, f"… and {rest} more"] if rest else shown
