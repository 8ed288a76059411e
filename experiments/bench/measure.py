"""Measures seconds and memory, describes the machine, and writes reports."""

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
# The load in the minute before this process did anything.
LOAD = round(os.getloadavg()[0], 2)
OTHERS = "cores busy with other processes"


def seconds(function: Callable) -> float:
    """Returns the seconds of one call, including what it starts on JAX devices."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternated(
    functions: Mapping[K, Callable], repetitions: int, tick: Callable = lambda: None
) -> dict[K, list[float]]:
    """Returns seconds of functions that run in turn: A B A B.

    Each function is first called once without being timed.

    Args:
      functions: the functions by name, without arguments.
      repetitions: number of timed runs of each function.
      tick: function called after every run, for a progress bar.
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
    """Measures the peak memory of a call, above the memory resident before it (Linux).

    Returns:
      The seconds of the call, the bytes, and how many of them the result holds.
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
    """Returns the processor's name, if the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def goal(what: str, reached: float, limit: float, *, least: bool = True) -> dict:
    """Makes a row of a table of goals; `least` tells a lower limit from an upper one.

    Example:
      >>> goal("merge: seconds", 3.0, 5.0, least=False)["met"]
      True
    """
    met = reached >= limit if least else reached <= limit
    return {"goal": what, "reached": reached, "limit": limit, "met": bool(met)}


def table(rows: Sequence[Mapping], names: Sequence[str] = ()) -> str:
    """Returns rows of the same fields as a Markdown table; if empty, only `names`."""
    return report.markdown_table(names or list(rows[0]), [[*r.values()] for r in rows])


def named(values: Mapping) -> str:
    """Returns values with their names, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def write(out: Path | None, title: str, parts: Sequence[str], results: dict) -> dict:
    """Prints a report; if a folder is given, writes report.json and report.md.

    The report ends with a note if the machine was not quiet.

    Args:
      out: the folder, or None.
      title: title of report.md; empty for no title.
      parts: paragraphs and tables.
      results: the content of report.json, plain data.

    Returns:
      `results`.
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
    """Returns what measured times depend on; "load" is from before this process."""
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
    """Adds to a dict how many cores other processes keep busy meanwhile (Linux).

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
    """Returns the seconds that all cores have worked, for any process."""
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
    """Returns paragraphs on what a reader of the times must know about the machine.

    Args:
      machine: the result of `machine`, and the entry that `watched` adds.

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
