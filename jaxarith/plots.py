"""Figures from plain arrays, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import BoundaryNorm
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
    # ξ reaches 2; the papers' scale ends at 1, where half of all labels differ.
    scales: Sequence[tuple[str, float]] = (("disentanglement error ξ", 1.0),),
):
    """ξ heat maps side by side; a red box marks the range that a search covers.

    Args:
      path: the PNG file.
      panels: title to grid `[n, n]`: rows are the coefficient of the first task. Where
        ξ was measured in R ways, title to grids `[R, n, n]`, drawn one above another.
      coefs: the n coefficients, evenly spaced.
      tasks: the pair.
      searched: the coefficients inside the box.
      scales: what each of the R ways is called, and the largest value of its colours.
    """
    size = (1.4 + 3.8 * len(panels), 0.5 + 3.4 * len(scales))
    figure = Figure(figsize=size, layout="constrained")
    shape = (len(panels), len(scales), len(coefs), len(coefs))
    grids = np.reshape(list(panels.values()), shape)
    axes = figure.subplots(len(scales), len(panels), squeeze=False)
    for i, (label, top) in enumerate(scales):
        for axis, grid in zip(axes[i], grids[:, i], strict=True):
            image = _xi(axis, grid, coefs, searched, top)
        axes[i, 0].set_ylabel(f"coefficient of {tasks[1]}")
        bar = {"ax": list(axes[i]), "label": label, "shrink": 0.9, "extend": "max"}
        figure.colorbar(image, **bar)
    for top, bottom, title in zip(axes[0], axes[-1], panels, strict=True):
        top.set_title(title)
        bottom.set_xlabel(f"coefficient of {tasks[0]}")
    _save(figure, path)


def _xi(axis, grid, coefs, searched, top):
    """A heat map of ξ `[n, n]` with a red box."""
    half = (coefs[1] - coefs[0]) / 2
    image = axis.imshow(
        np.transpose(grid),
        origin="lower",
        extent=(coefs[0] - half, coefs[-1] + half) * 2,
        vmin=0,
        vmax=top,
        cmap="Blues",
    )
    low, high = searched
    box = [low, high, high, low, low], [low, low, high, high, low]
    axis.plot(*box, color="red", linewidth=1.5)
    return image


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
    axis.set_axisbelow(True)
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


def against(
    path,
    groups: Mapping[str, Sequence[float]],
    reference: Sequence[float],
    names: Sequence[str],
    *,
    x: str,
    y: str,
):
    """Values of several methods against a reference's; equal ones lie on a diagonal.

    Args:
      path: the PNG file.
      groups: method to its n values.
      reference: the n values that they are compared with.
      names: of the n columns of points.
      x: what the values of the reference are.
      y: what those of the methods are.
    """
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axis = figure.subplots()
    values = np.concatenate([reference, *groups.values()])
    margin = 0.1 * max(np.ptp(values), 1e-3)
    ends = [values.min() - margin, values.max() + margin]
    axis.plot(ends, ends, "--", color=_COLORS[-1], label="equal")
    for i, (label, own) in enumerate(groups.items()):
        marker, color = "^osDvP*X"[i % 8], _COLORS[i % len(_COLORS)]
        axis.plot(reference, own, marker, color=color, label=label)
    above = axis.secondary_xaxis("top")  # where no point hides a name
    above.set_xticks(reference, names, rotation=30, ha="left")
    axis.set(xlabel=x, ylabel=y, xlim=ends, ylim=ends)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def scatter(
    path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float | None]]]],
    *,
    x: str,
    y: str,
):
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
            color, marker = _COLORS[i % len(_COLORS)], "o*s^DvPX"[i % 8]
            values = np.array(ys, float)
            axis.scatter(xs, values, s=45, color=color, marker=marker, label=label)
        axis.set(title=title, xlabel=x)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    axes[0].legend()
    _save(figure, path)


def two_scales(
    path,
    xs: Sequence[float],
    left: tuple[str, Sequence[float | None]],
    right: tuple[str, Sequence[float | None]],
    *,
    x: str,
):
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
        axis.plot(xs, values, style, color=_COLORS[i], markersize=4)
        axis.set_ylabel(label, color=_COLORS[i])
        axis.tick_params(axis="y", colors=_COLORS[i])
    first.set_xlabel(x)
    first.grid(alpha=0.3)
    _save(figure, path)


def disentanglement_of_pairs(
    path,
    rows: Sequence[Sequence[tuple[str, np.ndarray]]],
    coefs: Sequence[float],
    tasks: Sequence[tuple[str, str]],
    *,
    searched: tuple[float, float] = (0.0, 1.0),
):
    """ξ heat maps of several pairs of tasks, a column for each pair.

    A red box marks the range that a search covers, a cross the pre-trained model.

    Args:
      path: the PNG file.
      rows: for each row and column a title and a grid `[n, n]`, whose rows are the
        coefficient of the pair's first task.
      coefs: the n coefficients, evenly spaced.
      tasks: the pair of each column.
      searched: the coefficients inside the box.
    """
    size = (1.2 + 3.1 * len(tasks), 0.2 + 3.1 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    axes = figure.subplots(len(rows), len(tasks), squeeze=False)
    for row, cells in zip(axes, rows, strict=True):
        for axis, (title, grid), (first, second) in zip(row, cells, tasks, strict=True):
            image = _xi(axis, grid, coefs, searched, top=1)  # as in `disentanglement`
            axis.plot(0, 0, "x", color="red")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(f"coefficient of {first}")
            axis.set_ylabel(f"coefficient of {second}", labelpad=0)
    label = "disentanglement error ξ"
    figure.colorbar(image, ax=axes, label=label, shrink=0.8, extend="max")
    _save(figure, path)


def clustered(
    path,
    matrix: np.ndarray,
    panels: Mapping[str, Sequence[Sequence[int]]],
    names: Sequence[str],
    *,
    value: str,
):
    """One matrix over tasks, ordered by clusters in every panel; boxes mark them.

    Args:
      path: the PNG file.
      matrix: `[T, T]`, symmetric; the diagonal is left out of the colour scale.
      panels: title to the clusters of the T tasks; those of one task have no box.
      names: the T tasks.
      value: what the numbers are.
    """
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    low, top = min(0.0, float(others.min())), max(float(others.max()), 1e-6)
    side = max(3.6, 0.13 * len(names) + 1.4)
    size = (1.2 + (side + 0.9) * len(panels), side + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    font = 8 if len(names) < 20 else 5
    for axis, (title, clusters) in zip(axes, panels.items(), strict=True):
        order = [i for members in clusters for i in members]
        image = axis.imshow(matrix[np.ix_(order, order)], vmin=low, vmax=top)
        labels = [names[i] for i in order]
        axis.set_xticks(range(len(order)), labels, rotation=90, fontsize=font)
        axis.set_yticks(range(len(order)), labels, fontsize=font)
        axis.set(title=title, xlabel="task vector", ylabel="task vector")
        first = -0.5
        for members in clusters:
            last = first + len(members)
            if len(members) > 1:
                box = (
                    [first, last, last, first, first],
                    [first, first, last, last] + [first],
                )
                line = {"color": _COLORS[1], "linewidth": 2, "clip_on": False}
                axis.plot(*box, label="cluster", **line)
            first = last
    figure.colorbar(image, ax=list(axes), label=value, shrink=0.8, extend="max")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles[:1], labels[:1], loc="outside lower left")
    _save(figure, path)


def repeated(
    path,
    xs: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, float],
    *,
    x: str,
    y: str,
):
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
        color, marker = _COLORS[i % len(_COLORS)], "os^D"[i % 4]
        axis.plot(
            xs, list(map(np.mean, values)), f"{marker}-", color=color, label=label
        )
        if any(len(found) > 1 for found in values):
            low, high = list(map(min, values)), list(map(max, values))
            axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    for i, (label, value) in enumerate(levels.items(), len(lines)):
        color = _COLORS[i % len(_COLORS)]
        axis.axhline(value, color=color, linestyle="--", label=label)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def landscape(
    path,
    panels: Mapping[str, np.ndarray],
    coefs: tuple[Sequence[float], Sequence[float]],
    points: Mapping[str, tuple[float, float]],
    *,
    x: str,
    y: str,
    value: str = "loss",
):
    """Filled contours on the plane of two task vectors, with models marked on it.

    Every panel has colours of its own, even in rank and not in value: a basin shows
    beside a loss that is many times larger.

    Args:
      path: the PNG file.
      panels: title to grid `[n, m]`; what is not finite is left white.
      coefs: the n coefficients of the first vector, and the m of the second.
      points: label to the coefficients of a model.
      x, y: what the first and the second coefficient are.
      value: what the numbers are.
    """
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        grid = np.ma.masked_invalid(np.asarray(grid, float))
        finite = grid.compressed() if grid.count() else np.zeros(1)
        levels = np.unique(np.quantile(finite, np.linspace(0, 1, 25)))
        if len(levels) < 2:  # of a loss that is flat
            levels = levels[0] + np.array([-0.5, 0.5])
        colors = {"norm": BoundaryNorm(levels, 256), "cmap": "viridis"}
        filled = axis.contourf(*coefs, grid.T, levels=levels, **colors)
        axis.contour(*coefs, grid.T, levels=levels, colors="white", linewidths=0.2)
        for i, (label, point) in enumerate(points.items()):
            marker, color = "o^s*DvPX"[i % 8], _COLORS[i % len(_COLORS)]
            axis.plot(*point, marker, color=color, mec="white", ms=10, label=label)
        axis.set(title=title, xlabel=x)
        figure.colorbar(filled, ax=axis, label=value, shrink=0.9, format="%.3g")
    axes[0].set_ylabel(y)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    _save(figure, path)


def bands(
    path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    interval: str,
):
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
        color, marker = _COLORS[i % len(_COLORS)], "os^D"[i % 4]
        means, halves = np.asarray(means, float), np.asarray(halves, float)
        axis.plot(xs, means, f"{marker}-", color=color, label=label)
        shade = {"color": color, "alpha": 0.2, "linewidth": 0}
        axis.fill_between(xs, means - halves, means + halves, **shade)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend(title=f"shaded: {interval}")
    _save(figure, path)
