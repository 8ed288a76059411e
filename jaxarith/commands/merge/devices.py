"""Where a merge computes."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def computing_on(kind: str | None) -> Iterator[None]:
    """Computes on the first device of a kind, in all threads."""
    if kind is None:
        yield
        return
    try:
        device = jax.devices(kind)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX finds no {kind} here; it finds {found}.") from error
    # JAX defines its options at run time.
    before = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)
