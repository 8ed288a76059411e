"""What tangent products in bfloat16 cost in accuracy.

Trains the quickstart's tasks in the tangent space twice, on the same batches: once in
float32, once with the operands of all tangent products rounded to bfloat16, and
compares the task vectors, their logits and their accuracies. Both are evaluated in
float32.

    python -m experiments.bench.rounding --out runs/rounding

On a CPU the rounding is the same as on accelerators and saves no time.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments.bench import measure
from experiments.common import script, studies
from experiments.common.vision import small_study, small_tasks
from jaxarith import task_vectors, tau_jp
from jaxarith.models import clip
from jaxarith.typing import Tree

DTYPES = {"float32": None, "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare training with rounded tangent products to training without."""

    out: Path
    """Folder for report.json, report.md, logs and task vectors."""
    model: Path = clip.TINY_CLIP
    """Folder of a CLIP checkpoint; the embedded tiny one by default."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    """The tasks, in order."""
    penalty: tau_jp.Mode | None = "cyclic"
    """Mode of the τJp penalty; None trains without one."""
    steps: int = 200
    batch_size: int = 64
    samples: int | None = None
    """The largest number of samples of a split; all by default."""
    seed: int = 0


def train(study: studies.Study, penalty: tau_jp.Mode | None, dtype: str) -> list[Tree]:
    recipe = studies.recipe_of(study.config, "linear", penalty)
    recipe = dataclasses.replace(recipe, product_dtype=DTYPES[dtype])
    return studies.fine_tune(study, dtype, recipe)


def distances(exact: list[Tree], rounded: list[Tree]) -> list[dict]:
    """For each task, the rounded vector's distance and direction from the exact one."""
    rows = []
    for pair in zip(exact, rounded, strict=True):
        apart = task_vectors.norm(jax.tree.map(np.subtract, *pair))
        rows.append(
            {
                "relative distance": float(apart / task_vectors.norm(pair[0])),
                "cosine": float(task_vectors.cosine_matrix(pair)[0, 1]),
            }
        )
    return rows


@script.full_precision
def main(config: Config) -> dict:
    """Trains, compares, prints and writes; returns what `report.json` holds."""
    studies.check(config.tasks)
    study = small_study.prepare(small_study.alone(config))
    config.out.mkdir(parents=True, exist_ok=True)
    taus = {dtype: train(study, config.penalty, dtype) for dtype in DTYPES}
    outputs = {
        dtype: studies.outputs_of(study, vectors, f"evaluate, {dtype}")
        for dtype, vectors in taus.items()
    }
    rows, logits = distances(*taus.values()), {}
    ones, one_hot = np.ones(len(study.names)), np.eye(len(study.names))
    accuracies = {}
    for dtype, found in outputs.items():
        single = studies.linearized_single(study, found)["test"]
        merged = studies.linearized_at(study, "test", found, ones)
        means = float(np.mean(single)), float(np.mean(merged))
        accuracies[dtype] = dict(zip(("individual", "merged"), means, strict=True))
        logits[dtype] = [
            np.asarray(dataset.logits(dataset.head, at(coefs)))
            for dataset, at, coefs in zip(study.test, found.test, one_hot, strict=True)
        ]
    starts = [
        np.asarray(dataset.logits(dataset.head, at(0 * ones)))
        for dataset, at in zip(study.test, outputs["float32"].test, strict=True)
    ]
    for row, exact, rounded, start in zip(rows, *logits.values(), starts, strict=True):
        row["mean absolute error of a logit"] = float(np.abs(rounded - exact).mean())
        row["mean absolute move of a logit"] = float(np.abs(exact - start).mean())
    results = {
        "machine": measure.machine(),
        "vectors": dict(zip(study.names, rows, strict=True)),
        "accuracies": accuracies,
    }
    means = [
        {"products in": dtype}
        | {f"{kind} accuracy": value for kind, value in row.items()}
        for dtype, row in accuracies.items()
    ]
    of_tasks = [{"task": name} | row for name, row in results["vectors"].items()]
    parts = [measure.table(of_tasks), measure.table(means)]
    return measure.write(config.out, "Rounded products", parts, results)


if __name__ == "__main__":
    script.run(Config, main)
