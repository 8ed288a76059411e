"""Tables and figures of `scaling`, and the point where communication begins to bind."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxarith import plots, report


class Chip(NamedTuple):
    """A chip, with the rates that its maker publishes.

    Attributes:
      name: the chip and what connects it to others.
      flops: operations of dense products in bfloat16, per second.
      sends: bytes that one chip can send per second.
    """

    name: str
    flops: float
    sends: float


# From Google's page on the TPU v5e and NVIDIA's data sheet of the H100.
CHIPS = (
    Chip("TPU v5e, interconnect of 1600 Gbit/s", 197e12, 200e9),
    Chip("H100 SXM, NVLink of 450 GB/s each way", 989e12, 450e9),
    Chip("H100 SXM, network of 400 Gbit/s", 989e12, 50e9),
)


def binding_batch(row: dict, chip: Chip) -> float:
    """Returns the samples per device below which sending takes longer than computing.

    Assumes that FLOPs grow with the batch, as all but the optimizer's do, and that
    nothing is sent while a chip computes.
    """
    sending = row["scattered_bytes"] / chip.sends
    computing = row["flops"] / row["batch_per_device"] / chip.flops
    return sending / computing


def limits(rows: Sequence[dict]) -> list[dict]:
    """Returns the binding batches of the meshes with the most devices, at least two."""
    most = max(row["devices"] for row in rows)
    return [
        {
            "model": row["model"],
            "mesh": row["mesh"],
            "batch_per_device": {chip.name: binding_batch(row, chip) for chip in CHIPS},
        }
        for row in rows
        if row["devices"] == most > 1 and not row["curvature"]
    ]


def parts_of(results: dict) -> list[str]:
    """Returns the paragraphs and tables of the report."""
    rows = [row for row in results["rows"] if not row["curvature"]]
    header = ["model", "mesh", "batch", "GFLOP", "arguments MB", "temporary MB"]
    header += ["collectives", "sent MB", "with reduce-scatter MB"]
    cells = [
        [
            *(row["model"], row["mesh"], row["batch_per_device"] * row["devices"]),
            row["flops"] / 1e9,
            *(row["argument_bytes"] / 1e6, row["temporary_bytes"] / 1e6),
            ", ".join(f"{kind['count']} {k}" for k, kind in row["collectives"].items()),
            *(row["sent_bytes"] / 1e6, row["scattered_bytes"] / 1e6),
        ]
        for row in rows
    ]
    repeated = sum(row["repeated_in_loops"] for row in results["rows"])
    parts = [
        f"Compiled for {results['device']} by jax {results['jax']}. FLOPs, memory and "
        "bytes are for one device and one step; the batch is for all devices. The last "
        "column counts a sum as a reduce-scatter if every device reads only a part of "
        "it, as compilers for accelerators do.",
        report.markdown_table(header, cells),
        f"{repeated or 'None'} of the collectives are in loops of several iterations.",
    ]
    if results["limits"]:
        header = ["model", "mesh", *(chip.name for chip in CHIPS)]
        cells = [
            [limit["model"], limit["mesh"], *limit["batch_per_device"].values()]
            for limit in results["limits"]
        ]
        parts += [
            "Communication begins to bind if a device has fewer samples than this "
            "number. It is the time to send over the time to compute a sample, at the "
            "rates that the makers publish (products in bfloat16), in rings, with "
            "nothing sent during computation.",
            report.markdown_table(header, cells),
        ]
    if added := what_curvature_adds(results["rows"]):
        header = ["model", "mesh", *added[0]["added"], "GFLOP, over the step without"]
        cells = [
            [row["model"], row["mesh"], *row["added"].values(), row["flop_ratio"]]
            for row in added
        ]
        parts += [
            "What the penalty of curvature adds to a device's step: Kronecker factors "
            "of all linear layers, the diagonal of the other leaves.",
            report.markdown_table(header, cells),
        ]
    return parts


def what_curvature_adds(rows: Sequence[dict]) -> list[dict]:
    """Returns the differences between steps with and without the curvature penalty."""
    plain = {(r["model"], r["mesh"]): r for r in rows if not r["curvature"]}
    units = {"flops": ("GFLOP", 1e9), "argument_bytes": ("arguments MB", 1e6)}
    units |= {"temporary_bytes": ("temporary MB", 1e6)}
    units |= {"scattered_bytes": ("sent MB, with reduce-scatter", 1e6)}
    found = []
    for row in rows:
        if row["curvature"]:
            base = plain[row["model"], row["mesh"]]
            added = {
                name: (row[key] - base[key]) / unit
                for key, (name, unit) in units.items()
            }
            ratio = row["flops"] / base["flops"]
            of = {"model": row["model"], "mesh": row["mesh"]}
            found.append(of | {"added": added, "flop_ratio": ratio})
    return found


def figures(out: Path, rows: Sequence[dict], models: Sequence[str], meshes):
    """Draws sent.png and flops.png: what a device sends and computes, by mesh."""
    plain = [row for row in rows if not row["curvature"]]
    for key, unit, name, y in (
        ("scattered_bytes", 1e6, "sent", "MB that a device sends in a step"),
        ("flops", 1e9, "flops", "GFLOP of a device in a step"),
    ):
        groups = {
            model: [row[key] / unit for row in plain if row["model"] == model]
            for model in models
        }
        plots.bars(out / f"{name}.png", groups, meshes, y=y)
