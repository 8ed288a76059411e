"""`jaxarith verify`: checks that a merged model is its base plus an adapter."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxarith import lazy, report, stream, tree
from jaxarith.commands import arguments
from jaxarith.commands.merge import flags
from jaxarith.hub import Stored
from jaxarith.report import printable, shown
from jaxarith.stream import names, tying
from jaxarith.stream.inputs import find_base, open_checkpoint, read_config

_DESCRIPTION = """\
Compares every tensor of MERGED with BASE + ADAPTER, computed in float32, and reports
which differ, are missing or are unexpected. The exit status is 0 if all agree, and 1
otherwise.

Numbers agree if they equal the result in float32, rounded once to the dtype of MERGED.
A program that computes in that dtype rounds more often: --roundings 3 allows it to
round the product of the factors, its scale and the sum.

ADAPTER is a PEFT folder or hub id of any kind that `jaxarith merge` reads. It may also
be another model; then MERGED must be equal to that model."""

_EXAMPLES = """\
examples:
  jaxarith verify ./llama ./lora ./llama-merged
  jaxarith verify ./llama ./lora ./peft-merged-bf16 --roundings 3"""

# Allowed rounding of sums of products in float32, relative to what is added.
_SLACK = 2.0**-20
_MOST_ROWS = 20


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    command = commands.add_parser(
        "verify",
        help="check that a model is its base plus an adapter, tensor by tensor",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    command.add_argument("base", metavar="BASE", help="a folder or hub id")
    command.add_argument("adapter", metavar="ADAPTER", help="a folder or hub id")
    command.add_argument("merged", metavar="MERGED", help="a folder or hub id")
    command.add_argument(
        "--roundings",
        type=arguments.count,
        default=1,
        metavar="N",
        help="how often MERGED may have been rounded to its dtype: once for the sum "
        "(the default), and further times for what the adapter adds",
    )
    flags.add_dequantize(
        command, "in bfloat16 if MERGED is in bfloat16, otherwise in float32"
    )
    command.add_argument(
        "--quiet", action="store_true", help="print nothing if all agree"
    )


class Compared(NamedTuple):
    """A tensor of the merged model, compared with the expected one.

    Attributes:
      name: name of the tensor in the base.
      deviation: the largest difference of a number.
      excess: the largest difference, as a multiple of the allowed rounding.
      remark: a remark for the table.
    """

    name: str
    deviation: float
    excess: float
    remark: str = ""


class Verdict(NamedTuple):
    """The result of a comparison.

    Attributes:
      compared: the tensors that both models have.
      missing: names that the merged model lacks.
      unexpected: names that only the merged model has.
    """

    compared: list[Compared]
    missing: list[str]
    unexpected: list[str]

    @property
    def differing(self) -> list[Compared]:
        return [one for one in self.compared if one.excess > 1]

    @property
    def agrees(self) -> bool:
        return not (self.differing or self.missing or self.unexpected)


def _run(args: argparse.Namespace) -> int:
    folder = find_base(args.merged)
    tensors = open_checkpoint(folder).tensors
    dequantize = _dequantized_dtype(tensors) if args.dequantize else None
    opened = stream.open_models(args.base, [args.adapter], dequantize=dequantize)
    config = read_config(opened.folders[0])
    ours, notes = _fitted(opened.base, tensors, config, args.merged)
    if not args.quiet:
        for note in (*opened.notes, *notes):
            print(shown(f"note: {note}"), file=sys.stderr)
    found = [name for name in opened.base if name in ours]
    compared = [
        *tqdm(
            _compared(opened, ours, found, args.roundings),
            total=len(found),
            unit="tensor",
            disable=args.quiet,
        )
    ]
    verdict = Verdict(
        compared,
        missing=_weights(opened.base, opened.base.keys() - ours.keys()),
        unexpected=_weights(ours, ours.keys() - opened.base.keys()),
    )
    if not args.quiet or not verdict.agrees:
        print(printable(_told(args, verdict, folder)))
    return int(not verdict.agrees)


def _dequantized_dtype(merged: Mapping[str, Stored]) -> str:
    """Returns the dtype in which `jaxarith merge --dequantize` reads for `merged`."""
    floating = {str(x.dtype) for x in merged.values() if x.is_floating}
    return "bfloat16" if floating == {"bfloat16"} else "float32"


def _fitted(
    base: Mapping[str, Stored],
    merged: Mapping[str, Stored],
    config: Mapping[str, Any],
    label: str,
) -> tuple[dict[str, Stored], list[str]]:
    """Returns the merged tensors by the base's names; tied ones as in the base."""
    of_base, notes = names.match(base, merged, label)
    ours = {of_base[name]: tensor for name, tensor in merged.items()}
    tied = tying.pair(base, config)
    if tied is not None:
        for name, other in (tied, tied[::-1]):
            if name in base and name not in ours and other in ours:
                ours[name] = ours[other]
                notes.append(f"{label}: {name} is tied to {other}")
        if tied.head in ours and tied.head not in base:
            copy, embedding = ours.pop(tied.head), ours.get(tied.embedding)
            if embedding is None or not _equal(copy, embedding):
                ours[tied.head] = copy
    return ours, notes


def _equal(one, other):
    return one.shape == other.shape and np.array_equal(one.read(), other.read())


def _weights(tensors: Mapping[str, Stored], found: set[str]) -> list[str]:
    """Returns the names that are not buffers."""
    return sorted(name for name in found if not names.is_buffer(name, tensors[name]))


def _compared(
    opened: stream.Opened, ours: Mapping[str, Stored], found: list[str], roundings: int
) -> Iterator[Compared]:
    [tau] = opened.taus
    for name in found:
        leaf, actual = opened.base[name], ours[name]
        if actual.shape != leaf.shape:
            remark = f"{actual} in place of {leaf}"
            yield Compared(name, np.inf, np.inf, remark)
        elif not (leaf.is_floating and actual.is_floating):
            same = _equal(leaf, actual)
            remark = "" if same else "not weights, and different from the base's"
            yield Compared(name, 0.0, 0.0 if same else np.inf, remark)
        else:
            yield _of_weights(name, leaf, tau.get(name), actual, roundings)


def _of_weights(
    name: str,
    leaf: Stored,
    moved: lazy.Leaf | None,
    actual: Stored,
    roundings: int,
) -> Compared:
    base = leaf.read().astype(np.float32)
    delta = None if moved is None else np.asarray(jnp.asarray(moved), np.float32)
    expected = base if delta is None else base + delta
    given = actual.read().astype(np.float32)
    exact = _eps(np.float32)
    half = max(_eps(actual.dtype), exact) / 2
    # Half a unit in the last place; eps is the unit for numbers from 1 to 2.
    units = np.ldexp(np.float32(half), np.frexp(expected)[1] - 1)
    allowed = np.where(expected == 0, np.float32(0), units)
    if delta is not None:
        size = np.abs(delta)
        allowed += half * (roundings - 1) * size + _SLACK * (size + size.max(initial=0))
        allowed += 4 * exact * np.abs(base)  # DoRA scales the whole sum
    allowed += float(jnp.finfo(actual.dtype).smallest_subnormal)
    difference = np.where(np.isfinite(given), np.abs(given - expected), np.inf)
    with np.errstate(over="ignore"):  # a base of zero allows no rounding: infinite
        excess = float(np.max(difference / allowed, initial=0))
    remark = ""
    if excess > 1 and delta is not None and np.any(delta):
        is_base = np.array_equal(given, base.astype(actual.dtype).astype(np.float32))
        remark = "the base's: nothing was added" if is_base else ""
    return Compared(name, float(np.max(difference, initial=0)), excess, remark)


def _eps(dtype):
    return float(jnp.finfo(dtype).eps)


def _told(args: argparse.Namespace, verdict: Verdict, folder: Path) -> str:
    differing = sorted(verdict.differing, key=lambda one: -one.excess)
    lines = []
    if differing:
        rows = [
            [one.name, f"{one.deviation:.3g}", f"{one.excess:.3g}", one.remark]
            for one in differing[:_MOST_ROWS]
        ]
        header = ["tensor", "largest deviation", "times its rounding", ""]
        right = [False, True, True, False]
        lines.append(report.markdown_table(header, rows, right=right))
        if len(differing) > _MOST_ROWS:
            lines.append(f"(and {len(differing) - _MOST_ROWS} more)")
    for what, found in (
        ("missing", verdict.missing),
        ("unexpected", verdict.unexpected),
    ):
        if found:
            lines.append(f"{what} ({len(found)}): {report.listed(found)}")
    count = len(verdict.compared)
    agreeing = count - len(differing)
    lines.append(
        f"{agreeing} of {tree.counted(count, 'tensor agrees', 'tensors agree')}"
    )
    close = [one for one in verdict.compared if one.excess <= 1]
    if close:
        worst = max(close, key=lambda one: one.excess)
        lines[-1] += (
            f"; of these the largest deviation is {worst.deviation:.3g}, "
            f"{worst.excess:.2f} of its rounding, in {worst.name}"
        )
    is_sum = "is" if verdict.agrees else "is NOT"
    lines.append(f"{folder} {is_sum} {args.base} + {args.adapter}")
    return "\n".join(lines)
