"""The style of figures: a colour for each family of methods, and shapes for grey print.

Every figure of the library and the experiments takes its colours, dashes, markers,
hatches and sizes from here. Colour-blind readers can tell the colours apart (after
Okabe and Ito). In grey, dashes, markers and hatches still differ.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

FONT_SIZE = 9
DPI = 150
# Both get steadily darker (or lighter), so they keep their order in grey.
SEQUENTIAL = "Blues"
LEVELS = "viridis"
MARK = "#C24A00"  # boxes and crosses on a map
MUTED = "#6E6E6E"  # levels, diagonals, notes

# A decorator for functions that draw.
look = matplotlib.rc_context(
    {
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.axisbelow": True,
        "axes.grid": False,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
    }
)


class Style(NamedTuple):
    """The style of one group of values.

    Attributes:
      color: colour of lines, points and bars.
      marker: marker of points.
      dash: dashes of lines.
      hatch: hatch of bars.
    """

    color: str
    marker: str
    dash: str | tuple
    hatch: str


_DOTTED, _DASH_DOT = (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))
_LONG, _TWO_DOTS = (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1))
# Families of methods. Figures without any of them use their colours in this order.
FAMILIES: dict[str, Style] = {
    "ordinary sum": Style("#0068A8", "o", "-", ""),
    "τJp": Style("#D55E00", "D", (0, (5, 1.5)), "///"),
    "linearised": Style("#009E73", "s", _LONG, "\\\\\\"),
    "spectral": Style("#C475A8", "^", _DASH_DOT, "xxx"),
    "data": Style("#EFAF1F", "p", _TWO_DOTS, "|||"),
    "sign or trim": Style("#6CBDEB", "v", _DOTTED, "..."),
    "curvature": Style("#3A1E68", "*", "-", "++"),
    "alone": Style("#A3A3A3", "h", (0, (3, 2)), ""),
}
# The first pattern that matches a label gives its family. `alone` is for models into
# which nothing was merged.
_WORDS = {
    "alone": r"zero[-_ ]shot|pre-?trained|individual|single|fine-?tuned",
    "curvature": r"curvature|\btak\b|delta|ek-?fac|kronecker",
    "τJp": r"τjp|tau_jp|\bcyclic\b|\bstrict\b",
    "data": r"fisher|regmean|adamerging|adarank|surgery|multi-task",
    "linearised": r"\blinear(ised|ized)?\b|tangent",
    "spectral": r"tsv|\biso\b|iso[-_ ]c|wudi|\bsvc\b|\bcart\b|\bdc[-_ ]|\besm\b",
    "sign or trim": r"ties|\bdare|della|consensus|\bemr|magmax|topk|breadcrumbs|\bpcb",
    "ordinary sum": r"ordinary|nonlinear|task[-_ ]arithmetic|average|\bawd\b|\bsum\b",
}


class Picture(type(Path())):
    """The path of a figure; a notebook shows the figure itself."""

    def _repr_png_(self) -> bytes:
        return self.read_bytes()


def family(label: str) -> str | None:
    """Returns the family in `FAMILIES` of a label, judged by its words.

    Example:
      >>> family("ordinary, TIES"), family("linearised + cyclic τJp"), family("MNIST")
      ('sign or trim', 'τJp', None)
    """
    found = (
        name for name, words in _WORDS.items() if re.search(words, label, re.IGNORECASE)
    )
    return next(found, None)


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """Returns a style for every label of a figure: the style of its family.

    The second and third label of a family get a lighter colour, and the marker, dash
    and hatch of another family. Labels without a family take the styles of families
    that the figure lacks.

    Args:
      labels: names of the figure's groups.

    Example:
      >>> styles(["TSV-M", "MNIST"])["TSV-M"] == FAMILIES["spectral"]
      True
    """
    labels = list(labels)
    families = {label: family(label) for label in labels}
    present = set(families.values())
    free = [s for name, s in FAMILIES.items() if name not in present] or [*_ALL]
    found, seen = {}, dict.fromkeys([*FAMILIES, None], 0)
    for label, name in families.items():
        if name is None:
            turn, place = divmod(seen[name], len(free))
            first = free[place]
        else:
            turn, first = seen[name], FAMILIES[name]
        seen[name] += 1
        found[label] = _varied(first, turn)
    return found


_ALL = tuple(FAMILIES.values())


def _varied(style, turn):
    """Returns the style of the `turn`-th group with this style, from 0."""
    if not turn:
        return style
    other = _ALL[(_ALL.index(style) + 3 * turn) % len(_ALL)]
    share = min(0.3 * turn, 0.6)
    mixed = (1 - share) * np.array(to_rgb(style.color)) + share
    color = "#" + "".join(f"{round(255 * value):02X}" for value in mixed)
    return Style(color, other.marker, other.dash, other.hatch or "--")


def figure(width: float, height: float) -> Figure:
    """Makes an empty figure, its size in inches, with room for all labels."""
    return Figure(figsize=(width, height), layout="constrained")


def line(style: Style, *, points: int = 0) -> dict[str, Any]:
    """Returns options of `Axes.plot` for a line; few points all have markers.

    Args:
      style: style of the group.
      points: number of points of the line.
    """
    own = {"color": style.color, "linestyle": style.dash, "marker": style.marker}
    own |= {"markeredgecolor": "white", "markeredgewidth": 0.5}
    return own | {"markevery": max(points // 8, 1)}


def bar(style: Style) -> dict[str, Any]:
    """Returns options of `Axes.bar` and `Axes.barh`."""
    return {"color": style.color, "hatch": style.hatch, "edgecolor": "white"}


def label_ends(
    axis: Axes,
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Style],
) -> None:
    """Writes the name of every line to the right of the axes, at the line's end.

    Names that would overlap move up or down, and a thin line joins them to the end.
    Call it after everything is drawn: it fixes the limits of the axes.

    Args:
      axis: the axes.
      ends: for each label, the last point of its line.
      styles: for each label, its style.
    """
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)
    whole = axis.get_figure(root=True)
    assert whole is not None
    gap = 1.35 * FONT_SIZE / 72 / (0.8 * whole.get_size_inches()[1])
    wanted = [(y - low) / (high - low) for _, y in ends.values()]
    for (label, (x, y)), place in zip(ends.items(), spread(wanted, gap), strict=True):
        start = ((x - left) / (right - left), (y - low) / (high - low))
        axis.annotate(
            label,
            start,
            (1.05, place),
            "axes fraction",
            va="center",
            color=darker(styles[label].color),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": styles[label].color,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places until they are `gap` apart, as little as possible in least squares.

    Args:
      places: the wanted place of each of n things.
      gap: the least distance between two things.

    Returns:
      n places in the order of `places`.

    Example:
      >>> spread([0.5, 0.5, 0.9], 0.1)
      [0.45, 0.55, 0.9]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    # Without the gaps, places must not decrease; neighbours that do are averaged.
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([places[i] - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    flat = [float(np.mean(block)) for block in blocks for _ in block]
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = round(flat[rank] + rank * gap, 6)
    return found


def darker(color: str) -> str:
    """Returns a colour that is dark enough for small letters on white.

    Example:
      >>> darker("#FFFFFF")
      '#6F6F6F'
    """
    red, green, blue = to_rgb(color)
    light = 0.3 * red + 0.59 * green + 0.11 * blue
    factor = min(1.0, 0.435 / light) if light else 1.0
    return "#" + "".join(f"{round(255 * factor * x):02X}" for x in (red, green, blue))


def outlined(width: float = 2.5) -> list:
    """Returns path effects that put a white rim around lines on a dark background."""
    return [withStroke(linewidth=width, foreground="white")]


def save(figure: Figure, path: str | os.PathLike) -> Picture:
    """Writes a figure as PNG under a temporary name and renames it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, dpi=DPI, bbox_inches="tight", format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Picture(path)
