"""One picture of a whole study: ξ maps and ranked merges side by side."""

import os
from collections.abc import Mapping

import numpy as np

from jaxarith.plots import style
from jaxarith.plots.bars import ranked_on
from jaxarith.plots.grids import xi_on
from jaxarith.typing import Numbers


@style.look
def overview(
    path: str | os.PathLike,
    panels: Mapping[str, np.ndarray],
    coefs: Numbers,
    tasks: tuple[str, str],
    values: Mapping[str, float],
    ticks: Mapping[str, float],
    *,
    x: str,
    tick: str,
) -> style.Picture:
    """ξ heat maps of a pair of tasks, and beside them one bar for every method.

    Args:
      path: the PNG file.
      panels: title to grid `[n, n]`: rows are the coefficient of the first task.
      coefs: the n coefficients, evenly spaced.
      tasks: the pair.
      values: method to the length of its bar; the largest stands on top.
      ticks: method to a second value, marked by a stroke.
      x: what the bars are.
      tick: what the strokes are.
    """
    wide = 1.2 + 1.6 * len(panels)
    figure = style.figure(wide + 4.3, 3.1)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(wide, 4.3))[0]
    axes = left.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    images = []
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        images.append(xi_on(axis, grid, coefs, (0.0, 1.0), 1.0))
        axis.set(
            title=title.replace(" + ", "\n+ "), xlabel=f"coefficient of\n{tasks[0]}"
        )
    axes[0].set_ylabel(f"coefficient of\n{tasks[1]}")
    bar = {"label": "disentanglement error ξ", "shrink": 0.75, "extend": "max"}
    left.colorbar(images[-1], ax=list(axes), **bar)
    ranked_on(right.subplots(), values, x=x, ticks=ticks, tick=tick)
    return style.save(figure, path)
