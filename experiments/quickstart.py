"""From a checkpoint to a merged model, on six small tasks, in a few minutes.

Loads a CLIP, fine-tunes its image encoder on every task in three ways (ordinary,
linearised, linearised with the τJp penalty), turns the results into task vectors,
merges them, evaluates, and writes a table, figures, task vectors and a merged model.

    python -m experiments.quickstart --out runs/quickstart
    python -m experiments.quickstart --out runs/modes --modes cyclic mixed strict

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025. This is its Tables 1 and 6 in miniature.
"""

import dataclasses
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

from experiments.common import studies
from experiments.common.vision import small_tasks
from jaxarith import hub, tree
from jaxarith.data import images
from jaxarith.models import clip, heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(studies.Config):
    """Fine-tune, merge and evaluate on six small tasks."""

    model: Path = clip.TINY_CLIP
    """Folder of a CLIP checkpoint; the embedded tiny one by default."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    """The tasks, in order; in a smoke run about three of them."""


def prepare(config: Config) -> studies.Study:
    """Loads the model, the tasks and their zero-shot heads."""
    model = clip.load(config.model)
    preprocess = images.Preprocessing.from_folder(model.folder)
    tasks = [
        small_tasks.load(name, preprocess, config.samples)
        for name in tqdm(config.tasks, desc="tasks", unit="task")
    ]
    head_of = [clip.zero_shot_head(model, t.classes, t.templates) for t in tasks]

    def datasets(split):
        sources = [getattr(task, split) for task in tasks]
        return studies.datasets(sources, head_of, heads.logits, 128)

    return studies.Study(
        config=config,
        model=model,
        apply_fn=clip.image_encoder(model.config),
        params_0=tree.select(model.params, clip.IMAGE_ENCODER),
        trained=".*",
        blocks=clip.BLOCK_LINEAR_WEIGHTS,
        inputs=("image",),
        token_mask=None,
        logits=heads.logits,
        merged_config=hub.read_json(model.folder),
        names=list(config.tasks),
        classes=[task.classes for task in tasks],
        sources=[task.train for task in tasks],
        validation=datasets("validation"),
        test=datasets("test"),
    )


def main(config: Config) -> dict:
    """Runs the study; returns what `report.json` holds."""
    studies.check(config.tasks)
    if config.smoke:
        config = dataclasses.replace(
            config,
            tasks=config.tasks[:: max(len(config.tasks) // 3, 1)],
            **dict(steps=4, batch_size=8, penalty_batch_size=8, samples=48),
        )
    return studies.run(config, prepare, "Small tasks, merged")


if __name__ == "__main__":
    # Full float32 on accelerators too: a task vector is a small difference.
    with jax.default_matmul_precision("float32"):
        main(tyro.cli(Config))
