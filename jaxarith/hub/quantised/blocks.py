"""Finds the blocks of numbers that share a scale."""

from collections.abc import Iterable, Sequence

import numpy as np


def size(
    name: str,
    scales: Sequence[int],
    shape: Sequence[int],
    stated: Iterable[tuple[int, int]],
) -> tuple[int, int]:
    """Returns the rows and columns of the blocks of a matrix or a stack of matrices.

    The number of scales is not enough: 192 rows with 2 scales are blocks of 128 and 64
    rows, and not two blocks of 96.

    Args:
      name: name of the weight, for errors.
      scales: shape of the scales.
      shape: shape of the weights.
      stated: the sizes that the configuration names.

    Raises:
      ValueError: the scales fit none of the sizes, or more than one.
    """
    *lead, rows, columns = shape
    grid = tuple(scales[len(lead) :])
    grid = grid if len(grid) == 2 else (*grid, *(1, 1)[len(grid) :])
    stacked = list(scales[: len(lead)]) == lead
    if stacked and grid == (1, 1):
        return rows, columns
    if stacked and grid == (rows, 1):
        return 1, columns
    fitting = {
        (high, wide)
        for high, wide in stated
        if stacked and grid == (-(-rows // high), -(-columns // wide))
    }
    if len(fitting) != 1:
        known = " or ".join(f"{a} x {b}" for a, b in sorted({*stated}))
        raise ValueError(
            f"{name}: the scales {list(scales)} of {list(shape)} fit "
            f"{'several' if fitting else 'none'} of the blocks that config.json "
            f"states ({known or 'none'}). Correct its quantization_config."
        )
    return fitting.pop()


def spread(
    scales: np.ndarray, block: tuple[int, int], shape: Sequence[int]
) -> np.ndarray:
    """Returns the scale of every number; blocks at the edges may be partial.

    Args:
      scales: `[..., block rows, block columns]`, or fewer axes.
      block: rows and columns of a block.
      shape: shape of the numbers.
    """
    rows, columns = shape[-2:]
    lead = tuple(shape[:-2])
    scales = scales.reshape(*lead, -(-rows // block[0]), -(-columns // block[1]))
    scales = np.repeat(scales, block[0], axis=-2)[..., :rows, :]
    return np.repeat(scales, block[1], axis=-1)[..., :columns]
