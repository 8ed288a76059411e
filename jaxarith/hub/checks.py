"""Checks that tensors which are read or written hold finite numbers."""

from collections.abc import Mapping

import numpy as np

from jaxarith import tree
from jaxarith.hub.stored import NUMERIC, Stored, short


def check_numeric(tensors: Mapping[str, Stored | np.ndarray]) -> None:
    """Raises a ValueError unless all tensors are arrays of numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMERIC:
            raise ValueError(
                f"{name} has the dtype {short(tensor.dtype)}; expected an array of "
                "numbers."
            )


def check_finite(leaves: Mapping[str, np.ndarray], place: str) -> None:
    """Raises a ValueError with the names of arrays that hold NaN or infinity."""
    bad = {name: int((~np.isfinite(leaf)).sum()) for name, leaf in leaves.items()}
    bad = [f"{name} ({n} of {leaves[name].size})" for name, n in bad.items() if n]
    if bad:
        raise ValueError(
            f"{place} has NaN or infinite values in {', '.join(tree.first_few(bad))}."
        )
