"""Time saved by cached tangents: ξ grids, coefficient searches and AdaMerging.

A linearised model is affine in the coefficients of its task vectors. Every result from
its cached tangents is found again with a pass of the linearised model for every set of
coefficients, in turn and on the same data; both ways must find the same.

    python -m experiments.bench.tangent_grid --out runs/tangent_grid

Task vectors and heads are random, images are noise, and the labels of a task are the
predictions of its own model, so every single-task accuracy is 1. Everything is compiled
before it is timed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import measure, tangent_report
from experiments.common import script
from jaxarith import evaluate, merge, plots, tangent, task_vectors, tree
from jaxarith.data import pipeline
from jaxarith.models import clip, heads
from jaxarith.typing import Tree


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md and xi.png."""
    model: Path = clip.TINY_CLIP
    """Folder of a CLIP checkpoint; the embedded tiny one by default."""
    samples: int = 2048
    """Images of each task."""
    tasks: int = 8
    points: int = 15
    """Number of values of both coefficients of the ξ grid, from -2 to 2."""
    coefs: int = 21
    """Number of values that a search tries, from 0 to 1."""
    repetitions: int = 3
    """Runs from the cache; each makes the cache anew. Medians are reported."""
    forward_repetitions: int = 1
    """Number of these runs that are followed by a run with passes, which takes
    minutes."""
    steps: int = 100
    """Steps of AdaMerging from the cache."""
    forward_steps: int = 5
    """Steps of AdaMerging with passes."""
    scale: float = 0.05
    """Norm of each leaf of a task vector, over the norm of the model's leaf."""
    classes: int = 10
    batch_size: int = 128
    seed: int = 0
    goals: bool = False
    """Print the goals and what was reached."""


class Dataset(NamedTuple):
    """The images of one task, its frozen head, and its own model's predictions."""

    batches: list[dict]
    head: jax.Array
    labels: np.ndarray

    def predict(self, features) -> np.ndarray:
        return predictions(self.head, features)

    def accuracy(self, features) -> float:
        return float(np.mean(self.predict(features) == self.labels))


def predictions(head, features) -> np.ndarray:
    return np.asarray(_predictions(head, features))


@jax.jit
def _predictions(head, features):
    return heads.logits(head, features).argmax(-1)


class Study(NamedTuple):
    """A model, its linearisation, random task vectors and data.

    Attributes:
      changed: for each task, the share of predictions that its vector changes.
    """

    config: Config
    apply_fn: Callable
    linearized: Callable
    params_0: dict
    taus: list[Tree]
    datasets: list[Dataset]
    changed: list[float]

    def cached(self, taus, dataset) -> evaluate.TangentOutputs:
        return evaluate.tangent(self.apply_fn, self.params_0, taus, dataset.batches)

    def passes(self, taus, dataset) -> evaluate.OutputsAt:
        return evaluate.forward(self.linearized, self.params_0, taus, dataset.batches)


def prepare(config: Config) -> Study:
    """Loads the model, and draws task vectors, images and heads."""
    model = clip.load(config.model)
    params_0 = tree.select(model.params, clip.IMAGE_ENCODER)
    apply_fn = clip.image_encoder(model.config)
    vision, width = model.config.vision, model.config.projection_dim
    taus, datasets, changed = [], [], []
    for task in tqdm(range(config.tasks), desc="tasks", unit="task"):
        key = jax.random.fold_in(jax.random.key(config.seed), task)
        noise = jax.jit(task_vectors.random_like)(key, params_0)
        taus.append(jax.tree.map(lambda leaf: config.scale * leaf, noise))
        rng = np.random.default_rng((config.seed, task))
        shape = vision.image_size, vision.image_size, vision.num_channels
        source = [
            {"image": rng.standard_normal(shape, np.float32)}
            for _ in range(config.samples)
        ]
        batches = pipeline.evaluation_batches(source, config.batch_size)
        # Rows as long as in zero-shot heads.
        rows = rng.standard_normal((config.classes, width), np.float32)
        head = heads.normalize(jnp.asarray(rows)) * jnp.exp(model.params["logit_scale"])
        at = evaluate.tangent(apply_fn, params_0, taus[-1:], batches)
        before, labels = (predictions(head, at([coef])) for coef in (0, 1))
        datasets.append(Dataset(batches, head, labels))
        changed.append(float(np.mean(before != labels)))
    linearized = tangent.linearize(apply_fn, params_0)
    return Study(config, apply_fn, linearized, params_0, taus, datasets, changed)


class Run(NamedTuple):
    """A timed run.

    Attributes:
      outputs_at: for every dataset, the outputs at a candidate.
      found: the result found from these outputs.
      outputs: number of outputs that this took.
      making: seconds to make `outputs_at`.
      using: seconds from then on.
    """

    outputs_at: list[Callable]
    found: Any
    outputs: int
    making: float
    using: float


def run(label: str, make: Callable, use: Callable, total: int | None = None) -> Run:
    """Times `use(make())`; `make` returns every dataset's outputs at a candidate."""
    start = time.perf_counter()
    outputs_at = make()
    made = time.perf_counter()
    with tqdm(desc=label, total=total, unit="outputs") as bar:

        def watched(at, candidate):
            bar.update()
            return at(candidate)

        found = use([functools.partial(watched, at) for at in outputs_at])
        used = time.perf_counter()
        return Run(outputs_at, found, bar.n, made - start, used - made)


def compare(config: Config, what: str, ways: dict, use, coefs, probes):
    """Uses the outputs of several ways, in turn, and compares the ways.

    Args:
      config: options, with the numbers of repetitions.
      what: name of the result to find.
      ways: a `make` as in `run` for each name; the first makes passes.
      use: `use(outputs_at, coefs)` returns an array.
      coefs: the values of the coefficients.
      probes: the candidates at which outputs are compared.

    Returns:
      A row for every way but the first, and the array of every way.
    """
    first, *cached = ways
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for way, make in ways.items():
        run(f"compile: {what}, {way}", make, lambda outputs: use(outputs, coefs[:1]))
    total = None
    for repetition in range(config.repetitions):
        for way in [*cached, first]:
            if way != first or repetition < config.forward_repetitions:
                label, used = f"{what}, {way}", functools.partial(use, coefs=coefs)
                runs[way].append(run(label, ways[way], used, total))
                total = runs[way][-1].outputs
    last = {way: runs[way][-1] for way in ways}

    def seconds(way):
        return np.median([(r.making, r.using) for r in runs[way]], axis=0).tolist()

    rows = []
    for way in cached:
        (making, using), forward = seconds(way), sum(seconds(first))
        rows.append(
            {
                "what": what,
                "cached": way,
                "outputs": last[way].outputs,
                "making_seconds": making,
                "using_seconds": using,
                "forward_seconds": forward,
                "speedup": forward / (making + using),
                "speedup_once_made": forward / using,
                "outputs_difference": outputs_difference(
                    last[way].outputs_at, last[first].outputs_at, probes
                ),
                "found_difference": float(
                    np.abs(last[way].found - last[first].found).max()
                ),
            }
        )
    return rows, {way: last[way].found for way in ways}


def outputs_difference(outputs_at, expected_at, probes) -> float:
    """Returns the largest difference at some candidates, over the largest output."""
    return max(
        float(np.abs(at(probe) - expected(probe)).max() / np.abs(expected(probe)).max())
        for at, expected in zip(outputs_at, expected_at, strict=True)
        for probe in probes
    )


def xi_grids(study: Study):
    """Computes the ξ grid of the first two tasks: rows, and the grids of both ways."""
    config, taus, datasets = study.config, study.taus[:2], study.datasets[:2]
    coefs = np.linspace(-2, 2, config.points)
    ways = {
        "a pass for each": lambda: [study.passes(taus, d) for d in datasets],
        "tangents of both": lambda: [study.cached(taus, d) for d in datasets],
    }

    def use(outputs_at, coefs):
        predict = [dataset.predict for dataset in datasets]
        return evaluate.disentanglement_error(outputs_at, predict, coefs)

    what = f"ξ grid of {config.points} x {config.points}"
    corners = [(a, b) for a in coefs[[0, -1]] for b in coefs[[0, -1]]]
    return compare(config, what, ways, use, coefs, corners)


def accuracies(study: Study, outputs_at, candidate) -> list[float]:
    pairs = zip(study.datasets, outputs_at, strict=True)
    return [dataset.accuracy(at(candidate)) for dataset, at in pairs]


def shared_searches(study: Study):
    """Searches one coefficient for all tasks: rows, and the accuracies it saw."""
    config, taus = study.config, study.taus
    coefs = np.linspace(0, 1, config.coefs)

    def of_shared(outputs_of, taus):
        def shared(at):
            return lambda coef: at(np.full(len(taus), coef))

        return [shared(outputs_of(taus, dataset)) for dataset in study.datasets]

    ways = {
        "a pass for each": lambda: of_shared(study.passes, taus),
        "tangent of the sum": lambda: of_shared(study.cached, [task_vectors.add(taus)]),
        "tangents of all": lambda: of_shared(study.cached, taus),
    }

    def use(outputs_at, coefs):
        at = functools.partial(accuracies, study, outputs_at)
        return evaluate.search(at, np.ones(len(taus)), coefs).normalized

    what = f"a shared coefficient of {config.coefs}"
    probes = coefs[[0, len(coefs) // 2, -1]]
    return compare(config, what, ways, use, coefs, probes)


def search_per_task(study: Study) -> dict:
    """Searches one coefficient per task, from the cache."""
    coefs = np.linspace(0, 1, study.config.coefs)
    single = np.ones(len(study.taus))
    result = run(
        "one coefficient per task, tangents of all",
        lambda: [study.cached(study.taus, dataset) for dataset in study.datasets],
        lambda outputs_at: evaluate.search_per_task(
            functools.partial(accuracies, study, outputs_at), single, coefs
        ),
    )
    return {
        "outputs": result.outputs,
        "making_seconds": result.making,
        "using_seconds": result.using,
        "sweeps": len(result.found.normalized) - 1,
        "normalized_shared": float(result.found.normalized[0]),
        "normalized": float(result.found.normalized[-1]),
        "coefs": result.found.coefs.tolist(),
    }


def adamerging(study: Study) -> dict:
    """Runs task-wise AdaMerging on the first batch of every task, in both ways."""
    config, taus = study.config, study.taus
    datasets = [d._replace(batches=d.batches[:1]) for d in study.datasets]
    logits_fns = [functools.partial(heads.logits, d.head) for d in datasets]
    # Heads are inputs, so that all tasks share one compilation.
    batches = [[d.batches[0] | {"head": d.head}] for d in datasets]

    def logits_of(params, batch):
        return heads.logits(batch["head"], study.linearized(params, batch["image"]))

    def make():
        return [study.cached(taus, dataset) for dataset in datasets]

    def from_cache(cache):
        f0, moves = ([getattr(at, name) for at in cache] for name in ("f0", "moves"))
        found = merge.adamerging_tangent(f0, moves, logits_fns, steps=config.steps)
        return np.asarray(found[1])

    def with_passes(steps):
        return merge.adamerging(
            study.params_0,
            taus,
            [logits_of] * len(taus),
            batches,
            scope="task",
            steps=steps,
        ).losses

    def timed(function, *args):
        start = time.perf_counter()
        return function(*args), time.perf_counter() - start

    with_passes(1)  # compiles
    from_cache(make())
    cache, making = timed(make)
    losses, using = timed(from_cache, cache)
    expected, forward = timed(with_passes, config.forward_steps)
    common = min(config.steps, config.forward_steps)
    using, forward = using / config.steps, forward / config.forward_steps
    return {
        "samples_per_task": len(cache[0].f0),
        "making_seconds": making,
        "seconds_per_step": using,
        "forward_seconds_per_step": forward,
        "speedup_once_made": forward / using,
        "entropies": [float(losses[0].mean()), float(losses[-1].mean())],
        "entropy_difference": float(np.abs(losses[:common] - expected[:common]).max()),
    }


def check(config: Config):
    """Refuses options that would fail after long work."""
    least = {"samples": 1, "tasks": 2, "points": 2, "coefs": 1, "repetitions": 1}
    least |= {"forward_repetitions": 1, "steps": 1, "forward_steps": 1, "classes": 2}
    least |= {"batch_size": 1}
    for option, limit in least.items():
        if (value := getattr(config, option)) < limit:
            raise ValueError(f"{option} is {value}; it must be at least {limit}.")
    if config.forward_repetitions > config.repetitions:
        raise ValueError(
            f"forward_repetitions is {config.forward_repetitions}; it must be at most "
            f"repetitions, which is {config.repetitions}."
        )


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns the content of `report.json`."""
    check(config)
    study = prepare(config)
    xi_rows, grids = xi_grids(study)
    rows = xi_rows + shared_searches(study)[0]
    results = {
        "machine": measure.machine()
        | {
            "model": config.model.name,
            "entries": tree.size(study.params_0),
            "tasks": config.tasks,
            "samples": config.samples,
        },
        "changed": study.changed,
        "rows": rows,
        "search_per_task": search_per_task(study),
        "adamerging": adamerging(study),
        "goals": tangent_report.goals(rows) if config.goals else [],
    }
    parts = tangent_report.parts_of(results)
    measure.write(config.out, "Cached tangents", parts, results)
    coefs = np.linspace(-2, 2, config.points)
    plots.disentanglement(config.out / "xi.png", grids, coefs, ("task 1", "task 2"))
    return results


if __name__ == "__main__":
    script.run(Config, main)
