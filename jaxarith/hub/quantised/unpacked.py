"""The weights that the reader of a format finds in a checkpoint."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxarith.hub.stored import Stored, described


class Unpacked(NamedTuple):
    """The weights that one format holds in a checkpoint.

    Attributes:
      weights: by name, tensors that are unpacked when they are read.
      parts: names of the tensors that they are computed from.
    """

    weights: dict[str, Stored]
    parts: set[str]


def expect(
    name: str, part: Stored, shape: Sequence[int], dtype: DTypeLike | None = None
) -> None:
    """Raises a ValueError unless a part of a weight has this shape and dtype.

    With another shape it might be unpacked to wrong numbers, without an error.
    """
    dtype = part.dtype if dtype is None else np.dtype(dtype)
    if part.shape != tuple(shape) or part.dtype != dtype:
        raise ValueError(f"{name} is {part}; expected {described(dtype, shape)}.")
