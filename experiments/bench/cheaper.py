"""Cheaper tangent-space training: sampled penalties, and attention weights alone.

Trains the quickstart's tasks in the tangent space in several ways and compares the
merged models at equal time: every variant gets the optimizer steps that take as long
as `--steps` steps with the cyclic τJp penalty. Variants that cost more, and variants
that train only the attention weights, are also trained for equal steps.

    python -m experiments.bench.cheaper --out runs/cheaper

Seconds per step are medians over steps that the variants take in turn, on batches made
before: neither compilation nor the making of batches counts. A seed changes the order
of the samples and the draws of the penalty; the data and the pre-trained model stay the
same.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025. Jin et al. Fine-Tuning Linear Layers Only Is a Simple yet
Effective Way for Task Arithmetic. 2024. Jin et al. train ordinary models; here the
attention weights are trained in the tangent space.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.bench import measure
from experiments.common import script, studies
from experiments.common.vision import small_study, small_tasks
from jaxarith import plots, report, tau_jp, train, tree
from jaxarith.models import clip, heads


class Variant(NamedTuple):
    """A way to train in the tangent space.

    Attributes:
      penalty: the mode of the τJp penalty; None for no penalty.
      trained: pattern of the paths that are trained.
      equal_steps: whether to train it for equal steps too.
    """

    penalty: tau_jp.Mode | None = None
    trained: str = ".*"
    equal_steps: bool = False


def attention(penalty: tau_jp.Mode | None) -> Variant:
    """Makes a variant that trains only attention weights: paradigm 1 of Jin et al."""
    return Variant(penalty, clip.ATTENTION_WEIGHTS, equal_steps=True)


REFERENCE = "cyclic"
VARIANTS = {
    "linear": Variant(),
    "cyclic": Variant("cyclic"),
    "mixed": Variant("mixed"),
    "strict": Variant("strict", equal_steps=True),
    "attention": attention(None),
    "attention+cyclic": attention("cyclic"),
    "attention+mixed": attention("mixed"),
}
LEGEND = """\
Accuracies on test data: mean over seeds ± sample standard deviation
(smallest..largest). "Normalised" and "absolute" are for the sum of all task vectors,
with coefficient 1 or, if "searched", the coefficient chosen on validation data.
"Individual" is for every vector on its own task. Seconds and FLOPs are for an optimizer
step of all tasks; the ratio is to the seconds with the cyclic penalty."""
# The values that are averaged over seeds, and their names in the table.
MEASURES = {
    "normalized": "normalised",
    "searched_normalized": "normalised (searched)",
    "absolute": "absolute",
    "individual": "individual",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare cheaper tangent-space training at equal time."""

    out: Path
    """Folder for results.jsonl (a line per training), report.json, report.md, a figure,
    logs and task vectors."""
    model: Path = clip.TINY_CLIP
    """Folder of a CLIP checkpoint; the embedded tiny one by default."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    """The tasks, in order."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to train. Steps of `cyclic` are always timed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    """Steps with the cyclic penalty; the other variants get the same time."""
    timed_steps: int = 10
    """Steps of each variant that are timed."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    penalty_coef: float = 0.1
    """Weight of the τJp penalty."""
    samples: int | None = None
    """The largest number of samples of a split; all by default."""


def recipe_of(config: studies.Config, variant: str) -> train.TrainConfig:
    penalty, trained, _ = VARIANTS[variant]
    recipe = studies.recipe_of(config, "linear", penalty)
    return dataclasses.replace(recipe, trained=trained)


def compiled_step(study: studies.Study, recipe: train.TrainConfig):
    """Compiles an optimizer step of all tasks.

    Returns:
      The compiled step, its first state, and its other arguments.
    """
    objective = train.objective(study.apply_fn, study.loss, recipe)
    state = train.init_state(study.params_0, recipe, len(study.names))
    batch = train.task_batches(study.sources, recipe, names=study.names)[0]
    constants = heads.pad([dataset.head for dataset in study.test])
    arguments = jax.device_put((study.params_0, batch, constants))
    step = train.make_step(objective, recipe)
    return step.lower(state, *arguments).compile(), state, arguments


def stepping(step, state, arguments) -> Callable:
    """Returns a function that takes one more step with every call."""

    def run():
        nonlocal state  # a step donates the state that it is passed
        state, _ = step(state, *arguments)
        return state

    return run


def measure_costs(
    study: studies.Study, variants: Sequence[str], repetitions: int
) -> dict[str, dict]:
    """Measures seconds, FLOPs and trained entries of an optimizer step of all tasks.

    The variants run in turn, so that other work of the machine slows all of them alike.
    """
    tasks = len(study.names)
    runs, counted = {}, {}
    for name in tqdm(variants, desc="compile", unit="variant"):
        step, state, arguments = compiled_step(study, recipe_of(study.config, name))
        counted[name] = {
            # XLA counts the body of the loop over tasks once.
            "flops_per_step": tasks * step.cost_analysis()["flops"],
            "trained_entries": tree.size(state[0]) // tasks,
        }
        runs[name] = stepping(step, state, arguments)
    total = len(variants) * (1 + repetitions)
    with tqdm(total=total, desc="seconds per step", unit="step") as bar:
        times = measure.alternated(runs, repetitions, bar.update)
    seconds = {name: float(np.median(taken)) for name, taken in times.items()}
    return {
        name: {
            "seconds_per_step": seconds[name],
            "ratio": seconds[name] / seconds[REFERENCE],
            **counted[name],
        }
        for name in variants
    }


def steps_in_time(steps: int, ratio: float) -> int:
    """Returns the steps that take as long as `steps` of the reference, at least one.

    Args:
      steps: steps of the reference.
      ratio: seconds per step over the reference's.

    Example:
      >>> steps_in_time(200, 1.6)
      125
    """
    return max(round(steps / ratio), 1)


def trainings(
    variants: Sequence[str], steps: int, ratios: Mapping[str, float]
) -> list[tuple[str, str, int]]:
    """Lists the trainings for every seed: `(variant, budget, steps)`."""
    found = []
    for name in variants:
        found.append((name, "equal time", steps_in_time(steps, ratios[name])))
        if VARIANTS[name].equal_steps:
            found.append((name, "equal steps", steps))
    return found


def train_and_evaluate(study: studies.Study, variant: str, budget: str) -> dict:
    """Makes one line of results.jsonl, with the steps and the seed of the study."""
    config = study.config
    method = f"{variant}_{budget.replace(' ', '_')}_seed_{config.seed}"
    start = time.perf_counter()
    taus = studies.fine_tune(study, method, recipe_of(config, variant))
    seconds = time.perf_counter() - start
    outputs = studies.outputs_of(study, taus)
    single = studies.linearized_single(study, outputs)
    along = studies.linearized_sum(study, outputs)
    (one, searched), _ = studies.merge_rows(
        study, method, "task_arithmetic", along, single
    )
    return {
        "variant": variant,
        "budget": budget,
        "seed": config.seed,
        "steps": config.steps,
        "training_seconds": round(seconds, 2),
        "normalized": one["normalized"],
        "absolute": one["absolute"],
        "searched_coef": searched["coef"],
        "searched_normalized": searched["normalized"],
        "searched_absolute": searched["absolute"],
        "individual": float(np.mean(single["test"])),
        "per_task": one["per_task"],
        "individual_per_task": dict(zip(study.names, single["test"], strict=True)),
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, sample standard deviation (None for one value), and extremes."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": float(np.mean(values)),
        "std": deviation,
        "min": min(values),
        "max": max(values),
    }


def summarize(rows: Sequence[dict]) -> list[dict]:
    """Summarises rows over seeds, by variant and budget in order of appearance."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["budget"]), []).append(row)
    shared = ["variant", "budget", "steps", "seconds_per_step", "ratio"]
    shared += ["flops_per_step", "trained_entries"]
    return [
        {name: group[0][name] for name in shared}
        | {"seeds": [row["seed"] for row in group]}
        | {name: spread([row[name] for row in group]) for name in MEASURES}
        for group in groups.values()
    ]


def table(summary: Sequence[dict]) -> str:
    """Returns the summary as a Markdown table."""

    def text(found):
        if found["std"] is None:
            return f"{found['mean']:.3f}"
        ends = f"({found['min']:.3f}..{found['max']:.3f})"
        return f"{found['mean']:.3f} ± {found['std']:.3f} {ends}"

    header = ["variant", "budget", "steps", "s/step", "ratio", "GFLOP/step"]
    header += ["trained entries", *MEASURES.values()]
    cells = [
        [
            *(row["variant"], row["budget"], row["steps"], row["seconds_per_step"]),
            *(row["ratio"], row["flops_per_step"] / 1e9, row["trained_entries"]),
            *(text(row[name]) for name in MEASURES),
        ]
        for row in summary
    ]
    return report.markdown_table(header, cells)


def figure(path, rows: Sequence[dict], seeds: Sequence[int]):
    """Draws a bar for each seed of every variant and budget."""
    labels = list(dict.fromkeys(f"{r['variant']}\n{r['budget']}" for r in rows))
    values = {
        f"seed {seed}": [row["normalized"] for row in rows if row["seed"] == seed]
        for seed in seeds
    }
    plots.bars(path, values, labels, y="normalised accuracy (coefficient 1)")


def check(config: Config):
    """Refuses options that would fail, or lose results, after long work."""
    for option in ("tasks", "variants", "seeds"):
        values = getattr(config, option)
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{option} are {list(values)}; give at least one, and each once."
            )
    if len(config.tasks) < 2:
        raise ValueError(
            f"merging needs at least two tasks; got {', '.join(config.tasks)}."
        )
    if unknown := [name for name in config.variants if name not in VARIANTS]:
        raise ValueError(
            f"unknown variants {unknown}; known are {', '.join(VARIANTS)}."
        )
    if config.timed_steps < 1:
        raise ValueError(f"timed_steps is {config.timed_steps}; at least 1 is needed.")
    if (config.out / "results.jsonl").exists():
        raise ValueError(f"{config.out} holds results; give another folder in out.")


@script.full_precision
def main(config: Config) -> dict:
    """Measures, trains, prints and writes; returns the content of `report.json`."""
    check(config)
    study = small_study.prepare(small_study.alone(config))
    timed = list(dict.fromkeys([REFERENCE, *config.variants]))
    costs = measure_costs(study, timed, config.timed_steps)
    ratios = {name: cost["ratio"] for name, cost in costs.items()}
    # Seeds are outermost, so that a run that is cut short has compared all variants.
    work = [
        (seed, *training)
        for seed in config.seeds
        for training in trainings(config.variants, config.steps, ratios)
    ]
    machine, rows = measure.machine(), []
    config.out.mkdir(parents=True, exist_ok=True)
    options = dataclasses.asdict(config)
    options |= {"out": config.out.name, "model": config.model.name}
    report.write_json(config.out / "config.json", options)
    with open(config.out / "results.jsonl", "x") as file:
        for seed, variant, budget, steps in tqdm(work, unit="training"):
            options = dataclasses.replace(study.config, steps=steps, seed=seed)
            row = train_and_evaluate(study._replace(config=options), variant, budget)
            rows.append(row | costs[variant])
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    results = {
        "machine": machine,
        "costs": costs,
        "rows": rows,
        "summary": summarize(rows),
    }
    figure(config.out / "normalized.png", rows, config.seeds)
    parts = [measure.named(machine), LEGEND, table(results["summary"])]
    title = "Cheaper tangent-space training"
    return measure.write(config.out, title, parts, results)


if __name__ == "__main__":
    script.run(Config, main)
