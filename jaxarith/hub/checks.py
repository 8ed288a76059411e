"""Checks of tensors that are read or written: numbers, finite, not quantised."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxarith import tree
from jaxarith.hub.stored import NUMERIC, Stored, short


def check_numeric(tensors: Mapping[str, Stored | np.ndarray]) -> None:
    """Raises a ValueError unless all tensors are arrays of numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMERIC:
            raise ValueError(
                f"{name} is of type {short(tensor.dtype)}; expected an array of "
                "numbers."
            )


def check_mergeable(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Raises a ValueError if a checkpoint holds quantised tensors.

    Args:
      file: the file that holds or lists the tensors.
      tensors: the tensors by name.
    """
    packed = [name for name in sorted(tensors) if tensors[name].dtype not in NUMERIC]
    if packed:
        raise ValueError(
            f"{file} has {len(packed)} tensors of a type that cannot be merged, such "
            f"as {packed[0]} of {short(tensors[packed[0]].dtype)}. Quantised models "
            "must be converted to a floating-point type first."
        )


def check_finite(leaves: Mapping[str, np.ndarray], place: str) -> None:
    """Raises a ValueError with the names of arrays that hold NaN or infinity."""
    bad = {name: int((~np.isfinite(leaf)).sum()) for name, leaf in leaves.items()}
    bad = [f"{name} ({n} of {leaves[name].size})" for name, n in bad.items() if n]
    if bad:
        raise ValueError(
            f"{place} has NaN or infinite values in {', '.join(tree.first_few(bad))}."
        )
