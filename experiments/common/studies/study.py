"""The inputs of a study: options, a model, tasks and their frozen heads."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import curvatures, runs, study_merges
from jaxarith import evaluate, losses, sharding, tau_jp
from jaxarith.data import pipeline
from jaxarith.models import heads
from jaxarith.typing import ApplyFn, Params

# `logits(head, features, valid) -> [B, C]`, as in `jaxarith.models.heads`.
Logits = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(curvatures.Options, runs.Options):
    """The options that all studies have."""

    model: Path | str
    """A checkpoint: a folder, or an id on the Hugging Face Hub."""
    modes: tuple[tau_jp.Mode, ...] = ("cyclic",)
    """Modes of the τJp penalty, each trained and reported."""
    curvature: bool = True
    """Also train linearised models with the curvature of the other tasks, which uses
    statistics of their samples instead of the samples."""
    merges: tuple[study_merges.Merge, ...] = study_merges.ALL
    """Merges of the ordinary vectors, in addition to task arithmetic."""
    steps: int = 200
    """Optimizer steps of every training."""
    batch_size: int = 64
    """Samples per step and task."""
    learning_rate: float = 1e-3
    """The largest learning rate, reached after a tenth of the steps."""
    penalty_coef: float = 0.1
    """Weight of the τJp penalty."""
    penalty_batch_size: int | None = None
    """Samples of the penalty per step; an eighth of the batch by default."""
    samples: int | None = None
    """The largest number of samples of a split; all by default."""
    seed: int = 0
    """Seed of the order of samples and of random merges."""
    smoke: bool = False
    """Run the whole study with few steps, samples and coefficients; the results mean
    nothing."""


class Dataset(NamedTuple):
    """One split of one task, with the task's frozen head.

    Attributes:
      batches: dicts of arrays, as `pipeline.evaluation_batches` makes them.
      labels: the labels of all samples, `[N]`.
      head: the head, `[C, D]`.
      padded: the head in the shape that all tasks share, and the mask of its classes;
        see `heads.pad`. Functions of it are compiled once for all tasks.
      logits: `logits(head, features, valid)`.
    """

    batches: list[dict]
    labels: np.ndarray
    head: jax.Array
    padded: dict[str, jax.Array]
    logits: Logits

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predicts the classes `[N]` of features `[N, D]`."""
        # Few shapes: otherwise every dataset size would need a compilation.
        filling = -len(features) % 1024
        rows = np.pad(features, ((0, filling), (0, 0)))
        return np.asarray(_predict(self.logits, self.padded, rows))[: len(features)]

    def accuracy(self, features: np.ndarray) -> float:
        return float(np.mean(self.predict(features) == self.labels))


@functools.partial(jax.jit, static_argnums=0)
def _predict(logits, head, features):
    return logits(head["head"], features, head["valid"]).argmax(-1)


class Study(NamedTuple):
    """The inputs of every method.

    Attributes:
      config: the options.
      model: a checkpoint with `params`, `folder` and `config`.
      apply_fn: `apply_fn(params, *inputs) -> features[B, D]`; this is linearised.
      params_0: the pre-trained parameters that `apply_fn` reads.
      trained: pattern of the paths in `params_0` that are trained.
      blocks: pattern of the linear weights, the only ones that AWD merges.
      inputs: the fields of a batch that `apply_fn` takes.
      token_mask: the field that is true where a token counts; None without tokens.
      logits: `logits(head, features, valid) -> [B, C]`.
      merged_config: content of the merged checkpoint's config.json.
      names: the names of the tasks.
      classes: for each task, the names of its classes.
      sources: for each task, its training samples.
      validation, test: for each task, its other splits.
    """

    config: Config
    model: Any
    apply_fn: ApplyFn
    params_0: Params
    trained: str
    blocks: str
    inputs: tuple[str, ...]
    token_mask: str | None
    logits: Logits
    merged_config: dict
    names: list[str]
    classes: list
    sources: list
    validation: list[Dataset]
    test: list[Dataset]

    @property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh)

    def loss(self, features, batch, constants):
        logits = self.logits(constants["head"], features, constants["valid"])
        return losses.cross_entropy(logits, batch["label"])


@functools.cache  # returns the same function again, so compiled programs are reused
def classifier(apply_fn: ApplyFn, logits: Logits) -> ApplyFn:
    """Makes a study's network with a task's head among its parameters.

    Returns:
      `f(params, *inputs) -> logits[B, C]`, for parameters
      `{"encoder": params, "head": dataset.padded}`.
    """

    def apply(params, *inputs):
        features = apply_fn(params["encoder"], *inputs)
        return logits(params["head"]["head"], features, params["head"]["valid"])

    return apply


def datasets(
    sources: Sequence, head_of: Sequence[jax.Array], logits: Logits, batch_size: int
) -> list[Dataset]:
    """Prepares one split of all tasks for evaluation.

    Args:
      sources: for each task, its samples.
      head_of: for each task, its head `[C, D]`.
      logits: `logits(head, features, valid)`.
      batch_size: number of samples to evaluate at a time.
    """
    padded = jax.tree.map(np.asarray, heads.pad(head_of))
    batches = [pipeline.evaluation_batches(source, batch_size) for source in sources]
    return [
        Dataset(
            batches=own,
            labels=evaluate.labels(own),
            head=head,
            padded=jax.tree.map(lambda leaf, task=task: leaf[task], padded),
            logits=logits,
        )
        for task, (own, head) in enumerate(zip(batches, head_of, strict=True))
    ]


def check(names: Sequence[str]) -> None:
    """Raises a ValueError for tasks that a study cannot use."""
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"merging needs at least two tasks, each once; got {list(names)}."
        )
    if wrong := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(
            f"the task {wrong[0]!r} cannot be the name of a file; use letters, digits "
            "and - . _"
        )
