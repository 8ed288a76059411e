"""Seconds, memory, the machine they were measured on, and the report of them."""

import contextlib
import ctypes
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from jaxarith import report

K = TypeVar("K")
# Of the minute before this process did anything.
LOAD = round(os.getloadavg()[0], 2)
OTHERS = "cores busy with other processes"


def seconds(function: Callable) -> float:
    """Of one call, to the end of what it starts on a device of JAX."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternated(
    functions: Mapping[K, Callable], repetitions: int, tick: Callable = lambda: None
) -> dict[K, list[float]]:
    """Seconds of every function, run in turn: A B A B. Each is called once before.

    Args:
      functions: the functions by name, without arguments.
      repetitions: runs of each that count.
      tick: called after every run, for a progress bar.
    """
    times: dict[K, list[float]] = {name: [] for name in functions}
    for repetition in range(1 + repetitions):
        for name, function in functions.items():
            took = seconds(function)
            if repetition:
                times[name].append(took)
            tick()
    return times


def peak_memory(function: Callable) -> tuple[float, int, int]:
    """What a call needs at most above what is resident before it (Linux).

    Returns:
      Its seconds, the bytes, and how many of them the result holds.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    took, peak = time.perf_counter() - start, _status("VmHWM") - before
    return took, peak, sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def goal(what: str, reached: float, limit: float, *, least: bool = True) -> dict:
    """A row of a table of goals; the limit is the `least` that is wanted, or the most.

    Example:
      >>> goal("merge: seconds", 3.0, 5.0, least=False)["met"]
      True
    """
    met = reached >= limit if least else reached <= limit
    return {"goal": what, "reached": reached, "limit": limit, "met": bool(met)}


def table(rows: Sequence[Mapping], names: Sequence[str] = ()) -> str:
    """Rows of the same fields as a Markdown table; without any, `names` alone."""
    return report.markdown_table(names or list(rows[0]), [[*r.values()] for r in rows])


def named(values: Mapping) -> str:
    """Values with their names, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def write(out: Path | None, title: str, parts: Sequence[str], results: dict) -> dict:
    """Prints a report; where there is a folder, writes report.json and report.md.

    A machine that was not quiet is named at the end.

    Args:
      out: the folder.
      title: title of report.md; none if it is empty.
      parts: paragraphs and tables.
      results: plain data.

    Returns:
      The results, which report.json holds.
    """
    parts = [*parts, *(unquiet(results["machine"]) if "machine" in results else ())]
    text, head = "\n\n".join(parts), f"# {title}\n\n" if title else ""
    print(f"\n{text}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report.write_json(out / "report.json", results)
        report.write_text(out / "report.md", f"{head}{text}\n")
    return results


def machine() -> dict:
    """What the measured times depend on; "load" is that before this process began."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": LOAD,
        "devices": [device.device_kind for device in jax.devices()],
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


@contextlib.contextmanager
def watched() -> Iterator[dict]:
    """Adds to a dict how many cores other processes kept busy meanwhile (Linux).

    Example:
      >>> with watched() as others:
      ...     _ = sum(range(10**6))
      >>> set(others) <= {"cores busy with other processes"}
      True
    """
    found: dict = {}
    begin, busy, own = time.perf_counter(), _busy(), _own()
    yield found
    took, after = time.perf_counter() - begin, _busy()
    if busy is not None and after is not None and took:
        others = (after - busy - (_own() - own)) / took
        found[OTHERS] = max(round(others, 2), 0.0)


def _busy() -> float | None:
    """Seconds that all cores have worked, for whichever process."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, stat.read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    return sum(os.times()[:4])


def unquiet(machine: Mapping) -> list[str]:
    """What a reader of the times must know of the machine, as paragraphs.

    Args:
      machine: what `machine` returned, and what `watched` added.

    Example:
      >>> unquiet({"load": 0.1, "cores": 2})
      []
    """
    cores = machine["cores"] or 1
    before, meanwhile = machine["load"], machine.get(OTHERS, 0.0)
    if max(before, meanwhile) <= 0.25 * cores:
        return []
    during = f", and {meanwhile} cores were busy with others while rows ran"
    return [
        f"The machine was not quiet: {before} processes ran on its {cores} cores in "
        f"the minute before{during if OTHERS in machine else ''}. Ratios of rows that "
        "run in turn say more than seconds."
    ]
