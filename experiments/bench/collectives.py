"""Reads from the text of a compiled program what it sends between devices."""

import collections
import functools
import math
import re
from typing import NamedTuple

from experiments.bench import sliced


class Collective(NamedTuple):
    """An operation in which devices exchange data.

    Attributes:
      name: name of the operation, such as "all-reduce".
      size: bytes of the whole: of the summed array, or of all gathered parts.
      devices: number of devices that take part in an exchange.
      times: number of times that a step runs it.
    """

    name: str
    size: int
    devices: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, in rings.

        Example:
          >>> [Collective(f"all-{name}", 800, 4).sent for name in ("reduce", "gather")]
          [1200.0, 600.0]
        """
        if self.name == "collective-permute":
            return float(self.times * self.size)
        # The parts go round once to be summed; the parts of the sum go round once more.
        rounds = 2 if self.name == "all-reduce" else 1
        return self.times * rounds * (self.devices - 1) / self.devices * self.size


NAMES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
OPERATION = re.compile(rf" = (.*?) ({NAMES})(-start)?\(")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(
    r"(calls|to_apply|body|condition|(?:true|false|branch|called)_computations?)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CHAIN = re.compile(r'chain_id="(\d+)"')


def collectives(
    text: str, devices: int, *, scattered: bool = False
) -> list[Collective]:
    """Returns the collectives of a compiled program, and how often a step runs each.

    Args:
      text: text of a compiled program, `compiled.as_text()`.
      devices: number of devices that the program is for.
      scattered: whether to count a sum as a reduce-scatter if every device reads only a
        part of it. It is one on an accelerator; the CPU's compiler has none.

    Raises:
      ValueError: a collective is in a loop, and the program does not state the number
        of iterations.
    """
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    chains, found = set(), []
    for computation, line in (
        (name, line) for name, lines in computations.items() for line in lines
    ):
        match = OPERATION.search(line)
        if not match or not runs[computation]:
            continue
        # A TPU moves the data of one collective during several computations, and the
        # program shows the collective in each of them.
        if chain := CHAIN.search(line):
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        shape, name, started = match.groups()
        if math.isinf(runs[computation]):
            raise ValueError(
                f"{name} is in a loop, and the program does not say how often the loop "
                "runs, so the bytes that it moves cannot be counted."
            )
        together, size = _together(line, devices), _bytes(shape, name, bool(started))
        if name == "reduce-scatter":
            size *= together  # the result is one part
        if computation.startswith("all-reduce-scatter"):
            name = "reduce-scatter"  # the form on TPUs: a sum fused with a slice of it
        times = int(runs[computation])
        if scattered and name == "all-reduce" and not started:
            parts = sliced.bytes_of_parts(computations, computation, line, together)
            if parts:
                found.append(Collective("reduce-scatter", parts, together, times))
            size -= parts
            if not size:
                continue
        found.append(Collective(name, size, together, times))
    return found


def _computations(text):
    """Returns the lines of every computation, and the name of the first to run."""
    name = entry = ""
    computations = {name: []}
    for line in text.splitlines():
        if line.startswith(" "):
            computations[name].append(line)
        elif header := COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
    return computations, entry


def _runs(computations, entry) -> dict[str, float]:
    """Returns how often each computation runs; infinity if the program does not say."""
    callers = collections.defaultdict(list)
    for caller, lines in computations.items():
        for line in lines:
            for how, names in CALLED.findall(line):
                times = 1.0
                if how in ("body", "condition"):
                    trips = TRIPS.search(line)
                    times = float(trips[1]) if trips else math.inf
                for name in re.findall(r"[\w.\-]+", names):
                    callers[name].append((caller, times))

    @functools.cache
    def runs(name):
        if name == entry:
            return 1.0
        of_callers = ((runs(caller), times) for caller, times in callers[name])
        return sum(count * times for count, times in of_callers if count)

    return {name: runs(name) for name in computations}


def _bytes(shape: str, name: str, started: bool) -> int:
    """Returns the bytes of a result such as `(f32[2,3]{1,0}, bf16[])`."""
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/| ", "", shape)
    if started and name != "all-reduce":
        shape = _parts(shape[1:-1])[1]  # of operands, results, and others
    return sum(sliced.sizes(shape))


def _parts(tuple_: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    depth, parts = 0, [""]
    for character in tuple_:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _together(line: str, devices: int) -> int:
    """Returns the number of devices in each of an operation's groups."""
    groups = re.search(r"replica_groups=(.*)", line)
    if not groups or groups[1].startswith("{}"):
        return devices
    # mesh['a'=32,'b'=8], device_ids=([8,32]T(1,0)) {'b'}, or a part of it: 'b':(1)4
    if found := re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", groups[1]):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.match(r"\[\d+,(\d+)\]<=", groups[1]):
        return int(found[1])
    if found := re.match(r"\{\{([\d,]+)\}", groups[1]):
        return len(found[1].split(","))
    raise ValueError(f"groups of devices in a form that is not known: {groups[1]}.")
