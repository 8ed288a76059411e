"""What a training step does on many devices, read from its compiled program.

The linearised step of an image encoder at its published size, with the optimizer, is
compiled for meshes of 1 to 256 devices and not run: no parameter and no image is made.
The batch of a device stays the same (weak scaling). Parameters lie whole on the devices
of the axis `data` and are cut into parts for those of `fsdp` (`jaxarith.sharding`). XLA
tells the FLOPs and the memory of a device; the collectives are read from the text.

    python -m experiments.bench.scaling --out runs/scaling
    python -m experiments.bench.scaling --platform tpu --out runs/scaling_tpu \\
        --meshes fsdp=8 data=256 data=32,fsdp=8 fsdp=256

CPU devices are virtual. With `--platform tpu` the programs are those of a slice of TPU
v5e; no TPU is needed, but the `tpu` extra is (libtpu holds the compiler), and a program
takes minutes. Compilers differ: where each device keeps a part of the gradient, the
CPU's sums the whole one (all-reduce) and throws the rest away; the TPU's may sum the
parts alone (reduce-scatter), and gathers in bfloat16 what its products round to that.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.bench import collectives, encoders, measure
from experiments.common import script
from jaxarith import losses, plots, report, sharding, train, tree
from jaxarith.models import heads

CLASSES = 100
MESHES = ("data=1", "data=2", "fsdp=2", "data=4", "fsdp=4", "data=8", "fsdp=8")
MESHES += ("data=256", "data=32,fsdp=8", "fsdp=256")
# Slices of TPU v5e by their chips; below four, a part of the smallest host.
SLICES = {1: "2x2", 2: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8"}
SLICES |= {64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md, sent.png and flops.png."""
    models: tuple[encoders.Vision, ...] = ("vit-b-32", "vit-l-14")
    """The encoders, at their published sizes."""
    meshes: tuple[str, ...] = MESHES
    """Of each program: the sizes of the axes data and fsdp."""
    batch_per_device: int = 16
    """Samples of a step that each device computes."""
    platform: Literal["cpu", "tpu"] = "cpu"
    """Whose compiler: for virtual CPU devices, or for a slice of TPU v5e."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""


class Chip(NamedTuple):
    """A chip as its maker publishes it.

    Attributes:
      name: the chip and what connects it to others.
      flops: operations of dense products in bfloat16, per second.
      sends: bytes that one chip can send per second.
    """

    name: str
    flops: float
    sends: float


# As Google's page of the TPU v5e and NVIDIA's data sheet of the H100 give them.
CHIPS = (
    Chip("TPU v5e, interconnect of 1600 Gbit/s", 197e12, 200e9),
    Chip("H100 SXM, NVLink of 450 GB/s each way", 989e12, 450e9),
    Chip("H100 SXM, network of 400 Gbit/s", 989e12, 50e9),
)


def make_devices(config: Config):
    """Makes virtual devices for the meshes; JAX that has started keeps those it has."""
    with contextlib.suppress(RuntimeError):
        if config.platform == "cpu":
            most = max(map(_count, config.meshes))
            jax.config.update("jax_num_cpu_devices", max(most, 1))
        jax.config.update("jax_platforms", "cpu")  # nothing runs on the real ones


def make_meshes(config: Config) -> dict[str, Mesh]:
    """Of virtual devices, or of those of slices that need not be there.

    Raises:
      ValueError: a mesh is none, has a task axis, or no such devices can be had.
      ImportError: the compiler for TPUs is not installed.
    """
    counts = {sizes: _count(sizes) for sizes in config.meshes}
    if config.platform == "cpu":
        devices = jax.devices("cpu")
        if max(counts.values()) > len(devices):
            raise ValueError(
                f"{max(counts.values())} devices are asked for, and JAX has made "
                f"{len(devices)} virtual ones. Run the script by itself, which makes "
                "as many as it needs, or call "
                f"jax.config.update('jax_num_cpu_devices', {max(counts.values())}) "
                "before anything else."
            )
        of = {sizes: devices[:count] for sizes, count in counts.items()}
    else:
        of = {sizes: _chips(count) for sizes, count in counts.items()}
    meshes = {sizes: sharding.make_mesh(sizes, of[sizes]) for sizes in counts}
    for sizes, mesh in meshes.items():
        if mesh.shape["task"] > 1:
            raise ValueError(
                f"the mesh {sizes!r} shares tasks, and the step here is one task's; "
                "give sizes of data and fsdp."
            )
    return meshes


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in re.findall(r"=\s*(\d+)", sizes))


def _chips(count: int) -> list:
    if count not in SLICES:
        raise ValueError(
            f"no slice of TPU v5e has {count} chips; there are slices of "
            f"{', '.join(map(str, SLICES))}."
        )
    if not importlib.util.find_spec("libtpu"):
        raise ImportError(
            "libtpu, which compiles for TPUs, is not installed: pip install -e '.[tpu]'"
        )
    # No chip is taken: there is no need to ask Google Cloud what machine this is, nor
    # for a lock that keeps others from compiling.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slice_ = topologies.get_topology_desc(f"v5e:{SLICES[count]}", "tpu")
    return slice_.devices[:count]


def program(
    encoder: encoders.Encoder, mesh: Mesh, batch_per_device: int
) -> jax.stages.Compiled:
    """The linearised step of one task, compiled for the devices of a mesh."""
    samples = batch_per_device * mesh.size
    config = train.TrainConfig(linearized=True, batch_size=samples)
    (image,) = encoder.make_inputs(np.random.default_rng(0), 1)
    width = jax.eval_shape(encoder.apply_fn, encoder.layout, image).shape[-1]

    def loss_fn(features, batch, head):
        return losses.cross_entropy(heads.logits(head, features), batch["label"])

    lowered = train.lowered_step(
        encoder.apply_fn,
        encoder.layout,
        loss_fn,
        {
            "image": jax.ShapeDtypeStruct(image.shape[1:], jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        },
        config,
        constants=jax.ShapeDtypeStruct((1, CLASSES, width), jnp.float32),
        mesh=mesh,
    )
    return lowered.compile()


def count(compiled: jax.stages.Compiled, devices: int) -> dict:
    """What each device computes, holds and sends in a step."""
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    found = collectives.collectives(compiled.as_text() or "", devices)
    kinds: dict[str, dict] = {}
    for one in sorted(found):
        kind = kinds.setdefault(one.name, {"count": 0, "bytes": 0, "sent_bytes": 0})
        kind["count"] += one.times
        kind["bytes"] += one.times * one.size
        kind["sent_bytes"] += one.sent
    return {
        "flops": costs["flops"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": kinds,
        "repeated_in_loops": sum(one.times > 1 for one in found),
        "sent_bytes": sum(one.sent for one in found),
    }


def binding_batch(row: dict, chip: Chip) -> float:
    """Samples per device below which sending takes longer than computing.

    Assumes that FLOPs grow with the batch, as all but the optimizer's do, and that
    nothing is sent while a chip computes.
    """
    sending = row["sent_bytes"] / chip.sends
    computing = row["flops"] / row["batch_per_device"] / chip.flops
    return sending / computing


def limits(rows: Sequence[dict]) -> list[dict]:
    """The binding batches of the meshes of the most devices, if more than one."""
    most = max(row["devices"] for row in rows)
    return [
        {
            "model": row["model"],
            "mesh": row["mesh"],
            "batch_per_device": {chip.name: binding_batch(row, chip) for chip in CHIPS},
        }
        for row in rows
        if row["devices"] == most > 1
    ]


def parts_of(results: dict) -> list[str]:
    """The paragraphs and tables of the report."""
    rows = results["rows"]
    header = ["model", "mesh", "batch", "GFLOP", "arguments MB", "temporary MB"]
    header += ["collectives", "sent MB"]
    cells = [
        [
            *(row["model"], row["mesh"], row["batch_per_device"] * row["devices"]),
            row["flops"] / 1e9,
            *(row["argument_bytes"] / 1e6, row["temporary_bytes"] / 1e6),
            ", ".join(f"{kind['count']} {k}" for k, kind in row["collectives"].items()),
            row["sent_bytes"] / 1e6,
        ]
        for row in rows
    ]
    repeated = sum(row["repeated_in_loops"] for row in rows)
    parts = [
        f"For {results['device']}, by jax {results['jax']}. FLOPs, memory and bytes "
        "are those of one device and one step; the batch is that of all devices.",
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
            "Communication begins to bind where a device has fewer samples than this. "
            "It is the time to send over the time to compute a sample, at the rates "
            "that the makers publish (products in bfloat16), in rings, with nothing "
            "sent during computation.",
            report.markdown_table(header, cells),
        ]
    return parts


def figures(config: Config, rows: Sequence[dict]):
    """What a device sends and computes, by mesh."""
    for key, unit, name, y in (
        ("sent_bytes", 1e6, "sent", "MB that a device sends in a step"),
        ("flops", 1e9, "flops", "GFLOP of a device in a step"),
    ):
        groups = {
            model: [row[key] / unit for row in rows if row["model"] == model]
            for model in config.models
        }
        plots.bars(config.out / f"{name}.png", groups, config.meshes, y=y)


def main(config: Config) -> dict:
    """Compiles, counts, prints and writes; returns what `report.json` holds."""
    for name in ("models", "meshes"):
        given = getattr(config, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} is {given}; give at least one, each once.")
    if config.batch_per_device < 1:
        raise ValueError(
            f"batch_per_device is {config.batch_per_device}; at least 1 is needed."
        )
    make_devices(config)
    meshes = make_meshes(config)
    programs = [(model, sizes) for model in config.models for sizes in meshes]
    rows, bar = [], tqdm(programs, desc="compile", unit="program")
    for model, sizes in bar:
        bar.set_postfix_str(f"{model}, {sizes}")
        encoder, mesh = encoders.encoder(model, config.layers), meshes[sizes]
        compiled = program(encoder, mesh, config.batch_per_device)
        options = {"model": model, "parameters": tree.size(encoder.layout)}
        options |= {"mesh": sizes, "devices": mesh.size}
        options |= {"batch_per_device": config.batch_per_device}
        rows.append(options | count(compiled, mesh.size))
    results = {
        "device": next(iter(meshes.values())).devices.flat[0].device_kind,
        "jax": jax.__version__,
        "layers": config.layers,
        "chips": [chip._asdict() for chip in CHIPS],
        "rows": rows,
        "limits": limits(rows),
    }
    title = "A step on many devices"
    measure.write(config.out, title, parts_of(results), results)
    figures(config, rows)
    return results


if __name__ == "__main__":
    script.run(Config, main)
