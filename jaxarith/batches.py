"""Batches: dicts of arrays `[B, ...]`, and their fields by name.

Training, `evaluate` and `tau_jp.matrix` take the same batches. The field `mask`,
`bool[B]`, is False for rows that only fill the batch; without it every row counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxarith.typing import Array


def check_dict(value: Any, what: str) -> None:
    """Raises a ValueError unless a sample or batch is a dict of arrays.

    Args:
      value: the sample or batch.
      what: its name in the error, for example "sample".
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"a {what} is a {type(value).__name__}; expected a dict of arrays. "
            'Write {"image": x, "label": y}, with the names in `inputs` and those that '
            "the loss reads."
        )


def fields_of(batch: Any, names: Sequence[str], what: str = "batch") -> tuple:
    """Returns the fields of a batch, or of a sample, in the order of `names`.

    Args:
      batch: a dict of arrays.
      names: names of the fields, often the argument `inputs` of the caller.
      what: name of the batch in error messages.

    Raises:
      ValueError: the batch is not a dict, or a field is missing.

    Example:
      >>> fields_of({"x": [1, 2], "y": [3, 4]}, ["y"])
      ([3, 4],)
    """
    check_dict(batch, what)
    if missing := [name for name in names if name not in batch]:
        raise ValueError(
            f"a {what} has no field {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, batch))}. Rename the field, or name the fields that "
            'the model takes, in their order: inputs=("x",).'
        )
    return tuple(batch[name] for name in names)


def mask_of(batch: Any) -> np.ndarray:
    """Returns which rows of a batch count, `bool[B]`.

    That is its field `mask`. Without this field every row counts.

    Raises:
      ValueError: the batch is not a dict, or the mask has another length.

    Example:
      >>> print(mask_of({"x": np.ones(2)}), mask_of({"x": np.ones(2), "mask": [1, 0]}))
      [ True  True] [ True False]
    """
    check_dict(batch, "batch")
    rows: list[Array] = jax.tree.leaves({k: v for k, v in batch.items() if k != "mask"})
    size = np.shape(rows[0])[0] if rows else 0
    if "mask" not in batch:
        return np.ones(size, bool)
    # NumPy would take integers for indices.
    found = np.asarray(batch["mask"], bool)
    if found.shape != (size,):
        raise ValueError(
            f"the mask of a batch has shape {list(found.shape)}; expected [{size}], "
            "one entry for each row of the batch."
        )
    return found
