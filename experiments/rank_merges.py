"""Ranks all merges on the vectors of the quickstart, over several seeds.

    python -m experiments.rank_merges --out runs/rank_merges
    python -m experiments.rank_merges --out runs/one --seeds 1 --methods tsv iso_c svc

The script trains the quickstart's tiny CLIP on its small tasks, in three ways
(ordinary, linearised, linearised with the τJp penalty) and with several seeds. It
merges the vectors of each way by every method of `merge.METHODS` that needs no data,
and by every wrapper of `merge.WRAPPERS` after task arithmetic. Merged ordinary vectors
are evaluated as networks, the others in the tangent space.

Ordinary vectors are also merged by three methods that use validation images without
labels: ESM uses 32 images per task; AdaMerging and AdaRank use all images, in 300 steps
of 0.01 (not tuned).

Each method has two rows of figures: at its published coefficient, and at the best one
of a grid on validation data. Compare the latter with task arithmetic *at its best
coefficient*. Test data choose nothing.

A merged vector is usually linear in its coefficient, so the grid scales one merged
vector. For LiNeS and CART it is not linear, so each value of the grid is a merge.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, studies, study_merges, tables
from experiments.common.studies import evaluation, training
from experiments.common.studies.study import classifier
from experiments.common.vision import small_study, small_tasks
from jaxarith import merge, task_vectors, tree
from jaxarith.typing import Params, Taus, Tree

KINDS = {"nonlinear": "ordinary", "linear": "linearised", "cyclic": "τJp"}
COEFS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)
ESM_SAMPLES = 32  # per task, as in its paper
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # β of LiNeS
# Left out: they merge one or two vectors, or depend on the order of the vectors.
_OTHERS = ("wise_ft", "slerp", "greedy_soup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.Options):
    """Rank the merges."""

    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of training: nonlinear, linear, cyclic (τJp)."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    """The small tasks of the quickstart."""
    methods: tuple[str, ...] = ()
    """Names of rows to measure beside task arithmetic; by default all."""
    seeds: int = 3
    """Number of seeds, starting at --seed; the table has means and deviations."""
    steps: int = 120
    """Optimizer steps of every training."""
    samples: int | None = None
    """Largest number of samples of a split; by default all."""
    seed: int = 0
    """First seed, for the order of samples and for random merges."""
    smoke: bool = False
    """Use few tasks, steps and samples, and one seed; the figures mean nothing."""


class Candidate(NamedTuple):
    """The merged vectors of a method.

    Attributes:
      vectors: one vector, at coefficient 1; or one vector for each of `values`.
      values: coefficients of the one vector, or the values that made the vectors.
      default: the published one of `values`; None if there is none.
    """

    vectors: list[Tree]
    values: tuple[float, ...]
    default: float | None


def candidates(
    params_0: Params, taus: Taus, blocks: str, config: Config
) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """Yields the name of each row with a function that merges."""
    key = jax.random.key(config.seed)

    def of(function, default=1.0, part=taus, **options):
        # Methods without `coef`, like `average`: the coefficient scales their vector.
        if "coef" in inspect.signature(function).parameters:
            options["coef"] = 1.0
        vector = _vector(function(params_0, part, **options), params_0, taus)
        values = tuple(sorted({*COEFS, default}))
        return Candidate([vector], values, default)

    def after(wrapper, **options):
        total = merge.task_arithmetic(params_0, taus)
        merged = wrapper(params_0, taus, total, **options)
        return _vector(merged, params_0, taus)

    linear = [tree.select(tau, blocks) for tau in taus]
    for name, method in merge.METHODS.items():
        if method.data or method.returns != "params" or name in (*_OTHERS, "cart"):
            continue
        options: dict[str, Any] = {"key": key} if method.key else {}
        if name == "awd":  # its authors merge only the linear weights of the blocks
            yield name, lambda m=method: of(m.function, m.coef or 1.0, linear)
        else:
            yield (
                name,
                lambda m=method, o=options: of(m.function, m.coef or 1.0, **o),
            )
    closed: dict[str, Any] = {"solver": "closed"}
    yield "wudi, minimum", lambda: of(merge.wudi, **closed)
    yield "wudi, participation", lambda: of(merge.wudi, rank="participation", **closed)
    for time in (3.0, 30.0):
        yield (
            f"wudi, time {time:g}",
            lambda time=time: of(merge.wudi, time=time, **closed),
        )
    yield "cart", lambda: _cart(params_0, taus)
    for name in ("svc", "subspace_boosting", "isotropise", "polarize"):
        wrapper = merge.WRAPPERS[name].function
        yield name, lambda w=wrapper: Candidate([after(w)], COEFS, 1.0)
    yield (
        "lines",
        lambda: Candidate([after(merge.lines, beta=b) for b in DEPTHS], DEPTHS, None),
    )
    yield "svc after tsv", lambda: of(_svc_after_tsv)


def looking(
    study: studies.Study, taus: Taus, config: Config
) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """Yields the merges that use validation samples; otherwise like `candidates`."""
    params_0 = study.params_0
    samples = [dataset.batches for dataset in study.validation]
    few = [
        [{name: leaf[:ESM_SAMPLES] for name, leaf in batches[0].items()}]
        for batches in samples
    ]

    def esm():
        grams = study_merges.input_grams(
            *(study.apply_fn, params_0, taus, few), inputs=study.inputs
        )
        vector = _vector(merge.esm(params_0, taus, grams), params_0, taus)
        return Candidate([vector], COEFS, 1.0)

    def adapted(method):
        merged = method(
            classifier(study.apply_fn, study.logits),
            *(params_0, taus),
            [dataset.padded for dataset in study.validation],
            samples,
            inputs=study.inputs,
            steps=2 if config.smoke else 300,
            learning_rate=1e-2,
        )
        return Candidate([_vector(merged, params_0, taus)], (1.0,), None)

    yield "esm, 32 inputs", esm
    yield "adamerging", lambda: adapted(study_merges.adamerging)
    yield "adarank", lambda: adapted(study_merges.adarank)


def _svc_after_tsv(params_0, taus):
    return merge.svc(params_0, taus, merge.tsv(params_0, taus), alpha=1.0)


def _cart(params_0, taus):
    values = tuple(sorted({*COEFS, merge.METHODS["cart"].coef or 1.0}))
    merged = [merge.cart(params_0, taus, coef=value) for value in values]
    vectors = [_vector(model, params_0, taus) for model in merged]
    return Candidate(vectors, values, merge.METHODS["cart"].coef)


def _vector(merged, params_0, taus):
    moved = task_vectors.difference(merged, params_0)
    return tree.restrict(moved, tree.flatten(taus[0]))


def measured(
    study: studies.Study, kind: str, taus: Taus, candidate: Candidate
) -> dict[str, np.ndarray]:
    """Returns accuracies `[values, T]` on validation and test data."""
    one = len(candidate.vectors) == 1
    if kind == "nonlinear":
        at = [evaluation.ordinary_along(study, v, "merge") for v in candidate.vectors]
        coefs = candidate.values if one else (1.0,)
        return {
            split: np.concatenate([of(split, coefs) for of in at])
            for split in evaluation.SPLITS
        }
    outputs = evaluation.outputs_of(study, candidate.vectors, "merge")
    rows = np.outer(candidate.values, [1.0]) if one else np.eye(len(candidate.values))
    return {
        split: np.array(
            [evaluation.linearized_at(study, split, outputs, row) for row in rows]
        )
        for split in evaluation.SPLITS
    }


def chosen(candidate: Candidate, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns test accuracies in %, at the published and at the searched value."""
    means = {split: 100 * of.mean(axis=1) for split, of in found.items()}
    best = int(means["validation"].argmax())
    row = {"searched": means["test"][best], "value": candidate.values[best]}
    if candidate.default is not None:
        row["default"] = means["test"][candidate.values.index(candidate.default)]
    return {name: float(value) for name, value in row.items()}


def of_seed(config: Config) -> dict[tuple[str, str], dict[str, float]]:
    """Returns the accuracies of one seed by (kind of vectors, name of the method)."""
    own = small_study.Config(
        tasks=config.tasks,
        steps=config.steps,
        samples=config.samples,
        seed=config.seed,
        smoke=config.smoke,
        out=config.out / f"seed_{config.seed}",
        mesh=config.mesh,
        resume=config.resume,
    )
    own.out.mkdir(parents=True, exist_ok=True)
    study, found = small_study.prepare(own), {}
    for kind in config.kinds:
        recipe = training.recipe_of(own, kind, "cyclic" if kind == "cyclic" else None)
        taus = training.fine_tune(study, kind, recipe)
        single = (
            evaluation.ordinary_single(study, taus)
            if kind == "nonlinear"
            else evaluation.linearized_single(study, evaluation.outputs_of(study, taus))
        )
        alone = 100 * float(np.mean(single["test"]))
        found[kind, "each alone"] = {"searched": alone}
        merges = [*candidates(study.params_0, taus, study.blocks, config)]
        if kind == "nonlinear":  # these merges run the merged vectors as networks
            merges += looking(study, taus, config)
        bar = tqdm(merges, unit="row")
        for name, merged in bar:
            if config.methods and name not in ("task_arithmetic", *config.methods):
                continue
            bar.set_description(f"seed {config.seed}, {KINDS[kind]}, {name}")
            candidate = merged()
            row = chosen(candidate, measured(study, kind, taus, candidate))
            found[kind, name] = row
    return found


def ranked(found: list[dict], kind: str) -> list[dict]:
    """Returns the rows of one kind of vectors, sorted by the searched mean."""
    names = [name for of_kind, name in found[0] if of_kind == kind]
    rows = []
    for name in names:
        own = [seed[kind, name] for seed in found]
        row: dict = {"method": name}
        for column in ("searched", "default"):
            values = [one[column] for one in own if column in one]
            row[column] = float(np.mean(values)) if values else None
            several = len(values) > 1
            row[f"{column} ±"] = float(np.std(values, ddof=1)) if several else None
        row["chosen"] = [one["value"] for one in own if "value" in one]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["searched"])


@script.full_precision
def main(config: Config) -> dict:
    if config.smoke:
        small = {"tasks": config.tasks[::2], "steps": 3, "samples": 40, "seeds": 1}
        config = dataclasses.replace(config, **small)
    if unknown := set(config.kinds) - set(KINDS):
        raise ValueError(
            f"--kinds has unknown {sorted(unknown)}; expected kinds out of "
            f"{', '.join(KINDS)}."
        )
    small_tasks.check(config.tasks)
    runs.start(config)
    runs.claim(config)
    seeds = range(config.seed, config.seed + config.seeds)
    found = [of_seed(dataclasses.replace(config, seed=seed)) for seed in seeds]
    rows = {kind: ranked(found, kind) for kind in config.kinds}
    shown = {
        f"{KINDS[kind]} vectors: test accuracy in percent, mean and deviation over "
        f"{tree.counted(config.seeds, 'seed')}, the best first.": [
            row | {"chosen": ", ".join(f"{value:g}" for value in row["chosen"])}
            for row in rows[kind]
        ]
        for kind in config.kinds
    }
    results = {"tasks": list(config.tasks), "seeds": config.seeds, "rows": rows}
    title = "Merges, ranked"
    return tables.write(config.out, title, shown, results, digits=1)


if __name__ == "__main__":
    script.run(Config, main)
