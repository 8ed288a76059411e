"""Where a merge computes, and with how many threads."""

import contextlib
import os
from collections.abc import Iterator

import jax
import threadpoolctl

from jaxarith import resources

# What XLA and BLAS ask for the number of their threads when they begin.
_VARIABLES = ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def computing_on(kind: str | None) -> Iterator[None]:
    """Computes on the devices of a kind that this process has, in all threads.

    Leaves are spread over them; all else is computed on the first. None is where JAX
    computes by default, on one device.

    Raises:
      ValueError: there is none of the kind.
    """
    if kind is None:
        yield
        return
    try:
        devices = jax.local_devices(backend=kind)
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX finds no {kind} here; it finds {found}.") from error
    # JAX defines its options at run time.
    before = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_device", devices[0])
    try:
        with resources.used(devices=devices):
            yield
    finally:
        jax.config.update("jax_default_device", before)


@contextlib.contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Reads and computes with at most so many threads of a kind; None limits none.

    XLA's are counted when JAX begins to compute in this process, and stay as they are
    where it has begun.
    """
    if count is None:
        yield
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)))
    try:
        # BLAS libraries that are loaded already have asked.
        with resources.used(threads=count), threadpoolctl.threadpool_limits(count):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
