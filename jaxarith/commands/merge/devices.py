"""Sets the devices and the number of threads of a merge."""

import contextlib
import os
from collections.abc import Iterator

import jax
import threadpoolctl

from jaxarith import resources

# XLA and BLAS read their number of threads from these variables when they start.
_VARIABLES = ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def computing_on(kind: str | None) -> Iterator[None]:
    """Computes on the process's devices of one kind, in all threads.

    Leaves are spread over them; everything else is computed on the first. None means
    the one device that JAX uses by default.

    Raises:
      ValueError: the process has no device of this kind.
    """
    if kind is None:
        yield
        return
    try:
        devices = jax.local_devices(backend=kind)
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX finds no {kind} here; it finds {found}.") from error
    # pyright does not see JAX's options, which are defined at run time.
    before = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_device", devices[0])
    try:
        with resources.used(devices=devices):
            yield
    finally:
        jax.config.update("jax_default_device", before)


@contextlib.contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Reads and computes with at most `count` threads of each kind; None sets no limit.

    XLA reads its number when JAX begins to compute in this process. If it has begun,
    that number stays.
    """
    if count is None:
        yield
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)))
    try:
        # BLAS libraries that are already loaded do not read the variables again.
        with resources.used(threads=count), threadpoolctl.threadpool_limits(count):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
