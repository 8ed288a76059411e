"""Curves and points as PNG files."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxarith.plots import style
from jaxarith.typing import Numbers

_SIZE = (6.4, 4)
# More lines than this, or names longer than this, go to a legend.
_MOST_LABELS, _LONGEST_LABEL = 14, 40


@style.look
def curves(
    path: str | os.PathLike,
    lines: Mapping[str, tuple[Numbers, Numbers]],
    *,
    x: str,
    y: str,
    best: bool = True,
) -> style.Picture:
    """Curves, each with its name at its end.

    Args:
      path: the PNG file.
      lines: label to the n points of a curve, x and y.
      x, y: what the axes are.
      best: whether a ring marks the first maximum of each.
    """
    figure = style.figure(*_SIZE)
    axis, looks = figure.subplots(), style.styles(lines)
    for label, (xs, ys) in lines.items():
        own = style.line(looks[label], points=len(xs))
        axis.plot(xs, ys, label=label, **own)
        if best:
            i = int(np.argmax(ys))
            axis.plot(
                xs[i],
                ys[i],
                "o",
                color=looks[label].color,
                markerfacecolor="none",
                markersize=10,
                markeredgewidth=1.3,
            )
    axis.set(xlabel=x, ylabel=y)
    _whole_ticks(axis, list(lines.values())[-1][0])
    axis.grid(True)
    ends = {label: (xs[-1], ys[-1]) for label, (xs, ys) in lines.items()}
    _name(axis, ends, looks)
    return style.save(figure, path)


def _name(axis, ends, looks, title=""):
    """Names at the ends of lines; a legend where there are too many or too long."""
    if len(ends) <= _MOST_LABELS and max(map(len, ends)) <= _LONGEST_LABEL:
        style.label_ends(axis, ends, looks)
        if title:
            axis.set_title(title, color=style.MUTED, fontsize=style.FONT_SIZE)
    else:
        axis.legend(title=title)


@style.look
def bands(
    path: str | os.PathLike,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    interval: str,
) -> style.Picture:
    """Means of several groups, each with a shaded interval around them.

    Args:
      path: the PNG file.
      lines: label to where it was measured, the means, and half the width of the
        interval at each.
      x, y: what the axes are.
      interval: what the shade is.
    """
    figure = style.figure(*_SIZE)
    axis, looks, ends = figure.subplots(), style.styles(lines), {}
    for label, (xs, means, halves) in lines.items():
        means, halves = np.asarray(means, float), np.asarray(halves, float)
        axis.plot(xs, means, label=label, **style.line(looks[label]))
        shade = {"color": looks[label].color, "alpha": 0.2, "linewidth": 0}
        axis.fill_between(xs, means - halves, means + halves, **shade)
        ends[label] = (xs[-1], float(means[-1]))
    axis.set(xlabel=x, ylabel=y)
    _whole_ticks(axis, list(lines.values())[-1][0])
    axis.grid(True)
    _name(axis, ends, looks, f"shaded: {interval}")
    return style.save(figure, path)


def _whole_ticks(axis, places):
    """Ticks at the places themselves, where they are few whole numbers."""
    if len(places) <= 12 and all(float(value).is_integer() for value in places):
        axis.set_xticks(places)


@style.look
def repeated(
    path: str | os.PathLike,
    xs: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, float],
    *,
    x: str,
    y: str,
) -> style.Picture:
    """Means of repeated measurements, with the range of those; levels are grey.

    Args:
      path: the PNG file.
      xs: where it was measured.
      lines: label to the measurements at every one of `xs`, one or several.
      levels: label to a value that does not depend on `xs`.
      x, y: what the axes are.
    """
    figure = style.figure(*_SIZE)
    axis, looks, ends = figure.subplots(), style.styles(lines), {}
    for label, values in lines.items():
        means = list(map(np.mean, values))
        axis.plot(xs, means, label=label, **style.line(looks[label]))
        if any(len(found) > 1 for found in values):
            low, high = list(map(min, values)), list(map(max, values))
            shade = {"color": looks[label].color, "alpha": 0.2, "linewidth": 0}
            axis.fill_between(xs, low, high, **shade)
        ends[label] = (xs[-1], float(means[-1]))
    alone = style.FAMILIES["alone"]._replace(color=style.MUTED)
    for i, (label, value) in enumerate(levels.items()):
        dash = ("--", ":", "-.")[i % 3]
        axis.axhline(value, color=alone.color, linestyle=dash, label=label)
        looks[label] = alone
    axis.set(xlabel=x, ylabel=y)
    _whole_ticks(axis, xs)
    axis.grid(True)
    ends |= {label: (axis.get_xlim()[1], value) for label, value in levels.items()}
    _name(axis, ends, looks)
    return style.save(figure, path)


@style.look
def negation(
    path: str | os.PathLike,
    coefs: Numbers,
    panels: Mapping[str, Sequence[float | None]],
    *,
    limit: float,
    chosen: float,
) -> style.Picture:
    """A control measure and what is to be forgotten, one above the other.

    Args:
      path: the PNG file.
      coefs: coefficients of the negated vector.
      panels: by their label, two series at `coefs`: the control measure, to which
        `limit` applies, and the other, which starts at 0. None leaves a gap.
      limit: limit of the control measure.
      chosen: the coefficient that is marked.
    """
    figure = style.figure(6.4, 5.6)
    axes = figure.subplots(2, 1, sharex=True)
    own = style.line(style.FAMILIES["ordinary sum"])
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        axis.plot(coefs, [np.nan if v is None else v for v in values], **own)
        axis.axvline(chosen, color=style.MUTED, linestyle=":")
        axis.set(ylabel=label)
        axis.grid(True)
    axes[0].axhline(limit, color=style.MARK, linestyle="--")
    right = {"ha": "left", "va": "center"}
    axes[0].text(
        1.01,
        limit,
        "limit",
        color=style.MARK,
        transform=axes[0].get_yaxis_transform(),
        **right,
    )
    axes[0].text(
        chosen,
        1.02,
        "chosen",
        color=style.MUTED,
        ha="center",
        transform=axes[0].get_xaxis_transform(),
    )
    axes[1].set(xlabel="coefficient of the negated vector")
    axes[1].set_ylim(bottom=0)
    return style.save(figure, path)


@style.look
def two_scales(
    path: str | os.PathLike,
    xs: Sequence[float],
    left: tuple[str, Sequence[float | None]],
    right: tuple[str, Sequence[float | None]],
    *,
    x: str,
) -> style.Picture:
    """Two curves that have a vertical axis each, in the colour of the curve.

    Args:
      path: the PNG file.
      xs: where both were measured.
      left, right: what an axis shows, and its values at `xs`; None leaves a gap.
      x: what `xs` is.
    """
    figure = style.figure(*_SIZE)
    first = figure.subplots()
    looks = style.FAMILIES["ordinary sum"], style.FAMILIES["τJp"]
    sides = (first, first.twinx()), (left, right), looks
    for axis, (label, values), own in zip(*sides, strict=True):
        axis.plot(xs, np.array(values, float), **style.line(own))
        color = style.darker(own.color)
        axis.set_ylabel(f"{label}  ({_mark(own)})", color=color)
        axis.tick_params(axis="y", colors=color)
        axis.spines["right"].set_visible(axis is not first)
    first.set_xlabel(x)
    first.grid(True)
    return style.save(figure, path)


def _mark(own):
    return {"o": "●", "D": "◆"}[own.marker]


@style.look
def against(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[float]],
    reference: Sequence[float],
    names: Sequence[str],
    *,
    x: str,
    y: str,
) -> style.Picture:
    """Values of several methods against a reference's; equal ones lie on a diagonal.

    Args:
      path: the PNG file.
      groups: method to its n values.
      reference: the n values that they are compared with.
      names: names of the n columns of points.
      x: what the values of the reference are.
      y: what the values of the methods are.
    """
    figure = style.figure(5, 4.6)
    axis, looks = figure.subplots(), style.styles(groups)
    values = np.concatenate([reference, *groups.values()])
    margin = 0.1 * max(np.ptp(values), 1e-3)
    ends = [values.min() - margin, values.max() + margin]
    axis.plot(ends, ends, "--", color=style.MUTED, linewidth=1, label="equal")
    for label, own in groups.items():
        points = style.line(looks[label]) | {"linestyle": "", "markersize": 7}
        axis.plot(reference, own, label=label, **points)
    above = axis.secondary_xaxis("top")  # where no point hides a name
    above.set_xticks(reference, names, rotation=30, ha="left")
    axis.set(xlabel=x, ylabel=y, xlim=ends, ylim=ends)
    axis.set_aspect("equal")
    axis.grid(True)
    figure.legend(loc="outside lower center", ncols=min(len(groups) + 1, 3))
    return style.save(figure, path)


@style.look
def scatter(
    path: str | os.PathLike,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float | None]]]],
    *,
    x: str,
    y: str,
) -> style.Picture:
    """Points of several groups, panels side by side.

    In a single panel, groups of one point each have their names at the right; otherwise
    the names are in a legend.

    Args:
      path: the PNG file.
      panels: title to groups: label to the two coordinates of its points. A point
        without a second one, None, is not drawn.
      x, y: what the coordinates are.
    """
    figure = style.figure(0.6 + 4.2 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    # A group looks the same in every panel.
    looks = style.styles(
        dict.fromkeys(label for own in panels.values() for label in own)
    )
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for label, (xs, ys) in groups.items():
            points = style.line(looks[label]) | {"linestyle": "", "markersize": 7}
            axis.plot(xs, np.array(ys, float), label=label, **points)
        axis.set(title=title, xlabel=x)
        axis.margins(0.12)
        axis.grid(True)
    axes[0].set_ylabel(y)
    points = {label: own for groups in panels.values() for label, own in groups.items()}
    if len(panels) == 1 and all(_is_one_point(*own) for own in points.values()):
        ends = {label: (xs[0], ys[0]) for label, (xs, ys) in points.items()}
        _name(axes[0], ends, looks)
    elif len(looks) > 1:
        figure.legend(
            *_first_of_each(axes), loc="outside lower center", ncols=min(len(looks), 4)
        )
    return style.save(figure, path)


def _is_one_point(xs, ys):
    return len(xs) == 1 and ys[0] is not None


def _first_of_each(axes):
    """Handles and labels of all panels, each label once."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
