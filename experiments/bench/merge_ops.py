"""What merging costs: seconds, bandwidth and memory of every data-free method.

Task vectors of the size of a CLIP image encoder, with random entries, are merged by
jaxarith and, where there is one, by a plain PyTorch transcription of the authors'
algorithm, in turn, on the same arrays. Needs the `bench` extra.

    python -m experiments.bench.merge_ops --out runs/merge_ops
    python -m experiments.bench.merge_ops --model vit-l-14 --out runs/merge_ops_l

Reported per method: the median seconds, the bytes of the task vectors over the seconds,
the peak of resident memory above the inputs, and what XLA counts for the leaves of one
transformer block: operations and bytes per entry of a task vector. Methods that take
minutes run once, compilation included; the others once more before they are timed.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import encoders, measure
from experiments.bench.measure import alternated, goal, named, peak_memory, seconds
from experiments.common import script
from jaxarith import merge, report, tree


class Method(NamedTuple):
    """A merge operator with the options that its transcription has too.

    Attributes:
      merge: `merge(params_0, taus)`.
      tasks: how many of the task vectors it takes, if not all.
      slow: whether matrix decompositions or a thousand steps take it minutes.
    """

    merge: Callable
    tasks: int | None = None
    slow: bool = False


def halves(params_0, taus):
    """The first and the second half, since under `jit` clusters cannot be found."""
    middle = len(taus) // 2
    return [list(range(middle)), list(range(middle, len(taus)))]


KEY = jax.random.key(0)


def svc(params_0, taus):
    """Of the sum of the task vectors."""
    return merge.svc(params_0, taus, merge.task_arithmetic(params_0, taus))


def core(params_0, taus, rank=16):
    """TSV-M of adapters, whose factors are the first rows and columns of kernels."""
    adapters = [
        {
            path: merge.Factors(leaf[:, :rank], leaf[:rank])
            for path, leaf in tree.flatten(tau).items()
            if path.endswith("kernel") and leaf.ndim == 2
        }
        for tau in taus
    ]
    found = merge.core(adapters, merge.tsv).factors
    return tree.map_with_path(
        lambda path, leaf: (
            leaf + found[path].a @ found[path].b if path in found else leaf
        ),
        params_0,
    )


def dare_ties(params_0, taus):
    return merge.ties(params_0, merge.drop(taus, key=KEY))


METHODS = {
    "average": Method(merge.average),
    "task_arithmetic": Method(functools.partial(merge.task_arithmetic, coef=0.3)),
    "ties": Method(functools.partial(merge.ties, density=0.2)),
    "ties_tensor": Method(functools.partial(merge.ties, density=0.2, trim="tensor")),
    "dare": Method(functools.partial(merge.dare, drop_rate=0.9, coef=0.3, key=KEY)),
    "dare_ties": Method(dare_ties),
    "della": Method(functools.partial(merge.della, key=KEY), slow=True),
    "breadcrumbs": Method(merge.breadcrumbs),
    "magmax": Method(functools.partial(merge.magmax, coef=0.5)),
    "topk": Method(merge.topk),
    "localize_and_stitch": Method(merge.localize_and_stitch),
    "model_stock": Method(merge.model_stock),
    "karcher": Method(merge.karcher),
    "slerp": Method(merge.slerp, tasks=2),
    "wise_ft": Method(merge.wise_ft, tasks=1),
    "pcb": Method(merge.pcb),
    "emr_masks": Method(merge.emr_masks),
    "tall_masks": Method(merge.tall_masks),
    "consensus": Method(functools.partial(merge.consensus, coef=0.3)),
    "awd": Method(merge.awd),
    "bases": Method(
        lambda *args: merge.basis_vectors(*args, clusters=halves(*args)).vectors
    ),
    "iso_c": Method(merge.iso_c, slow=True),
    "iso_cts": Method(merge.iso_cts, slow=True),
    "tsv": Method(merge.tsv, slow=True),
    "dc_merge": Method(merge.dc_merge, slow=True),
    "cart": Method(merge.cart, slow=True),
    "esm": Method(merge.esm, slow=True),
    "ace": Method(merge.ace, slow=True),
    "wudi": Method(merge.wudi, slow=True),
    "wudi_filter": Method(
        functools.partial(merge.wudi, solver="closed", time=3.0), slow=True
    ),
    "svc": Method(svc, slow=True),
    "core": Method(core, slow=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json and report.md."""
    model: Literal["vit-b-32", "vit-l-14"] = "vit-b-32"
    """The size of the task vectors: 87.5 or 303 million entries."""
    tasks: int = 8
    methods: tuple[str, ...] = tuple(n for n, m in METHODS.items() if not m.slow)
    """The methods to measure; by default all but those that take minutes."""
    repetitions: int = 3
    """Runs of each, in turn; the median is reported."""
    torch: bool = True
    """Whether to run the PyTorch transcriptions. They join all task vectors into one
    array, copies of which take five times the memory of the inputs."""
    layers: int | None = None
    """Fewer transformer blocks than the model has, to try the script."""
    goals: bool = False
    """Whether to print what was aimed at, and what was reached."""


def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of the vision tower by path."""
    layout = encoders.encoder(config.model, config.layers).layout
    return tree.flatten(tree.select(layout, "vision_model/.*"))


def random_leaves(layout, seed: int, scale: float) -> dict[str, jax.Array]:
    """Gaussian leaves; their deviations differ, as those of trained ones do."""
    rng = np.random.default_rng(seed)

    def leaf(expected):
        values = rng.standard_normal(expected.shape, np.float32)
        return jnp.asarray(values * np.float32(scale * rng.lognormal(sigma=0.5)))

    return {path: leaf(expected) for path, expected in layout.items()}


def copy_bandwidth(taus) -> dict[str, float]:
    """Bytes per second that NumPy copies, of the arrays of all task vectors.

    "new" copies into new arrays, as `numpy.copy` does. "threads" copies into arrays
    that are there, with a thread for each core: the most that the machine gives.
    """
    arrays = [np.asarray(leaf) for tau in taus for leaf in tau.values()]
    size = sum(array.nbytes for array in arrays)
    there = [np.empty_like(array) for array in arrays[: len(arrays) // len(taus)]]
    targets = there * len(taus)
    for target in there:
        target.fill(0)

    def copy_new():
        for array in arrays:
            array.copy()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def copy_there():
            list(pool.map(np.copyto, targets, arrays))

        return {
            name: size / np.median([seconds(copy) for _ in range(5)])
            for name, copy in {"new": copy_new, "threads": copy_there}.items()
        }


def counted(method: Callable, layout, tasks: int) -> dict:
    """What XLA counts for the leaves of the first transformer block under one `jit`.

    The body of a loop counts once, however often it runs.
    """
    block = {path: leaf for path, leaf in layout.items() if "/layers/0/" in path}
    compiled = jax.jit(method).lower(block, [block] * tasks).compile()
    entries = tasks * tree.size(block)
    costs = compiled.cost_analysis() or {}
    return {
        "flops_per_entry": costs.get("flops", 0.0) / entries,
        "bytes_per_entry": costs["bytes accessed"] / entries,
    }


def transcriptions(params_0, taus) -> dict[str, Callable]:
    """The PyTorch methods on the same arrays, without a copy."""
    from torch.utils import dlpack

    from experiments.bench import torch_merges

    def tensors(leaves):
        # Read only on both sides; PyTorch knows no such arrays and warns.
        return {path: dlpack.from_dlpack(leaf) for path, leaf in leaves.items()}

    base, vectors = tensors(params_0), [tensors(tau) for tau in taus]
    return {
        name: functools.partial(getattr(torch_merges, name), base, vectors)
        for name in METHODS
        if hasattr(torch_merges, name)
    }


def row_of(name, config, layout, params_0, taus, theirs) -> dict:
    """One row: seconds of both, in turn, and the peak memory of both."""
    method = METHODS[name]
    taus = taus[: method.tasks]
    ours = functools.partial(method.merge, params_0, taus)
    both = {"jaxarith": ours} | ({"torch": theirs[name]} if name in theirs else {})
    times: dict[str, list] = {kind: [] for kind in both}
    if not method.slow:
        times = alternated(both, config.repetitions)
    took, peak, result = peak_memory(ours)
    size = len(taus) * tree.size(layout) * 4
    median = float(np.median(times["jaxarith"] or took))
    row = {
        "method": name,
        "seconds": median,
        "gigabytes_per_second": size / median / 1e9,
        "peak_bytes": peak,
        "result_bytes": result,
        "torch_seconds": None,
        "torch_over_jaxarith": None,
        "torch_peak_bytes": None,
    }
    if name in theirs:
        took, row["torch_peak_bytes"], _ = peak_memory(theirs[name])
        row["torch_seconds"] = float(np.median(times["torch"] or took))
        row["torch_over_jaxarith"] = row["torch_seconds"] / median
    return row | counted(method.merge, layout, len(taus))


def goals(rows, config, layout, taus, copied: dict[str, float]) -> list[dict]:
    """The goals of the project, and what was reached.

    Bandwidths compare bytes moved: a copy writes all that it reads, a merge reads the
    model too and writes one, and the Gram matrix writes nothing.
    """
    by_name = {row["method"]: row for row in rows}
    size = config.tasks * tree.size(layout) * 4
    found = []

    def add(what, reached, limit, least=True):
        found.append(goal(what, float(reached), limit, least=least))

    for name in ("average", "task_arithmetic"):
        if name in by_name:
            moved = size * (1 + 2 / config.tasks) / by_name[name]["seconds"]
            for kind, rate in copied.items():
                add(f"{name}: bandwidth over copy's ({kind})", moved / (2 * rate), 0.6)
    if ratio := by_name.get("ties", {}).get("torch_over_jaxarith"):
        add("ties: PyTorch's seconds over ours", ratio, 5)
    if "awd" in by_name:
        add("awd: seconds", by_name["awd"]["seconds"], 15, least=False)
        gram = np.median([seconds(lambda: tree.gram(taus)) for _ in range(5)])
        for kind, rate in copied.items():
            what = f"awd: Gram pass's bandwidth over copy's ({kind})"
            add(what, size / gram / (2 * rate), 0.5)
    one = tree.size(layout) * 4
    largest = max(leaf.size for leaf in layout.values()) * 4 * config.tasks
    for name, row in by_name.items():
        limit = (one + row["result_bytes"] + 1.2 * largest) / 1e9
        add(f"{name}: peak memory, GB", row["peak_bytes"] / 1e9, limit, least=False)
    return found


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {', '.join(METHODS)}.")
    # Of slow methods the compilation counts, so none is kept from an earlier run.
    jax.config.update("jax_enable_compilation_cache", False)
    where = measure.machine()
    layout = shapes(config)
    params_0 = random_leaves(layout, 0, 2e-2)
    taus = [
        random_leaves(layout, 1 + task, 3e-4)
        for task in tqdm(range(config.tasks), desc="task vectors", unit="vector")
    ]
    copied = copy_bandwidth(taus)
    theirs = transcriptions(params_0, taus) if config.torch else {}
    work = tqdm(config.methods, unit="method")
    rows = []
    for name in work:
        work.set_description(name)
        rows.append(row_of(name, config, layout, params_0, taus, theirs))
        work.write(str(rows[-1]))  # a run takes long, and may be cut short
    where |= {
        "model": config.model,
        "entries": tree.size(layout),
        "tasks": config.tasks,
        "numpy_copy_gigabytes_per_second": {
            kind: round(float(rate) / 1e9, 2) for kind, rate in copied.items()
        },
    }
    results = {
        "machine": where,
        "rows": rows,
        "goals": goals(rows, config, layout, taus, copied) if config.goals else [],
    }
    parts = [named(where), table(rows)]
    parts += [measure.table(results["goals"])] if config.goals else []
    return measure.write(config.out, "Merge operators", parts, results)


def table(rows) -> str:
    header = ["method", "s", "GB/s", "peak GB", "torch s", "torch / ours"]
    header += ["torch peak GB", "FLOP/entry", "bytes/entry"]

    def giga(value):
        return None if value is None else value / 1e9

    cells = [
        [
            *(row["method"], row["seconds"], row["gigabytes_per_second"]),
            *(giga(row["peak_bytes"]), row["torch_seconds"]),
            *(row["torch_over_jaxarith"], giga(row["torch_peak_bytes"])),
            *(row["flops_per_entry"], row["bytes_per_entry"]),
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)


if __name__ == "__main__":
    script.run(Config, main)
