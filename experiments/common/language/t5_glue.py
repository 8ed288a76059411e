"""A T5 that answers MRPC, RTE, CoLA and SST-2 in words: tasks, vectors, scores.

The methods are `tau_jp.METHODS`. The logits of the whole model are linearised. The
penalty uses the inputs of the other three tasks.

Where the τJp paper leaves something open, its code decides:

- FLAN-T5 small, a batch of 16, 2000 steps at a constant 1e-5 without weight decay and
  clipping. GLUE's validation split is the test part; a validation part of the same size
  is taken out of the training split.
- The penalty uses only the logits of the first decoder position, after the start token.
  It is the mean of their magnitudes. The paper prints the squared L2 norm instead:
  `--penalty-norm l2 --penalty-power 2`, which needs another λ.
- The score counts tokens: each token of the true answer, and its end token, is
  predicted from the tokens before it. For CoLA the score is Matthews correlation with
  every token as a class; for the other tasks it is the share of correct tokens. This is
  not the accuracy of a task. `rank_scores` returns GLUE's official metrics, by rank
  classification (editing paper).
- Their code evaluates linearised vectors by running the network at θ0 + ατ
  (`--no-tangent-scores`). Here the linearised model is evaluated, as the paper says.
  Their training partly uses dropout; this T5 has none.
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
    """Options of scripts on these vectors."""

    model: str = "google/flan-t5-small"
    """A T5: a folder, or an id of the Hugging Face Hub."""
    steps: int = 2000
    penalty_coef: float = 0.1
    """Weight λ of the τJp penalty. The paper's code uses 0.1, for the mean of
    magnitudes; the paper chooses λ among 0.001, 0.01 and 0.1 on CoLA."""
    penalty_norm: penalty.Norm = "mean_absolute"
    """The norm of the logits: the mean of their magnitudes, as in the paper's code, or
    Euclidean (l2), which is 225 to 253 times as strong at the same λ."""
    tangent_scores: bool = True
    """Score linearised vectors in the tangent space, as the paper says.
    --no-tangent-scores runs the network at θ0 + ατ, as the paper's code does."""
    max_length: int = 512
    """Number of tokens of a text; shorter texts are padded, longer ones are cut."""


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      train: its training source.
      parts: batches for evaluation, by part: "validation" and "test".
      candidates: the possible answers as tokens, `[C, T]`.
    """

    train: list[dict]
    parts: dict[str, list[dict]]
    candidates: np.ndarray


class Model(NamedTuple):
    """The T5, or its linearisation, to which task vectors are added.

    Attributes:
      apply_fn: `apply_fn(params, *INPUTS) -> logits`.
      params_0: its parameters without a task vector.
      moved: function from a task vector to the tree that is added to `params_0`.
    """

    apply_fn: ApplyFn
    params_0: Params
    moved: Callable[[Tree], Tree]

    def likeliest(self, params: Params, *inputs) -> jax.Array:
        """Returns the most likely token at every position of the decoder."""
        return jnp.argmax(self.apply_fn(params, *inputs), axis=-1)


class Study(NamedTuple):
    """The T5, the tasks, and the models and vectors of every method.

    Attributes:
      config: the options.
      base: the T5.
      tasks: the tasks, by name.
      models: the model that is scored, by method.
      wanted: descriptions of the vectors, by method.
    """

    config: Options
    base: text_to_text.Base
    tasks: dict[str, Task]
    models: dict[str, Model]
    wanted: dict[str, list[training.Wanted]]


def start(config: Options) -> Study:
    """Loads and checks everything, and claims the output folder."""
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
    """Returns the tasks as tokens, all with the same lengths."""
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
    """Returns the T5 itself as a `Model`."""
    apply_fn = t5.language_model(checkpoint.config)
    return Model(apply_fn, checkpoint.params, lambda tau: tau)


def linearized(checkpoint: t5.T5) -> Model:
    """Returns the linearised T5, with parameters `{"params_0": ..., "tau": ...}`.

    They are kept apart so that no rounding happens in their sum.
    """
    logits = t5.language_model(checkpoint.config)

    def apply_fn(params, *inputs):
        outputs, moves = tangent.jvp(logits, params["params_0"], params["tau"], *inputs)
        return outputs + moves

    zero = jax.tree.map(np.zeros_like, checkpoint.params)
    params_0 = {"params_0": checkpoint.params, "tau": zero}
    return Model(apply_fn, params_0, lambda tau: {"tau": tau})


# Training.


def candidate(method: str, coef: float) -> str:
    """Returns the folder in the bank for a method with a certain weight λ."""
    return f"{method}_coef_{coef:g}"


def wanted(
    config: Options,
    base: text_to_text.Base,
    tasks: Mapping[str, Task],
    method: str,
    folder: str | None = None,
) -> list[training.Wanted]:
    """Describes the vectors of a method for training.

    Args:
      config: the options.
      base: the T5.
      tasks: the tasks, by name.
      method: one of `tau_jp.METHODS`.
      folder: folder in the bank; by default that of the method's candidate with the
        same λ, if the bank has it, else that of the method.
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
    """Returns the network that the vectors of a method are trained from."""
    return text_to_text.network(study.base)._replace(title=method, penalty_mask=FIRST)


def vectors(study: Study, method: str) -> list[Tree]:
    """Returns the task vectors of a method; trains those that the bank lacks."""
    return training.vectors(study.config, trainer(study, method), study.wanted[method])


# Scores.


class Scores(NamedTuple):
    """Test scores on every task: by tokens, and by rank classification."""

    tokens: list[float]
    rank: list[float]


def token_score(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the score of the paper's code for the most likely tokens `[N, T]`."""
    counts = labels != IGNORED
    if "matthews" in glue.TASKS[name].metrics:
        return metrics.matthews(predicted[counts], labels[counts])
    return float(np.mean(predicted[counts] == labels[counts]))


def token_scores(
    study: Study, method: str, added: Taus, part: str
) -> Callable[[float], list[float]]:
    """Returns the token scores on every task as a function of the coefficient.

    Args:
      study: the tasks and models.
      method: the method of the model.
      added: for each task, the vector that is added to the model.
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
    """Returns GLUE's official metrics by rank classification, on every test part."""
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
    """Returns the test scores by both metrics; arguments as for `token_scores`."""
    tokens = token_scores(study, method, added, "test")(coef)
    return Scores(tokens, rank_scores(study, method, added, coef))
