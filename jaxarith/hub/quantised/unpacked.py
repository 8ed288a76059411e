"""What the reader of a format finds in a checkpoint."""

from typing import NamedTuple

from jaxarith.hub.stored import Stored


class Unpacked(NamedTuple):
    """The weights that one format holds in a checkpoint.

    Attributes:
      weights: by name, tensors that are unpacked when they are read.
      parts: names of the tensors that they are computed from.
    """

    weights: dict[str, Stored]
    parts: set[str]
