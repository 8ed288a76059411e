r"""Merging checkpoints from files to files: seconds, bandwidth, memory.

Makes a base and four fine-tuned models of the shape of a Llama of 1.1 billion
parameters in bfloat16, with random values, and merges them by `jaxarith merge` and,
where its command is given, by mergekit at its fastest settings, in turn, each run in a
process of its own. What the disk and the page cache allow is told by `cat` of all
inputs and `dd` of the output.

    python -m experiments.bench.stream_merge --models /tmp/models --out runs/stream
    python -m experiments.bench.stream_merge --models /tmp/models --out runs/stream \
        --mergekit other/bin/mergekit-yaml
    git worktree add ../earlier COMMIT
    python -m experiments.bench.stream_merge --models /tmp/models --out runs/stream \
        --earlier ../earlier

Seconds are those of whole commands, with the start of Python and compilation; merging
is the part from opened models to complete weights. Memory is the peak of what was
resident; CPU seconds are those of all threads. The bandwidth counts every input once,
and the output. Before every run the inputs are read once, so that they are in memory
as far as there is room, and what waits to be written is.
"""

import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import yaml
from tqdm import tqdm

from experiments.bench import measure
from experiments.common import script
from jaxarith import report, tree
from jaxarith.hub import safetensors

TASKS = 4
# Of `jaxarith merge`, and the method of mergekit that comes nearest, if there is one.
METHODS = {
    "average": ("average", ("linear", {"weight": 0.25})),
    "task_arithmetic": (
        "task_arithmetic --coef 0.3",
        ("task_arithmetic", {"weight": 0.3}),
    ),
    "ties": ("ties --density 0.2", None),
    "ties_tensor": (
        "ties --density 0.2 --trim tensor",
        ("ties", {"weight": 1.0, "density": 0.2}),
    ),
    "ties_mergekit": (
        "ties --preset mergekit --weight 1 --density 0.2",
        ("ties", {"weight": 1.0, "density": 0.2}),
    ),
    "awd": ("awd", None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      models: folder of the models, which are made where they are missing (11 GB).
      out: folder of the report.
      methods: those that are timed.
      mergekit: the command `mergekit-yaml` of an environment that has it.
      earlier: a checkout of another commit, whose merges are timed in turn.
      repetitions: runs of each.
      layers: layers of the models; fewer make a quicker, smaller measurement.
      hashes: also time the average with hashes of its inputs.
    """

    models: Path
    out: Path
    methods: tuple[str, ...] = tuple(METHODS)
    mergekit: Path | None = None
    earlier: Path | None = None
    repetitions: int = 3
    layers: int = 22
    hashes: bool = True


class Layout(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]


def layout(layers: int) -> dict[str, Layout]:
    """The tensors of TinyLlama 1.1B, if there are 22 layers."""
    width, inner, keys, tokens = 2048, 5632, 256, 32000
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (tokens, width),
        "lm_head.weight": (tokens, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }
    dtype = np.dtype(ml_dtypes.bfloat16)
    return {name: Layout(dtype, shape) for name, shape in shapes.items()}


def config_json(layers: int) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def values(name: str, shape, model: int) -> np.ndarray:
    """Those of the base, moved a little for each other model."""
    seed = zlib.crc32(name.encode())
    base = np.random.Generator(np.random.SFC64(seed))
    found = base.standard_normal(shape, np.float32) * np.float32(0.02)
    if model:
        move = np.random.Generator(np.random.SFC64([model, seed]))
        found += move.standard_normal(shape, np.float32) * np.float32(0.001)
    return found.astype(ml_dtypes.bfloat16)


def make(folder: Path, layers: int) -> list[Path]:
    """The folders of the base and of the models, which are made if they are missing."""
    names = ["base", *(f"model-{i}" for i in range(1, TASKS + 1))]
    missing = [name for name in names if not (folder / name / "config.json").exists()]
    tensors = layout(layers)
    with tqdm(total=len(missing) * len(tensors), desc="making models") as bar:
        for name in missing:
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            files = safetensors.plan(tensors, 1_500_000_000, {"format": "pt"})
            with safetensors.Writer(place, files) as writer:
                for key, leaf in tensors.items():
                    writer.put(key, values(key, leaf.shape, names.index(name)))
                    bar.update()
            if len(files) > 1:
                index = json.dumps(safetensors.index(files, {}))
                (place / "model.safetensors.index.json").write_text(index)
            (place / "config.json").write_text(json.dumps(config_json(layers)))
    return [folder / name for name in names]


class Run(NamedTuple):
    seconds: float
    cpu: float
    merging: float | None
    peak: int


def timed(command: list[str], merged: Path, checkout: Path | None = None) -> Run:
    """Runs a command that makes a folder, which is then removed."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=checkout,  # `python -m` imports from there first
    )
    assert process.stdout and process.stderr
    output, errors = process.stdout.read(), process.stderr.read()
    # The peak of this child alone; `resource` knows that of all.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    merging = re.search(r", ([\d.]+) s\)", output)
    shutil.rmtree(merged)
    cpu = usage.ru_utime + usage.ru_stime
    merging = float(merging[1]) if merging else None
    return Run(seconds, cpu, merging, usage.ru_maxrss * 1024)


def jaxarith_command(method: str, folders: list[Path], merged: Path) -> list[str]:
    base, *models = map(str, folders)
    return [
        *(sys.executable, "-m", "jaxarith.cli", "merge", "--base", base),
        *(part for model in models for part in ("--model", model)),
        *("--out", str(merged), "--shard-size", "1.5GB"),
        *("--method", *method.split()),
    ]


def mergekit_command(
    program: Path, method: tuple[str, dict], folders: list[Path], merged: Path
) -> list[str]:
    name, parameters = method
    base, *models = map(str, folders)
    recipe = {
        "merge_method": name,
        "models": [{"model": m, "parameters": parameters} for m in models],
        "dtype": "bfloat16",
    }
    if name != "linear":
        recipe["base_model"] = base
    file = merged.parent / "mergekit.yaml"
    file.write_text(yaml.safe_dump(recipe))
    fastest = ["--async-write", "--write-threads", "2", "--no-write-model-card"]
    fastest += ["--num-threads", str(os.cpu_count()), "--no-copy-tokenizer", "--quiet"]
    return [str(program), str(file), str(merged), "--allow-crimes", *fastest]


def read_all(files: list[str]):
    """Brings the files into memory, as far as there is room; writes what waits."""
    os.sync()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def disk(files: list[str], scratch: Path, size: int) -> float:
    """Seconds to read all inputs and to write as much as the output has."""
    target = scratch / "zeros"
    begin = time.perf_counter()
    read_all(files)
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={target}", "bs=16M", f"count={size // 2**24}"],
        stderr=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


@script.full_precision
def main(config: Config):
    """Measures, and writes report.md and report.json."""
    config.out.mkdir(parents=True, exist_ok=True)
    folders = [folder.resolve() for folder in make(config.models, config.layers)]
    size = sum(
        int(np.prod(x.shape)) * x.dtype.itemsize for x in layout(config.layers).values()
    )
    largest = max(np.prod(x.shape) * x.dtype.itemsize for x in layout(1).values())
    files = [str(f) for folder in folders for f in sorted(folder.glob("*.safetensors"))]
    merged = config.models.resolve() / "merged"
    shutil.rmtree(merged, ignore_errors=True)

    commands = {}
    for name in config.methods:
        ours, theirs = METHODS[name]
        command = jaxarith_command(ours, folders, merged)
        commands[name, "jaxarith"] = [*command, "--no-hashes"]
        if config.earlier:
            commands[name, "earlier"] = commands[name, "jaxarith"]
        if name == "average" and config.hashes:
            commands[name, "jaxarith, hashes"] = command
        if config.mergekit and theirs:
            commands[name, "mergekit"] = theirs
    runs: dict[tuple[str, str], list[Run]] = {key: [] for key in commands}
    limit = []
    order = np.random.default_rng(0)  # the place in a round shows in the seconds
    with tqdm(total=config.repetitions * (1 + len(commands))) as bar:
        for _ in range(config.repetitions):
            read_all(files)
            limit.append(disk(files, config.models, size))
            bar.update()
        for _ in range(config.repetitions):
            for name, program in order.permutation(list(commands)).tolist():
                command = commands[name, program]
                bar.set_description(f"{name}, {program}")
                read_all(files)
                if config.mergekit and program == "mergekit":
                    command = mergekit_command(
                        config.mergekit, command, folders, merged
                    )
                checkout = config.earlier if program == "earlier" else None
                runs[name, program].append(timed(command, merged, checkout))
                bar.update()

    cat = statistics.median(limit)
    read = size * (TASKS + 1)
    rows = [{"method": "cat and dd", "program": "", "seconds": cat}]
    rows[0]["GB/s"] = (read + size) / cat / 1e9
    for (name, program), of_program in runs.items():
        seconds = statistics.median(run.seconds for run in of_program)
        merging = [run.merging for run in of_program if run.merging is not None]
        row = {
            "method": name,
            "program": program,
            "seconds": seconds,
            "CPU s": statistics.median(run.cpu for run in of_program),
            "GB/s": (read + size) / seconds / 1e9,
            "peak GB": max(run.peak for run in of_program) / 1e9,
        }
        if merging:
            row["merging s"] = statistics.median(merging)
            row["of cat and dd"] = cat / row["merging s"]
        for other in ("mergekit", "earlier"):
            if (name, other) in runs and program.startswith("jaxarith"):
                pairs = list(zip(runs[name, other], of_program, strict=True))
                row[f"{other} / it"] = statistics.median(
                    theirs.seconds / ours.seconds for theirs, ours in pairs
                )
                row[f"{other} / it, CPU"] = statistics.median(
                    theirs.cpu / ours.cpu for theirs, ours in pairs
                )
        rows.append(row)
    bound = (1.5e9 + 3 * largest * TASKS) / 1e9
    title = (
        f"{TASKS} models and a base of {size / 2e9:.2f}B parameters in bfloat16, "
        f"{read / 1e9:.1f} GB in, {size / 1e9:.1f} GB out. "
        f"{measure.processor()}, {os.cpu_count()} cores. Medians of "
        f"{tree.counted(config.repetitions, 'run')}. "
        f"1.5 GB + 3 · largest tensor · models = {bound:.2f} GB."
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in columns] for row in rows]
    table = report.markdown_table(columns, cells)
    content = {"title": title, "rows": rows, "seconds": _seconds(runs), "disk": limit}
    measure.write(config.out, "", [title, table], content)


def _seconds(runs):
    return {
        f"{a}, {b}": [run.seconds for run in found] for (a, b), found in runs.items()
    }


def _cell(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    script.run(Config, main)
