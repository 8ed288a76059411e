"""The procedure of a study: train, merge, evaluate, write."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from experiments.common import runs, study_merges
from experiments.common.studies import evaluation, report, training
from experiments.common.studies.study import Config, Study
from jaxarith import hub, merge, sharding, task_vectors, tau_jp, train, tree
from jaxarith import report as reports
from jaxarith.typing import Taus

C = TypeVar("C", bound=Config)


def run(
    config: C, prepare: Callable[[C], Study], title: str, estimate: str = ""
) -> dict:
    """Everything after the options; returns what `report.json` holds.

    Args:
      config: the options.
      prepare: loads the model and the tasks. It should find errors in the options,
        because nothing is written before it returns.
      title: the title of report.md.
      estimate: a sentence about the time that the run takes, if known. After the first
        training the run prints an estimate for its own machine.
    """
    mesh = runs.start(config)
    recipes = {
        method: training.recipe_of(config, method, penalty)
        for method, penalty in methods(config).items()
    }
    _say(plan(config), estimate)
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"):
        with _timed(seconds, "prepare"):
            study = prepare(config)
            study = study._replace(params_0=sharding.shard(study.params_0, mesh))
            for recipe in recipes.values():
                # A wrong mesh shows before the folder is made.
                training.batches_of(study, recipe)
        runs.claim(config)
        if runs.is_first():
            save_heads(study)
        taus = {}
        for method, recipe in recipes.items():
            recipe = dataclasses.replace(recipe, trained=study.trained)
            new = not training.is_trained(study, method)
            measured = None
            if recipe.form and new:
                with _timed(seconds, "curvature"):
                    measured = training.curvature_of(study)
            with _timed(seconds, f"train_{method}"):
                taus[method] = training.fine_tune(study, method, recipe, measured)
            if method == "nonlinear" and new and not config.smoke:
                left = seconds["train_nonlinear"] * work_left(study, recipes)
                _say(f"At the pace of this training about {left:.0f} s are left.")
        with _timed(seconds, "evaluate"):
            found = evaluation.evaluate_all(study, taus)
        matrices = {m: report.tau_jp_matrix(x) for m, x in found.outputs.items()}
        cosines = {
            method: np.asarray(task_vectors.cosine_matrix(vectors))
            for method, vectors in taus.items()
        }
        # Written before the figures, so that an error in drawing does not lose them.
        results = {
            "tasks": study.names,
            "rows": found.rows,
            "tau_jp": {method: m.tolist() for method, m in matrices.items()},
            "cosine": {method: m.tolist() for method, m in cosines.items()},
            "seconds": seconds,
        }
        text = report.table(found.rows, study.names)
        chosen = found.searches["nonlinear, task arithmetic"].coef
        save_merged(study, taus["nonlinear"], chosen)
        if runs.is_first():
            reports.write_json(config.out / "report.json", results)
            reports.write_text(config.out / "report.md", f"# {title}\n\n{text}\n")
            with _timed(seconds, "figures"):
                report.figures(study, found, matrices, cosines)
    if runs.is_first():
        reports.write_json(config.out / "report.json", results)  # now with all times
    _say(
        f"\n{text}\n",
        ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()),
        f"report, figures, task vectors and merged model: {config.out}\n",
        *report.summary(found.rows),
    )
    return results


def _say(*lines: str) -> None:
    if runs.is_first():
        print("\n".join(filter(None, lines)), flush=True)


def plan(config: Config) -> str:
    """A sentence on what the run is about to do."""
    ways = [report.NAMES[method] for method in methods(config)]
    return (
        f"Fine-tunes {config.model} on every task in {len(ways)} ways, "
        f"{config.steps} steps each ({', '.join(ways)}); sums the task vectors and "
        f"merges them in {len(config.merges)} other ways; evaluates; and writes a "
        f"report to {config.out}."
    )


def work_left(study: Study, recipes: dict[str, train.TrainConfig]) -> float:
    """The time after the ordinary training, as a multiple of the time of that training.

    It counts forward passes of samples. An ordinary step costs three for each sample:
    one forward, and a backward pass worth two. A linearised step costs five. Merging,
    curvature and compilation are not counted.
    """
    tasks = len(study.names)

    def training_passes(recipe):
        samples = recipe.batch_size
        if recipe.tau_jp_mode:
            others = tasks - 1 if recipe.tau_jp_mode == "strict" else 1
            samples += others * recipe.penalty_batch_size
        return tasks * recipe.steps * samples * (5 if recipe.linearized else 3)

    validation, test = (
        sum(len(dataset.labels) for dataset in split)
        for split in (study.validation, study.test)
    )
    data_free = sum(m in study_merges.MERGES for m in study.config.merges)
    fitted = len(study.config.merges) - data_free
    # Single tasks, then coefficients of task arithmetic and of every other merge.
    passes = (1 + 21 + 10 * data_free) * validation  # all share coefficient 0
    passes += (1 + 1 + 2 * (1 + data_free) + fitted) * test
    # A forward pass and a tangent for every task, of the linearised methods.
    passes += (len(recipes) - 1) * (1 + 2 * tasks) * (validation + test)
    first, *others = map(training_passes, recipes.values())
    return (passes + sum(others)) / first


def methods(config: Config) -> dict[str, tau_jp.Mode | train.Form | None]:
    """The ways to fine-tune, each with its penalty."""
    found: dict[str, tau_jp.Mode | train.Form | None]
    found = {"nonlinear": None, "linear": None}
    if config.curvature:
        found["curvature"] = "kronecker"
    found.update({f"tau_jp_{mode}": mode for mode in config.modes})
    return found


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def save_merged(study: Study, taus: Taus, coef: float) -> None:
    """Writes the sum of the ordinary vectors as a checkpoint for transformers."""
    edited = merge.task_arithmetic(study.params_0, taus, coef=coef)
    edited = sharding.to_host(edited)
    if not runs.is_first():
        return
    hub.save(
        study.config.out / "merged",
        tree.update(study.model.params, edited),
        study.merged_config,
        copy_from=study.model.folder,
        overwrite=True,  # an earlier run may have left one
    )


def save_heads(study: Study) -> None:
    """Writes the fixed heads, which every task vector needs to classify."""
    hub.save_tree(
        study.config.out / "heads.safetensors",
        {
            name: np.asarray(dataset.head)
            for name, dataset in zip(study.names, study.test, strict=True)
        },
        {
            name: json.dumps(list(classes))
            for name, classes in zip(study.names, study.classes, strict=True)
        },
    )
