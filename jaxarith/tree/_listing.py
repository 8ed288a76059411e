"""Items in messages: how many there are, and the first few of many."""

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


def counted(count: int, one: str, many: str | None = None) -> str:
    """Returns a number and what follows it, in the form for one or for several.

    Args:
      count: the number.
      one: what follows the number 1.
      many: what follows every other number; None adds an s to `one`.

    Example:
      >>> counted(1, "tensor"), counted(0, "tensor"), counted(2, "leaf", "leaves")
      ('1 tensor', '0 tensors', '2 leaves')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"
