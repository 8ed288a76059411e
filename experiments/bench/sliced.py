"""Sums between devices of which every device reads nothing but a part.

XLA's compilers for accelerators turn such a sum into a reduce-scatter, which sends half
as much. The compiler for CPUs does not.
"""

import math
import re
from collections.abc import Mapping, Sequence

RESULT = re.compile(r"^ +(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def sizes(shape: str) -> list[int]:
    """Bytes of every array of a shape.

    Example:
      >>> sizes("(f32[2,3]{1,0}, bf16[])")
      [24, 2]
    """
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/| ", "", shape)
    return [
        int(bits or 8) * math.prod(int(size) for size in found.split(",") if size) // 8
        for bits, found in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shape)
    ]


def bytes_of_parts(
    computations: Mapping[str, Sequence[str]], name: str, line: str, devices: int
) -> int:
    """Bytes of the arrays of a sum of which a device reads a `devices`-th part alone.

    Args:
      computations: lines of every computation of a program.
      name: the computation that the sum is in.
      line: the line of the sum, of one or several arrays.
      devices: how many devices take part in the sum.
    """
    match = RESULT.match(line)
    if match is None:
        return 0
    result, shape, _, _ = match.groups()
    of = sizes(shape)
    if not shape.startswith("("):
        return of[0] if _only_part(computations, name, result, of[0] // devices) else 0
    total = 0
    for user, _, opcode, rest in _users(computations, name, result):
        index = re.search(r"index=(\d+)", rest)
        if opcode != "get-tuple-element" or index is None:
            return 0
        size = of[int(index[1])]
        if _only_part(computations, name, user, size // devices):
            total += size
    return total


def _only_part(computations, name, value, size) -> bool:
    """Whether all that reads a value reads a slice of so many bytes."""
    users = _users(computations, name, value)
    return bool(users) and all(
        _reads_part(computations, name, value, size, *user) for user in users
    )


def _reads_part(computations, name, value, size, user, shape, opcode, rest) -> bool:
    if opcode == "dynamic-slice":
        return sizes(shape) == [size]
    if opcode in ("bitcast", "reshape", "copy", "transpose"):
        return _only_part(computations, name, user, size)
    called = re.search(r"calls=%([\w.\-]+)", rest)
    if opcode != "fusion" or called is None:
        return False
    operands = re.findall(r"%[\w.\-]+", rest.split(")")[0])
    places = [i for i, operand in enumerate(operands) if operand == value]
    parameters = [
        inner[1]
        for line in computations[called[1]]
        if (inner := RESULT.match(line))
        and inner[3] == "parameter"
        and int(inner[4].split(")")[0]) in places
    ]
    return all(_only_part(computations, called[1], p, size) for p in parameters)


def _users(computations, name, value):
    """Result, shape, opcode and the rest of every line that reads a value."""
    reads = re.compile(re.escape(value) + r"(?![\w.\-])")
    found = (RESULT.match(line) for line in computations[name] if value in line)
    return [
        match.groups()
        for match in found
        if match and reads.search(match[4].split(")")[0])
    ]
