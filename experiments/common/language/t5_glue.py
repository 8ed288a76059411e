"""A T5 that answers MRPC, RTE, CoLA and SST-2 in words: tasks, vectors, scores.

The vectors are those of `tau_jp.METHODS`. The logits of the whole model are linearised,
and the penalty reads the inputs of the other three tasks.

The code of the τJp paper decides what the paper leaves open:

- FLAN-T5 small, a batch of 16, 2000 steps at a constant 1e-5 without weight decay and
  clipping; a validation part as large as GLUE's own, which is the test part.
- The penalty looks at the logits of the first decoder position only, given the start
  token, of which it is the mean of the magnitudes. The paper prints the squared L2
  norm: `--penalty-norm l2 --penalty-power 2`, which wants a λ of its own.
- The score is of tokens: each token of the true answer, its end among them, is
  predicted from those before it. For CoLA it is Matthews correlation with every token a
  class, for the others the share of tokens that are right. It is no accuracy of a task;
  `rank_scores` has those, by rank classification (Ilharco et al. 2023) and the official
  metrics of GLUE.
- Their evaluation of linearised vectors runs the network at θ0 + ατ
  (`--no-tangent-scores`); here it is the linearised model, as the paper says. They
  train with dropout, in part; this T5 has none.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import bank, runs, script, training
from experiments.common.language import tau_jp, text_to_text
from experiments.common.language.text_to_text import INPUTS as INPUTS
from jaxarith import evaluate, metrics, tangent, task_vectors
from jaxarith import tau_jp as penalty
from jaxarith.data import glue, language, pipeline
from jaxarith.losses import IGNORED
from jaxarith.models import t5
from jaxarith.typing import ApplyFn, Params, Taus, Tree

TASKS = ("mrpc", "rte", "cola", "sst2")  # in the order of the tables
FIRST = "first_token"  # the field that is 1 at the first decoder position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(text_to_text.Options, tau_jp.Options):
    """The options of scripts on these vectors."""

    model: str = "google/flan-t5-small"
    """A T5: a folder, or an id of the Hugging Face Hub."""
    steps: int = 2000
    penalty_coef: float = 0.1
    """λ, the weight of the τJp penalty. 0.1 is that of the paper's code, for the mean
    of magnitudes; the paper chooses it among 0.001, 0.01 and 0.1 on CoLA."""
    penalty_norm: penalty.Norm = "mean_absolute"
    """The norm of the logits: the mean of their magnitudes, as in the paper's code, or
    Euclidean (l2), which at the same λ is 225 to 253 times as strong."""
    tangent_scores: bool = True
    """Score linearised vectors in the tangent space, as the paper says;
    --no-tangent-scores runs the network at θ0 + ατ, as its code does."""
    max_length: int = 512
    """Tokens of a text, to which all are padded; longer ones lose their end."""


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      train: its training source.
      parts: batches to evaluate on, of "validation" and "test".
      candidates: the answers to choose from, `[C, T]`.
    """

    train: list[dict]
    parts: dict[str, list[dict]]
    candidates: np.ndarray


class Model(NamedTuple):
    """The T5, or its linearisation, with task vectors to be added to it.

    Attributes:
      apply_fn: `apply_fn(params, *INPUTS) -> logits`.
      params_0: its parameters without a task vector.
      moved: from a task vector to what is added to them.
    """

    apply_fn: ApplyFn
    params_0: Params
    moved: Callable[[Tree], Tree]

    def likeliest(self, params: Params, *inputs) -> jax.Array:
        """The likeliest token at every position of the decoder."""
        return jnp.argmax(self.apply_fn(params, *inputs), axis=-1)


class Study(NamedTuple):
    """What every method starts from.

    Attributes:
      config: the options.
      base: the T5.
      tasks: the tasks, by name.
      models: what is scored, by method.
      wanted: how the vectors are trained, by method.
    """

    config: Options
    base: text_to_text.Base
    tasks: dict[str, Task]
    models: dict[str, Model]
    wanted: dict[str, list[training.Wanted]]


def start(config: Options) -> Study:
    """Loads and checks everything, and claims the folder."""
    script.needs("text", "sklearn", "transformers")
    if not config.smoke:
        script.needs("text", "datasets")
    config = runs.smaller(
        config,
        model="tiny_t5",
        steps=4,
        max_length=24,
        learning_rate=1e-2,
    )
    mesh = runs.start(config)
    base = text_to_text.load(config, mesh, config.model)
    tasks = _tasks(config, base)
    net = network(base.checkpoint)
    linear = linearized(base.checkpoint) if config.tangent_scores else net
    study = Study(
        config=config,
        base=base,
        tasks=tasks,
        models={"nonlinear": net, "linear": linear, "tau_jp_cyclic": linear},
        wanted={
            method: wanted(config, base, tasks, method) for method in tau_jp.METHODS
        },
    )
    for method in tau_jp.METHODS:
        training.check(trainer(study, method), study.wanted[method])
    runs.claim(config)
    return study


def _tasks(config: Options, base: text_to_text.Base) -> dict[str, Task]:
    """The tasks as tokens, all of the same lengths."""
    answers = {
        name: language.candidates(base.tokenizer, glue.TASKS[name].classes)
        for name in TASKS
    }
    length = max(found.shape[1] for found in answers.values())
    first = (np.arange(length) == 0).astype(np.int32)

    def source(name, part):
        records = glue.text_to_text(glue.TASKS[name], part)
        rows = text_to_text.training_source(base, records, length)
        return [row | {FIRST: first} for row in rows]

    found = {}
    for name in TASKS:
        texts = text_to_text.glue_task(config, name, config.seed)
        batches = {
            part: pipeline.evaluation_batches(
                source(name, getattr(texts, part)), config.evaluation_batch
            )
            for part in ("validation", "test")
        }
        room = [(0, 0), (0, length - answers[name].shape[1])]
        candidates = np.pad(answers[name], room, constant_values=IGNORED)
        found[name] = Task(source(name, texts.train), batches, candidates)
    return found


def network(checkpoint: t5.T5) -> Model:
    """The T5 itself."""
    apply_fn = t5.language_model(checkpoint.config)
    return Model(apply_fn, checkpoint.params, lambda tau: tau)


def linearized(checkpoint: t5.T5) -> Model:
    """Its parameters are `{"params_0": ..., "tau": ...}`: no sum of both is rounded."""
    logits = t5.language_model(checkpoint.config)

    def apply_fn(params, *inputs):
        outputs, moves = tangent.jvp(logits, params["params_0"], params["tau"], *inputs)
        return outputs + moves

    zero = jax.tree.map(np.zeros_like, checkpoint.params)
    params_0 = {"params_0": checkpoint.params, "tau": zero}
    return Model(apply_fn, params_0, lambda tau: {"tau": tau})


# Training.


def candidate(method: str, coef: float) -> str:
    """The folder in the bank of a method's vectors at a weight λ of the penalty."""
    return f"{method}_coef_{coef:g}"


def wanted(
    config: Options,
    base: text_to_text.Base,
    tasks: Mapping[str, Task],
    method: str,
    folder: str | None = None,
) -> list[training.Wanted]:
    """How the vectors of a method are trained.

    Args:
      config: the options.
      base: the T5.
      tasks: the tasks, by name.
      method: one of `tau_jp.METHODS`.
      folder: the folder in the bank; by default that of the method or, where the bank
        has it, that of the method's candidate of the same λ.
    """
    recipe = tau_jp.recipe(config, method, steps=config.steps)
    checksums = {name: bank.checksum(task.train) for name, task in tasks.items()}
    found = []
    for name in TASKS:
        # T_orth: the tasks that a task vector must not disturb.
        others = [other for other in TASKS if other != name] if recipe.penalty else []
        own = candidate(method, config.penalty_coef)
        place = functools.partial(bank.vector_file, config.bank, config.model)
        known = recipe.penalty is not None and place(own, name).exists()
        one = training.Wanted(
            name=name,
            file=place(folder or (own if known else method), name),
            recipe=recipe,
            identity={
                "method": method,
                "others": {other: checksums[other] for other in others},
                "params_0": base.fingerprint,
                "max_length": config.max_length,
                "samples": checksums[name],
            },
            source=tasks[name].train,
            others={other: tasks[other].train for other in others},
        )
        found.append(one)
    return found


def trainer(study: Study, method: str) -> training.Network:
    """What the vectors of a method are trained from."""
    return text_to_text.network(study.base)._replace(title=method, penalty_mask=FIRST)


def vectors(study: Study, method: str) -> list[Tree]:
    """The task vectors of a method, from the bank or trained."""
    return training.vectors(study.config, trainer(study, method), study.wanted[method])


# Scores.


class Scores(NamedTuple):
    """Test scores on every task."""

    tokens: list[float]
    rank: list[float]


def token_score(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """The score of the paper's code, of the likeliest tokens `[N, T]`."""
    counts = labels != IGNORED
    if "matthews" in glue.TASKS[name].metrics:
        return metrics.matthews(predicted[counts], labels[counts])
    return float(np.mean(predicted[counts] == labels[counts]))


def token_scores(
    study: Study, method: str, added: Taus, part: str
) -> Callable[[float], list[float]]:
    """The score of tokens on every task, as a function of the coefficient.

    Args:
      study: the tasks and models.
      method: the method of the model.
      added: the vector that is added to the model, for each task.
      part: "validation" or "test".
    """
    model, outputs, labels = study.models[method], {}, {}
    for name, tau in zip(TASKS, added, strict=True):
        batches = study.tasks[name].parts[part]
        outputs[name] = evaluate.forward(
            model.likeliest,
            model.params_0,
            [model.moved(tau)],
            batches,
            INPUTS,
            mesh=study.base.mesh,
        )
        labels[name] = np.concatenate(
            [batch["labels"][batch["mask"]] for batch in batches]
        )

    def at(coef):
        return [
            token_score(name, outputs[name]([coef]), labels[name]) for name in TASKS
        ]

    return at


def rank_scores(study: Study, method: str, added: Taus, coef: float) -> list[float]:
    """The official metrics of rank classification on every task's test part."""
    model, found = study.models[method], []
    for name, tau in zip(TASKS, added, strict=True):
        task = study.tasks[name]
        batches = task.parts["test"]
        edited = task_vectors.apply(model.params_0, model.moved(tau), coef)
        chosen = text_to_text.ranked(
            study.base, edited, batches, task.candidates, model.apply_fn
        )
        found.append(glue.score(glue.TASKS[name], chosen, evaluate.labels(batches)))
    return found


def scores(study: Study, method: str, added: Taus, coef: float) -> Scores:
    """The test scores by both metrics; arguments as for `token_scores`."""
    tokens = token_scores(study, method, added, "test")(coef)
    return Scores(tokens, rank_scores(study, method, added, coef))
