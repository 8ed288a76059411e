"""The work of a training step on many devices, read from its compiled program.

The linearised step of an encoder at its published size, with the optimizer, is compiled
for meshes of 1 to 256 devices. It is not run: no parameter and no sample is made. On
some meshes it is also compiled with the penalty of curvature. The batch of a device
stays the same (weak scaling). Devices of the axis `data` hold whole parameters; devices
of `fsdp` hold parts of them (`jaxarith.sharding`). XLA reports the FLOPs and the memory
of a device; the collectives are read from the program's text.

    python -m experiments.bench.scaling --out runs/scaling
    python -m experiments.bench.scaling --platform tpu --out runs/scaling_tpu \\
        --meshes fsdp=8 data=256 data=32,fsdp=8 fsdp=256

CPU devices are virtual. With `--platform tpu`, programs are compiled for a slice of TPU
v5e. This needs no TPU, but it needs the `tpu` extra (libtpu holds the compiler), and a
program takes minutes. Compilers differ: if each device keeps a part of the gradient,
the CPU's compiler sums the whole gradient (all-reduce) and throws the rest away. The
TPU's may sum only the parts (reduce-scatter), and gathers in bfloat16 the values that
its products round to bfloat16.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.bench import (
    collectives,
    encoders,
    factors,
    measure,
    scaling_report,
)
from experiments.common import script
from jaxarith import losses, sharding, train, tree
from jaxarith.models import heads

CLASSES = 100
MESHES = ("data=1", "data=8", "data=2,fsdp=4", "fsdp=8", "data=64", "data=8,fsdp=8")
MESHES += ("data=256", "data=32,fsdp=8", "fsdp=256")
# Slices of TPU v5e by number of chips; below four, a part of the smallest host.
SLICES = {1: "2x2", 2: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8"}
SLICES |= {64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md, sent.png and flops.png."""
    models: tuple[encoders.Name, ...] = (
        *("vit-b-32", "vit-b-16", "vit-l-14", "gpt2-medium"),
    )
    """The encoders, at their published sizes."""
    meshes: tuple[str, ...] = MESHES
    """The sizes of the axes data and fsdp for each program."""
    curvature: tuple[str, ...] = ("data=8", "data=8,fsdp=8", "data=32,fsdp=8")
    """The meshes on which the step is also compiled with the penalty of curvature."""
    batch_per_device: int = 16
    """Samples of a step that each device computes."""
    platform: Literal["cpu", "tpu"] = "cpu"
    """Compiler to use: for virtual CPU devices, or for a slice of TPU v5e."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""


def make_devices(config: Config):
    """Makes virtual devices for the meshes; if JAX has started, it keeps its own."""
    with contextlib.suppress(RuntimeError):
        if config.platform == "cpu":
            most = max(map(_count, config.meshes))
            jax.config.update("jax_num_cpu_devices", max(most, 1))
        jax.config.update("jax_platforms", "cpu")  # nothing runs on the real ones


def make_meshes(config: Config) -> dict[str, Mesh]:
    """Makes meshes of virtual devices, or of slices that need not exist.

    Raises:
      ValueError: a mesh is not valid, has a task axis, or its devices are unavailable.
      ImportError: the compiler for TPUs is not installed.
    """
    counts = {sizes: _count(sizes) for sizes in config.meshes}
    if config.platform == "cpu":
        devices = jax.devices("cpu")
        if max(counts.values()) > len(devices):
            raise ValueError(
                f"{max(counts.values())} devices are asked for, but JAX has made "
                f"{len(devices)} virtual devices. Run the script by itself, so that it "
                "makes as many as it needs, or call "
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
                f"the mesh {sizes!r} shares tasks, but the step here is one task's; "
                "give sizes of data and fsdp."
            )
    return meshes


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in re.findall(r"=\s*(\d+)", sizes))


def _chips(count: int) -> list:
    if count not in SLICES:
        raise ValueError(
            f"no slice of TPU v5e has {count} chips; slices have "
            f"{', '.join(map(str, SLICES))}."
        )
    if not importlib.util.find_spec("libtpu"):
        raise ImportError(
            "libtpu, which compiles for TPUs, is not installed: pip install -e '.[tpu]'"
        )
    # No chip is used, so there is no need to ask Google Cloud about the machine, or for
    # a lock that keeps other processes from compiling.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slice_ = topologies.get_topology_desc(f"v5e:{SLICES[count]}", "tpu")
    return slice_.devices[:count]


def program(
    encoder: encoders.Encoder,
    mesh: Mesh,
    batch_per_device: int,
    *,
    curvature: bool = False,
) -> jax.stages.Compiled:
    """Compiles the linearised step of one task for the devices of a mesh.

    Args:
      encoder: the model.
      mesh: the devices.
      batch_per_device: samples of each device.
      curvature: whether the step has the penalty of curvature.
    """
    config = train.TrainConfig(
        linearized=True,
        batch_size=batch_per_device * mesh.size,
        penalty="kronecker" if curvature else None,
    )
    sample = encoder.make_inputs(np.random.default_rng(0), 1)
    width = jax.eval_shape(encoder.apply_fn, encoder.layout, *sample).shape[-1]
    rows = {
        name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for name, leaf in zip(encoder.inputs, sample, strict=True)
    }

    def loss_fn(features, batch, head):
        return losses.cross_entropy(heads.logits(head, features), batch["label"])

    lowered = train.lowered_step(
        encoder.apply_fn,
        encoder.layout,
        loss_fn,
        rows | {"label": jax.ShapeDtypeStruct((), jnp.int32)},
        config,
        constants=jax.ShapeDtypeStruct((1, CLASSES, width), jnp.float32),
        inputs=encoder.inputs,
        mesh=mesh,
        curvature=factors.shapes(encoder, sample, 0) if curvature else None,
    )
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile(compiler_options=fewer_passes() if is_cpu else None)


def fewer_passes() -> dict[str, Any]:
    """Returns options that cut LLVM's time to a third; XLA's own work stays the same.

    Nothing runs here, so the instructions need not be fast.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # others may lack it
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def count(compiled: jax.stages.Compiled, devices: int) -> dict:
    """Returns what each device computes, holds and sends in a step."""
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    text = compiled.as_text() or ""
    found = collectives.collectives(text, devices)
    scattered = collectives.collectives(text, devices, scattered=True)
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
        "scattered_bytes": sum(one.sent for one in scattered),
    }


def main(config: Config) -> dict:
    """Compiles, counts, prints and writes; returns the content of `report.json`."""
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
    programs = [
        (model, sizes, curvature)
        for model in config.models
        for sizes in meshes
        for curvature in ((False, True) if sizes in config.curvature else (False,))
    ]
    rows, bar = [], tqdm(programs, desc="compile", unit="program")
    for model, sizes, curvature in bar:
        bar.set_postfix_str(f"{model}, {sizes}")
        encoder, mesh = encoders.encoder(model, config.layers), meshes[sizes]
        compiled = program(encoder, mesh, config.batch_per_device, curvature=curvature)
        options = {"model": model, "parameters": tree.size(encoder.layout)}
        options |= {"mesh": sizes, "devices": mesh.size, "curvature": curvature}
        options |= {"batch_per_device": config.batch_per_device}
        rows.append(options | count(compiled, mesh.size))
    results = {
        "device": next(iter(meshes.values())).devices.flat[0].device_kind,
        "jax": jax.__version__,
        "layers": config.layers,
        "chips": [chip._asdict() for chip in scaling_report.CHIPS],
        "rows": rows,
        "limits": scaling_report.limits(rows),
    }
    title = "A step on many devices"
    measure.write(config.out, title, scaling_report.parts_of(results), results)
    scaling_report.figures(config.out, rows, config.models, config.meshes)
    return results


if __name__ == "__main__":
    script.run(Config, main)
