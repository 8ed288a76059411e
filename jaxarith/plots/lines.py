"""Curves, bars and points as PNG files."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxarith.plots._figure import COLORS, save
from jaxarith.typing import Numbers


def curves(
    path: str | os.PathLike,
    lines: Mapping[str, tuple[Numbers, Numbers]],
    *,
    x: str,
    y: str,
) -> None:
    """Labelled curves; a dot marks the first maximum of each."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, (xs, ys)) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        # Dashed where the colours begin again.
        style = ("-", "--", ":")[i // len(COLORS) % 3]
        axis.plot(xs, ys, style, color=color, label=label)
        best = int(np.argmax(ys))
        axis.plot(xs[best], ys[best], "o", color=color)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def bands(
    path: str | os.PathLike,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    interval: str,
) -> None:
    """Means of several groups, each with a shaded interval around them.

    Args:
      path: the PNG file.
      lines: label to where it was measured, the means, and half the width of the
        interval at each.
      x, y: what the axes are.
      interval: what the shade is.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, (xs, means, halves)) in enumerate(lines.items()):
        color, marker = COLORS[i % len(COLORS)], "os^D"[i % 4]
        means, halves = np.asarray(means, float), np.asarray(halves, float)
        axis.plot(xs, means, f"{marker}-", color=color, label=label)
        shade = {"color": color, "alpha": 0.2, "linewidth": 0}
        axis.fill_between(xs, means - halves, means + halves, **shade)
    axis.set(xlabel=x, ylabel=y)
    places = list(lines.values())[-1][0]
    if all(float(value).is_integer() for value in places):
        axis.set_xticks(places)
    axis.grid(alpha=0.3)
    axis.legend(title=f"shaded: {interval}")
    save(figure, path)


def repeated(
    path: str | os.PathLike,
    xs: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, float],
    *,
    x: str,
    y: str,
) -> None:
    """Means of repeated measurements, with the range of those; levels are dashed.

    Args:
      path: the PNG file.
      xs: where it was measured.
      lines: label to the measurements at every one of `xs`, one or several.
      levels: label to a value that does not depend on `xs`.
      x, y: what the axes are.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, values) in enumerate(lines.items()):
        color, marker = COLORS[i % len(COLORS)], "os^D"[i % 4]
        axis.plot(
            xs, list(map(np.mean, values)), f"{marker}-", color=color, label=label
        )
        if any(len(found) > 1 for found in values):
            low, high = list(map(min, values)), list(map(max, values))
            axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    for i, (label, value) in enumerate(levels.items(), len(lines)):
        color = COLORS[i % len(COLORS)]
        axis.axhline(value, color=color, linestyle="--", label=label)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def negation(
    path: str | os.PathLike,
    coefs: Numbers,
    panels: Mapping[str, Sequence[float | None]],
    *,
    limit: float,
    chosen: float,
) -> None:
    """A control measure and what is to be forgotten, one above the other.

    Args:
      path: the PNG file.
      coefs: coefficients of the negated vector.
      panels: by their label, two series at `coefs`: the control measure, to which
        `limit` applies, and the other, which starts at 0. None leaves a gap.
      limit: limit of the control measure.
      chosen: the coefficient that is marked.
    """
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        values = [np.nan if value is None else value for value in values]
        axis.plot(coefs, values, "o-", color=COLORS[0], markersize=4)
        axis.axvline(chosen, color=COLORS[2], linestyle=":", label="chosen")
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(limit, color=COLORS[1], linestyle="--", label="limit")
    axes[0].legend()
    axes[1].set(xlabel="coefficient of the negated vector")
    axes[1].set_ylim(bottom=0)
    save(figure, path)


def two_scales(
    path: str | os.PathLike,
    xs: Sequence[float],
    left: tuple[str, Sequence[float | None]],
    right: tuple[str, Sequence[float | None]],
    *,
    x: str,
) -> None:
    """Two curves that have a vertical axis each, in the colour of the curve.

    Args:
      path: the PNG file.
      xs: where both were measured.
      left, right: what an axis shows, and its values at `xs`; None leaves a gap.
      x: what `xs` is.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    first = figure.subplots()
    for i, (axis, (label, values)) in enumerate(
        zip((first, first.twinx()), (left, right), strict=True)
    ):
        values, style = np.array(values, float), ("o-", "s--")[i]
        axis.plot(xs, values, style, color=COLORS[i], markersize=4)
        axis.set_ylabel(label, color=COLORS[i])
        axis.tick_params(axis="y", colors=COLORS[i])
    first.set_xlabel(x)
    first.grid(alpha=0.3)
    save(figure, path)


def bars(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    y: str,
) -> None:
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
        hatch = (None, "///", "...")[i // len(COLORS) % 3]
        color = COLORS[i % len(COLORS)]
        axis.bar(places, values, width, label=label, color=color, hatch=hatch)
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set(ylabel=y)
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=4, fontsize=8)
    save(figure, path)


def horizontal_bars(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    x: str,
) -> None:
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
        axis.barh(places, values, height, label=label, color=COLORS[i % len(COLORS)])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=x)
    axis.set_axisbelow(True)
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    save(figure, path)


def against(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    reference: Sequence[float],
    names: Sequence[str],
    *,
    x: str,
    y: str,
) -> None:
    """Values of several methods against a reference's; equal ones lie on a diagonal.

    Args:
      path: the PNG file.
      groups: method to its n values.
      reference: the n values that they are compared with.
      names: names of the n columns of points.
      x: what the values of the reference are.
      y: what the values of the methods are.
    """
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axis = figure.subplots()
    values = np.concatenate([reference, *groups.values()])
    margin = 0.1 * max(np.ptp(values), 1e-3)
    ends = [values.min() - margin, values.max() + margin]
    axis.plot(ends, ends, "--", color=COLORS[-1], label="equal")
    for i, (label, own) in enumerate(groups.items()):
        marker, color = "^osDvP*X"[i % 8], COLORS[i % len(COLORS)]
        axis.plot(reference, own, marker, color=color, label=label)
    above = axis.secondary_xaxis("top")  # where no point hides a name
    above.set_xticks(reference, names, rotation=30, ha="left")
    axis.set(xlabel=x, ylabel=y, xlim=ends, ylim=ends)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def scatter(
    path: str | os.PathLike,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float | None]]]],
    *,
    x: str,
    y: str,
) -> None:
    """Points of several groups, panels side by side.

    Args:
      path: the PNG file.
      panels: title to groups: label to the two coordinates of its points. A point
        without a second one, None, is not drawn.
      x, y: what the coordinates are.
    """
    figure = Figure(figsize=(0.6 + 4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for i, (label, (xs, ys)) in enumerate(groups.items()):
            color, marker = COLORS[i % len(COLORS)], "o*s^DvPX"[i % 8]
            values = np.array(ys, float)
            axis.scatter(xs, values, s=45, color=color, marker=marker, label=label)
        axis.set(title=title, xlabel=x)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    axes[0].legend()
    save(figure, path)
