"""Draws bars as PNG files."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxarith.plots import style


@style.look
def bars(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    y: str,
) -> style.Picture:
    """Draws bars of several methods side by side for every task.

    For more than about five methods, `by_task` is easier to read.

    Args:
      path: the PNG file.
      groups: the T values of each method.
      names: the T tasks.
      y: name of the values.
    """
    size = 1.5 + max(1.0, 0.22 * len(groups)) * len(names)
    figure = style.figure(max(7, size), 4)
    axis = figure.subplots()
    _side_by_side(axis.bar, groups, len(names))
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set(ylabel=y)
    axis.grid(axis="y")
    return _with_legend(figure, path, len(groups))


@style.look
def horizontal_bars(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    x: str,
) -> style.Picture:
    """Draws bars of several methods side by side for every row, for long row names.

    Args:
      path: the PNG file.
      groups: the values of each method, one for each row; NaN draws no bar.
      names: the rows, from top to bottom.
      x: name of the values.
    """
    figure = style.figure(7.5, 1.2 + (0.16 + 0.18 * len(groups)) * len(names))
    axis = figure.subplots()
    _side_by_side(axis.barh, groups, len(names))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=x)
    axis.grid(axis="x")
    return _with_legend(figure, path, len(groups))


def _side_by_side(draw, groups, count):
    """Draws the groups with `Axes.bar` or `Axes.barh`, at the places 0 to `count`."""
    thickness, looks = 0.84 / len(groups), style.styles(groups)
    for i, (label, values) in enumerate(groups.items()):
        places = np.arange(count) - 0.42 + (i + 0.5) * thickness
        draw(places, values, thickness, label=label, **style.bar(looks[label]))


def _with_legend(figure, path, groups):
    """Writes the figure, with a legend if there are several groups."""
    if groups > 1:
        figure.legend(loc="outside upper center", ncols=min(groups, 4))
    return style.save(figure, path)


@style.look
def by_task(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    x: str,
) -> style.Picture:
    """Draws a panel of bars with their values for every method, tasks top to bottom.

    Args:
      path: the PNG file.
      groups: the T values of each method; the panels are in this order.
      names: the T tasks.
      x: name of the values.
    """
    figure = style.figure(1.6 + 1.35 * len(groups), 1.3 + 0.3 * len(names))
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    looks = style.styles(groups)
    for axis, (label, values) in zip(axes, groups.items(), strict=True):
        axis.barh(range(len(names)), values, 0.8, **style.bar(looks[label]))
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.2f}", va="center", ha="left")
        color = style.darker(looks[label].color)
        axis.set_title(f"{_broken(label)}\nmean {np.mean(values):.3f}", color=color)
        axis.spines["bottom"].set_visible(False)
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.35 * max(max(values) for values in groups.values()))
    figure.supxlabel(x, fontsize=style.FONT_SIZE)
    return style.save(figure, path)


def _broken(label):
    """Breaks the label into two lines, for a narrow panel."""
    for mark in (", ", " + "):
        first, found, last = label.partition(mark)
        if found:
            return f"{first}{mark.rstrip()}\n{last}"
    return f"{label}\n"


@style.look
def ranked(
    path: str | os.PathLike,
    values: Mapping[str, float],
    *,
    x: str,
    ticks: Mapping[str, float] | None = None,
    tick: str = "",
) -> style.Picture:
    """Draws one bar with its value for every method, the largest on top.

    Args:
      path: the PNG file.
      values: the value of each method.
      x: name of the values.
      ticks: second values of methods, marked by strokes.
      tick: name of the second values.
    """
    figure = style.figure(6.4, 1.0 + 0.28 * len(values))
    ranked_on(figure.subplots(), values, x=x, ticks=ticks or {}, tick=tick)
    return style.save(figure, path)


def ranked_on(
    axis: Axes,
    values: Mapping[str, float],
    *,
    x: str,
    ticks: Mapping[str, float],
    tick: str,
) -> None:
    """Draws the bars of `ranked` on these axes."""
    order = sorted(values, key=lambda label: -values[label])
    looks = style.styles(values)
    top = max([*values.values(), *ticks.values()])
    for place, label in enumerate(order):
        axis.barh(place, values[label], 0.78, **style.bar(looks[label]))
        end, text = values[label], f"{values[label]:.3f}"
        if label in ticks:
            axis.plot([ticks[label]] * 2, [place - 0.39, place + 0.39], color="black")
            end, text = max(end, ticks[label]), f"{text} ({ticks[label]:.3f})"
        axis.text(end + 0.015 * top, place, text, va="center")
    axis.set_yticks(range(len(order)), order)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, (1.28 if ticks else 1.14) * top)
    axis.set_xlabel(f"{x}\n(stroke, brackets: {tick})" if ticks else x)
    axis.grid(axis="x")
