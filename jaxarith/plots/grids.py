"""Matrices, heat maps and contours as PNG files."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.image import AxesImage

from jaxarith.plots import style
from jaxarith.typing import Numbers


@style.look
def matrices(
    path: str | os.PathLike,
    panels: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    rows: str,
    columns: str,
    value: str,
    digits: int = 2,
) -> style.Picture:
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
    figure = style.figure(2.2 + 3.2 * len(panels), 4.4)
    axes, images = figure.subplots(1, len(panels), squeeze=False)[0], []
    for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
        images.append(axis.imshow(matrix, vmin=low, vmax=top, cmap=style.SEQUENTIAL))
        axis.set(title=title, xlabel=columns)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        for (i, j), number in np.ndenumerate(matrix):
            color = "white" if number > low + 0.6 * (top - low) else "black"
            text = f"{number:.{digits}f}"
            axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axes[0].set_ylabel(rows)
    figure.colorbar(images[-1], ax=list(axes), label=value, shrink=0.8)
    return style.save(figure, path)


@style.look
def clustered(
    path: str | os.PathLike,
    matrix: np.ndarray,
    panels: Mapping[str, Sequence[Sequence[int]]],
    names: Sequence[str],
    *,
    value: str,
    box: str = "cluster",
) -> style.Picture:
    """One matrix over tasks, ordered by clusters in every panel; boxes mark them.

    Args:
      path: the PNG file.
      matrix: `[T, T]`, symmetric; the diagonal is left out of the colour scale.
      panels: title to the clusters of the T tasks; those of one task have no box.
      names: the T tasks.
      value: what the numbers are.
      box: what a box marks.
    """
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    low, top = min(0.0, float(others.min())), max(float(others.max()), 1e-6)
    side = max(3.6, 0.13 * len(names) + 1.4)
    size = (1.2 + (side + 0.9) * len(panels), side + 0.6)
    figure = style.figure(*size)
    axes, images = figure.subplots(1, len(panels), squeeze=False)[0], []
    font = 8 if len(names) < 20 else 5
    for axis, (title, clusters) in zip(axes, panels.items(), strict=True):
        order = [i for members in clusters for i in members]
        ordered = matrix[np.ix_(order, order)]
        images.append(axis.imshow(ordered, vmin=low, vmax=top, cmap=style.SEQUENTIAL))
        labels = [names[i] for i in order]
        axis.set_xticks(range(len(order)), labels, rotation=90, fontsize=font)
        axis.set_yticks(range(len(order)), labels, fontsize=font)
        axis.set(title=title, xlabel="task vector", ylabel="task vector")
        first = -0.5
        for members in clusters:
            last = first + len(members)
            if len(members) > 1:
                corners = (
                    [first, last, last, first, first],
                    [first, first, last, last] + [first],
                )
                line = {"color": style.MARK, "linewidth": 2, "clip_on": False}
                line["path_effects"] = style.outlined(3.5)
                axis.plot(*corners, label=box, **line)
            first = last
    figure.colorbar(images[-1], ax=list(axes), label=value, shrink=0.8, extend="max")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles[:1], labels[:1], loc="outside lower left")
    return style.save(figure, path)


@style.look
def disentanglement(
    path: str | os.PathLike,
    panels: Mapping[str, np.ndarray],
    coefs: Numbers,
    tasks: tuple[str, str],
    *,
    searched: tuple[float, float] = (0.0, 1.0),
    # ξ reaches 2; the papers' scale ends at 1, where half of all labels differ.
    scales: Sequence[tuple[str, float]] = (("disentanglement error ξ", 1.0),),
) -> style.Picture:
    """ξ heat maps side by side; a box marks the range that a search covers.

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
    figure = style.figure(*size)
    shape = (len(panels), len(scales), len(coefs), len(coefs))
    grids = np.reshape(list(panels.values()), shape)
    axes = figure.subplots(len(scales), len(panels), squeeze=False)
    for i, (label, top) in enumerate(scales):
        images = [
            xi_on(axis, grid, coefs, searched, top)
            for axis, grid in zip(axes[i], grids[:, i], strict=True)
        ]
        axes[i, 0].set_ylabel(f"coefficient of {tasks[1]}")
        bar = {"ax": list(axes[i]), "label": label, "shrink": 0.9, "extend": "max"}
        figure.colorbar(images[-1], **bar)
    for top, bottom, title in zip(axes[0], axes[-1], panels, strict=True):
        top.set_title(title)
        bottom.set_xlabel(f"coefficient of {tasks[0]}")
    return style.save(figure, path)


@style.look
def disentanglement_of_pairs(
    path: str | os.PathLike,
    rows: Sequence[Sequence[tuple[str, np.ndarray]]],
    coefs: Numbers,
    tasks: Sequence[tuple[str, str]],
    *,
    searched: tuple[float, float] = (0.0, 1.0),
) -> style.Picture:
    """ξ heat maps of several pairs of tasks, a column for each pair.

    A box marks the range that a search covers, a cross the pre-trained model.

    Args:
      path: the PNG file.
      rows: for each row and column a title and a grid `[n, n]`, whose rows are the
        coefficient of the pair's first task.
      coefs: the n coefficients, evenly spaced.
      tasks: the pair of each column.
      searched: the coefficients inside the box.
    """
    size = (1.2 + 3.1 * len(tasks), 0.2 + 3.1 * len(rows))
    figure = style.figure(*size)
    axes, images = figure.subplots(len(rows), len(tasks), squeeze=False), []
    for row, cells in zip(axes, rows, strict=True):
        for axis, (title, grid), (first, second) in zip(row, cells, tasks, strict=True):
            # Up to 1, as in `disentanglement`.
            images.append(xi_on(axis, grid, coefs, searched, top=1))
            axis.plot(0, 0, "x", color=style.MARK, path_effects=style.outlined())
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(f"coefficient of {first}")
            axis.set_ylabel(f"coefficient of {second}", labelpad=0)
    label = "disentanglement error ξ"
    figure.colorbar(images[-1], ax=axes, label=label, shrink=0.8, extend="max")
    return style.save(figure, path)


def xi_on(
    axis: Axes,
    grid: np.ndarray,
    coefs: Numbers,
    searched: tuple[float, float],
    top: float,
) -> AxesImage:
    """Draws ξ `[n, n]` on these axes, with a box around what a search covers."""
    coefs = np.asarray(coefs)
    half = (coefs[1] - coefs[0]) / 2
    image = axis.imshow(
        np.transpose(grid),
        origin="lower",
        extent=(coefs[0] - half, coefs[-1] + half) * 2,
        vmin=0,
        vmax=top,
        cmap=style.SEQUENTIAL,
    )
    low, high = searched
    box = [low, high, high, low, low], [low, low, high, high, low]
    axis.plot(*box, color=style.MARK, linewidth=1.5, path_effects=style.outlined(3))
    return image


@style.look
def landscape(
    path: str | os.PathLike,
    panels: Mapping[str, np.ndarray],
    coefs: tuple[Sequence[float], Sequence[float]],
    points: Mapping[str, tuple[float, float]],
    *,
    x: str,
    y: str,
    value: str = "loss",
) -> style.Picture:
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
    figure = style.figure(1.2 + 4.4 * len(panels), 4.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    looks = style.styles(points)
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        grid = np.ma.masked_invalid(np.asarray(grid, float))
        finite = grid.compressed() if grid.count() else np.zeros(1)
        levels = np.unique(np.quantile(finite, np.linspace(0, 1, 25)))
        if len(levels) < 2:  # of a loss that is flat
            levels = levels[0] + np.array([-0.5, 0.5])
        colors = {"norm": BoundaryNorm(levels, 256), "cmap": style.LEVELS}
        filled = axis.contourf(*coefs, grid.T, levels=levels, **colors)
        axis.contour(*coefs, grid.T, levels=levels, colors="white", linewidths=0.2)
        for label, point in points.items():
            own = style.line(looks[label]) | {"linestyle": "", "markersize": 11}
            own |= {"markeredgewidth": 1.2, "clip_on": False}
            axis.plot(*point, label=label, **own)
        axis.set(title=title, xlabel=x)
        figure.colorbar(filled, ax=axis, label=value, shrink=0.9, format="%.3g")
    axes[0].set_ylabel(y)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return style.save(figure, path)
