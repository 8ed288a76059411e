"""Agreement between the processes of one computation; one process needs none.

Every process must make these calls, in the same order.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def anywhere(here: bool) -> bool:
    """Whether `here` is true in any process.

    Example:
      >>> anywhere(False), anywhere(True)
      (False, True)
    """
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def on_first(action: Callable[[], None]) -> None:
    """Runs `action` on process 0; the others wait for it, and fail if it fails."""
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    if anywhere(failure is not None):
        raise failure or OSError("process 0 failed. Its message says why.")
