"""The study of the quickstart: a CLIP's image encoder on the small image tasks."""

import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.common import script, studies
from experiments.common.vision import small_tasks
from jaxarith import hub, tree
from jaxarith.data import images
from jaxarith.models import clip, heads

_BATCH = 128  # images in a batch of an evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(studies.Config):
    """A study on small image tasks."""

    model: Path = clip.TINY_CLIP
    """Folder of a CLIP checkpoint; by default the embedded tiny CLIP."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    """The tasks, in order; a smoke run uses about three of them."""
    steps: int = 120
    """Optimizer steps of every training."""
    save_every: int = 0
    """Steps from one checkpoint to the next; 0 for no checkpoints. A stopped run keeps
    the methods that were complete, and trains the current one again (half a minute)."""


def alone(options: Any) -> Config:
    """Returns the options of a study that a benchmark trains alone, on one device.

    Args:
      options: options of the benchmark; options that a study lacks are ignored.
    """
    names = {field.name for field in dataclasses.fields(Config)}
    own = {name: value for name, value in vars(options).items() if name in names}
    return Config(**own, mesh="data=1", resume=False, save_every=0)


def prepare(config: Config) -> studies.Study:
    """Loads the model, the tasks and their zero-shot heads."""
    script.needs("demo", "PIL", "matplotlib", "mlxtend", "sklearn", "transformers")
    small_tasks.check(config.tasks)
    model = clip.load(config.model)
    raw = hub.read_json(model.folder)
    if config.smoke:
        model, raw = _shallow(model, raw)
    preprocess = images.Preprocessing.from_folder(model.folder)
    tasks = [
        small_tasks.load(name, preprocess, config.samples)
        for name in tqdm(config.tasks, desc="tasks", unit="task")
    ]
    head_of = [clip.zero_shot_head(model, t.classes, t.templates) for t in tasks]

    def datasets(sources):
        return studies.datasets(sources, head_of, heads.logits, _BATCH)

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
        merged_config=raw,
        names=list(config.tasks),
        classes=[task.classes for task in tasks],
        sources=[task.train for task in tasks],
        validation=datasets([task.validation for task in tasks]),
        test=datasets([task.test for task in tasks]),
    )


def _shallow(model: clip.CLIP, raw: dict) -> tuple[clip.CLIP, dict]:
    """Returns a CLIP with only the first layer of the image encoder.

    It compiles three times as fast.

    Args:
      model: a CLIP.
      raw: its `config.json`.
    """
    vision = dataclasses.replace(model.config.vision, num_hidden_layers=1)
    params = tree.select(model.params, r"(?!vision_model/encoder/layers/[1-9]).*")
    return (
        model._replace(
            config=dataclasses.replace(model.config, vision=vision), params=params
        ),
        raw | {"vision_config": raw["vision_config"] | {"num_hidden_layers": 1}},
    )
