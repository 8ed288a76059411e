"""Figures from plain arrays, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Distinct to colour-blind readers too (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
           "#999999")  # fmt: skip


def _save(figure: Figure, path):
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def matrices(
    path,
    panels: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    rows: str,
    columns: str,
    value: str,
    digits: int = 2,
):
    """Square matrices over tasks side by side, on one colour scale, values written in.

    Args:
      path: the PNG file.
      panels: title to matrix `[T, T]`.
      names: the T tasks.
      rows, columns: what the two axes are.
      value: what the numbers are.
      digits: decimals of the numbers.
    """
    top = max(float(np.max(matrix)) for matrix in panels.values())
    low = min(0.0, *(float(np.min(matrix)) for matrix in panels.values()))
    figure = Figure(figsize=(2.2 + 3.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(matrix, vmin=low, vmax=top, cmap="viridis")
        axis.set(title=title, xlabel=columns)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        for (i, j), number in np.ndenumerate(matrix):
            color = "black" if number > low + 0.6 * (top - low) else "white"
            text = f"{number:.{digits}f}"
            axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axes[0].set_ylabel(rows)
    figure.colorbar(image, ax=list(axes), label=value, shrink=0.8)
    _save(figure, path)


def disentanglement(
    path,
    panels: Mapping[str, np.ndarray],
    coefs: Sequence[float],
    tasks: tuple[str, str],
    *,
    searched: tuple[float, float] = (0.0, 1.0),
):
    """ξ heat maps side by side; a red box marks the range that a search covers.

    Args:
      path: the PNG file.
      panels: title to grid `[n, n]`: rows are the coefficient of the first task.
      coefs: the n coefficients, evenly spaced.
      tasks: the pair.
      searched: the coefficients inside the box.
    """
    half = (coefs[1] - coefs[0]) / 2
    extent = (coefs[0] - half, coefs[-1] + half) * 2
    figure = Figure(figsize=(1.4 + 3.8 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(
            np.transpose(grid),
            origin="lower",
            extent=extent,
            vmin=0,
            vmax=1,
            cmap="Blues",
        )
        low, high = searched
        box = [low, high, high, low, low], [low, low, high, high, low]
        axis.plot(*box, color="red", linewidth=1.5)
        axis.set(title=title, xlabel=f"coefficient of {tasks[0]}")
    axes[0].set_ylabel(f"coefficient of {tasks[1]}")
    # ξ reaches 2; the papers' scale ends at 1, where half of all labels differ.
    figure.colorbar(
        image, ax=list(axes), label="disentanglement error ξ", shrink=0.9, extend="max"
    )
    _save(figure, path)


def curves(
    path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
):
    """Labelled curves; a dot marks the first maximum of each."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, (xs, ys)) in enumerate(lines.items()):
        color = _COLORS[i % len(_COLORS)]
        # Dashed where the colours begin again.
        style = ("-", "--", ":")[i // len(_COLORS) % 3]
        axis.plot(xs, ys, style, color=color, label=label)
        best = int(np.argmax(ys))
        axis.plot(xs[best], ys[best], "o", color=color)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def negation(
    path,
    coefs: Sequence[float],
    panels: Mapping[str, Sequence[float | None]],
    *,
    limit: float,
    chosen: float,
):
    """A control measure and what is to be forgotten, one above the other.

    Args:
      path: of the PNG file.
      coefs: of the negated vector.
      panels: by their label, two series at `coefs`: the control measure, to which
        `limit` applies, and the other, which starts at 0. None leaves a gap.
      limit: of the control measure.
      chosen: the coefficient that is marked.
    """
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        values = [np.nan if value is None else value for value in values]
        axis.plot(coefs, values, "o-", color=_COLORS[0], markersize=4)
        axis.axvline(chosen, color=_COLORS[2], linestyle=":", label="chosen")
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(limit, color=_COLORS[1], linestyle="--", label="limit")
    axes[0].legend()
    axes[1].set(xlabel="coefficient of the negated vector")
    axes[1].set_ylim(bottom=0)
    _save(figure, path)


def bars(path, groups: Mapping[str, Sequence[float]], names: Sequence[str], *, y: str):
    """Bars of several methods side by side for every task.

    Args:
      path: the PNG file.
      groups: method to its T values.
      names: the T tasks.
      y: what the values are.
    """
    figure = Figure(figsize=(max(8.5, 1.5 + 1.4 * len(names)), 4), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        places = np.arange(len(names)) - 0.42 + (i + 0.5) * width
        hatch = (None, "///", "...")[i // len(_COLORS) % 3]
        color = _COLORS[i % len(_COLORS)]
        axis.bar(places, values, width, label=label, color=color, hatch=hatch)
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set(ylabel=y)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=4, fontsize=8)
    _save(figure, path)


def horizontal_bars(
    path, groups: Mapping[str, Sequence[float]], names: Sequence[str], *, x: str
):
    """Bars of several methods side by side for every row, for long names of rows.

    Args:
      path: the PNG file.
      groups: method to its values, one for each row; NaN draws none.
      names: the rows, from top to bottom.
      x: what the values are.
    """
    figure = Figure(figsize=(7.5, 1.2 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    height = 0.84 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        places = np.arange(len(names)) - 0.42 + (i + 0.5) * height
        axis.barh(places, values, height, label=label, color=_COLORS[i % len(_COLORS)])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=x)
    axis.set_axisbelow(True)
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    _save(figure, path)
