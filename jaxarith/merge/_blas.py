"""One BLAS thread for matrices so small that several only wait for each other.

XLA factors matrices on CPUs by SciPy's LAPACK, whose BLAS keeps a thread for each core.
They wait for each other, and for the cores that XLA's own threads hold: on 2 cores of
an AMD EPYC with another process at work, the singular value decomposition of a matrix
of 768 by 768 took 5.4 s with two of them and 0.11 s with one.
"""

import contextlib
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import threadpoolctl

_SMALL = 1024  # the shorter side of a matrix


def limited(leaves: Iterable[jax.Array]) -> contextlib.AbstractContextManager:
    """One BLAS thread while small matrices are factored; wait for results inside."""
    shapes = [jnp.shape(leaf) for leaf in leaves]
    sides = [min(shape) for shape in shapes if len(shape) == 2]
    if not sides or max(sides) > _SMALL:
        return contextlib.nullcontext()
    return _controller().limit(limits=1, user_api="blas")


@functools.cache
def _controller():
    import scipy.linalg  # noqa: F401, its BLAS must be loaded to be found

    return threadpoolctl.ThreadpoolController()
