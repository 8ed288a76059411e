"""Keeps the programs that XLA has compiled for the next run of a script.

They are in the user's cache, under a folder for each kind of processor and version of
JAX: a program for one processor may hold instructions that another lacks. JAX's own
settings come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and
`JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
"""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

LARGEST = 2 * 2**30  # bytes; the programs that were not used for longest go first


def keep() -> Path | None:
    """Keeps programs that take a second or more to compile; returns the folder.

    Returns None if the user has chosen a folder, or if none can be made.
    """
    # JAX defines its options at run time.
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None:
        return None
    folder = _cache() / "jaxarith" / "compiled" / f"{jax.__version__}-{processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def processor() -> str:
    """A name of the processor and its instructions.

    Example:
      >>> processor() == processor()
      True
    """
    lines = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = sorted({x for x in text.splitlines() if x.startswith(wanted)})
    known = "\n".join([platform.machine(), platform.processor(), *lines])
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
