"""Fine-tuning of all tasks of a study, and the files of their task vectors."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
from tqdm import tqdm

from experiments.common import curvatures, runs
from experiments.common.studies.study import Config, Study
from jaxarith import curvature, hub, sharding, tau_jp, train
from jaxarith.models import heads
from jaxarith.sharding import processes
from jaxarith.typing import Source, Tree


def recipe_of(
    config: Config, method: str, penalty: tau_jp.Mode | train.Form | None
) -> train.TrainConfig:
    """The recipe of a method; all methods but `nonlinear` are linearised."""
    is_form = penalty in get_args(train.Form)
    return train.TrainConfig(
        steps=config.steps,
        warmup_steps=config.steps // 10,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        linearized=method != "nonlinear",
        penalty=penalty,
        penalty_coef=config.curvature_coef if is_form else config.penalty_coef,
        penalty_batch_size=config.penalty_batch_size or max(config.batch_size // 8, 1),
        seed=config.seed,
    )


def batches_of(study: Study, recipe: train.TrainConfig) -> Source:
    return train.task_batches(
        study.sources,
        recipe,
        names=study.names,
        inputs=study.inputs,
        mesh=sharding.for_tasks(study.mesh, len(study.sources)),
    )


def is_trained(study: Study, method: str) -> bool:
    """Whether the vectors of a method exist and the run may reuse them."""
    return study.config.resume and all(file.exists() for file in _files(study, method))


def _files(study, method):
    folder = runs.vectors(study.config) / method
    return [folder / f"{name}.safetensors" for name in study.names]


def curvature_of(study: Study) -> list[curvature.Factors]:
    """For each task the curvature of all other tasks, from their training samples."""
    config, found = study.config, []
    progress = tqdm(study.sources, desc="curvature", unit="task")
    for number, source in enumerate(progress):
        found.append(
            curvatures.collected(
                study.apply_fn,
                study.params_0,
                curvatures.drawn(source, config.curvature_samples, config.seed),
                inputs=study.inputs,
                key=jax.random.fold_in(jax.random.key(config.seed), number),
                mesh=study.mesh,
                rank=config.curvature_rank,
                select=study.trained,
            )
        )
    merged = curvature.others(found)
    return (
        [curvature.calibrate(one) for one in merged]
        if config.curvature_rank
        else merged
    )


def fine_tune(
    study: Study,
    method: str,
    recipe: train.TrainConfig,
    measured: Sequence[curvature.Curvature] | None = None,
) -> list[Tree]:
    """Trains the task vectors of a method, all tasks at once, and saves them.

    With --resume, vectors that an earlier run has saved are not trained again, and a
    run that was stopped continues from its last checkpoint.

    Args:
      study: the study.
      method: its name, also the name of the folder.
      recipe: its recipe.
      measured: for each task the curvature of the others, if the recipe needs it.
    """
    config, files = study.config, _files(study, method)
    folder = runs.vectors(config) / method
    if is_trained(study, method):
        tqdm.write(f"{method}: trained before, {folder}", file=sys.stderr)
        taus = [hub.load_tree(file)[0] for file in files]
        return [sharding.shard(tau, study.mesh) for tau in taus]
    checkpoints = runs.checkpoints(config) / method
    taus = train.fine_tune(
        study.apply_fn,
        study.params_0,
        study.loss,
        batches_of(study, recipe),
        recipe,
        names=study.names,
        constants=heads.pad([dataset.head for dataset in study.test]),
        inputs=study.inputs,
        curvature=measured,
        log=config.out / f"train_{method}.jsonl",
        mesh=sharding.for_tasks(study.mesh, len(study.sources)),
        checkpoints=checkpoints if config.save_every else None,
        save_every=config.save_every,
    )
    held = sharding.to_host(taus)

    def save():
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(str(config.model)).name  # of a folder only the last part
        for name, file, tau in zip(study.names, files, held, strict=True):
            metadata = {"model": model, "task": name, "method": method}
            hub.save_tree(file, tau, metadata)

    processes.on_first(save)
    runs.remove_checkpoints(config, checkpoints)
    return taus
