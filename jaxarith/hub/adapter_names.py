"""Finds the tensors of a model by the names that adapters use for them."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jaxarith import tree

# Prefixes of the layers of a language model.
_OUTER = re.compile(r"^((model|language_model)\.)+")

# Names of ViT, DINOv2 and similar models in files, and in classes of transformers 5.
_VISION = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"^(vit|deit|beit|dinov2)\.", ""),
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.query", "attention.q_proj"),
        (r"attention\.attention\.key", "attention.k_proj"),
        (r"attention\.attention\.value", "attention.v_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    )
)


def fit(
    folder: Path, wanted: Collection[str], base: Collection[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds the name in the base for each name in an adapter.

    Args:
      folder: the adapter, to name in messages.
      wanted: names in the adapter.
      base: names in the base.

    Returns:
      `{name in the adapter: name in the base}`, and notes on names that are spelled in
      another way.

    Raises:
      ValueError: a name has no place in the base, or several.
    """
    longer: dict[str, list[str]] = {}
    for name in base:
        for end in _ends(name):
            longer.setdefault(end, []).append(name)
    names: dict[str, str] = {}
    taken: set[str] = set()
    lines = []
    for name in sorted(wanted):
        found = [name] if name in base else longer.get(name, [])
        found = found or [end for end in _ends(name) if end in base]
        if len(found) > 1:
            lines.append(f"+ {name} may be {' or '.join(found[:3])}")
        elif not found:
            lines.append(f"+ {name}: not in the base")
        elif found[0] in taken:
            lines.append(f"+ {name}: one more for {found[0]}")
        else:
            names[name] = found[0]
            taken.add(found[0])
    if not lines:
        return names, ()
    spelled = _spelled_otherwise(wanted, base, _inside)
    if (spelled := spelled or _spelled_otherwise(wanted, base, _of_vision)) is None:
        few = ", ".join(tree.first_few(base, most=3))
        raise ValueError(f"{unfit(folder, lines)} The base has {few}.")
    first = min(wanted)
    note = f"{folder}: {first} is taken as {spelled[first]} of the base; so are others"
    return spelled, (note,)


def _spelled_otherwise(
    wanted: Collection[str], base: Collection[str], spell: Callable[[str], str]
) -> dict[str, str] | None:
    """Matches names of an adapter with the base's if both have the same new spelling.

    Returns None unless each name has exactly one place, and no two share one.
    """
    inner: dict[str, list[str]] = {}
    for name in base:
        inner.setdefault(spell(name), []).append(name)
    found = {name: inner.get(spell(name), []) for name in wanted}
    if any(len(names) != 1 for names in found.values()):
        return None
    spelled = {name: names[0] for name, names in found.items()}
    return spelled if len({*spelled.values()}) == len(spelled) else None


def _inside(name: str) -> str:
    """Returns a name without the prefix of a language model.

    The names begin with model, model.language_model or language_model.model, depending
    on the class and the version that saved them.
    """
    return _OUTER.sub("", name)


def _of_vision(name: str) -> str:
    for pattern, spelling in _VISION:
        name = pattern.sub(spelling, name)
    return name


def _ends(name):
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts) - 1)]


def unfit(folder: Path, lines: Sequence[str]) -> str:
    """Returns the error message for an adapter, with a line for each tensor."""
    title = f"{folder} does not fit the base ({tree.counted(len(lines), 'tensor')}):"
    listed = "\n  ".join([title, *tree.first_few(lines)])
    return (
        f"{listed}\nGive the model that the adapter was trained on, with the same head."
    )
