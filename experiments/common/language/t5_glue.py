"""What the tables of GLUE share: tasks, task vectors, scores and rows.

The task vectors are of a T5 that answers MRPC, RTE, CoLA and SST-2 in words, ordinary
(`nonlinear`), linearised (`linear`) and linearised with the cyclic τJp penalty over the
inputs of the other three tasks (`tau_jp_cyclic`). What is linearised is the logits of
the whole model.

The code of the paper decides what the paper leaves open:

- FLAN-T5 small, a batch of 16, 2000 steps at a constant 1e-5 without weight decay and
  clipping; a validation part as large as GLUE's own, which is the test part.
- The penalty looks at the logits of the first decoder position only, given the start
  token. Their code takes the mean of absolute values over the vocabulary, which looks
  like a slip: the paper prints the L2 norm, as here, and λ is not the same for both.
- The score of the tables is of tokens: each token of the true answer, its end among
  them, is predicted from those before it. For CoLA it is Matthews correlation with
  every token a class, for the others the share of tokens that are right. It is no
  accuracy of a task, and a second table has those, by rank classification (Ilharco et
  al. 2023) and the official metrics of GLUE.
- Their evaluation of linearised vectors runs the network at θ0 + ατ; here it is the
  linearised model, as the paper says. They train with dropout, in part; this T5 has
  none.

Norm. is the score over that of the method's own single-task models. So it is in the
paper, though its row "Individual" is of Non-lin. FT alone: 79.1 / 0.898 of Linear FT on
MRPC is 88.1, not 93.5.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, runs, tables
from experiments.common.language import tiny_text
from jaxarith import (
    evaluate,
    fingerprint,
    losses,
    merge,
    metrics,
    sharding,
    tangent,
    task_vectors,
    train,
)
from jaxarith.data import glue, language, pipeline, text
from jaxarith.evaluate import rank
from jaxarith.losses import IGNORED
from jaxarith.models import t5
from jaxarith.sharding import processes
from jaxarith.typing import Params, Tree

TASKS = ("mrpc", "rte", "cola", "sst2")  # in the order of the tables
METHODS = {
    "nonlinear": "Non-lin. FT",
    "linear": "Linear FT",
    "tau_jp_cyclic": "Ours",
}
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
FIRST = "first_token"  # the field that is 1 at the first decoder position
VALUES = [f"{task} {kind}" for task in (*TASKS, "avg") for kind in ("abs", "norm")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.Options):
    """The options of both tables."""

    bank: Path = Path("bank")
    """Folder of task vectors, which all scripts share: what is there is not trained
    again."""
    model: str = "google/flan-t5-small"
    """A T5: a folder, or an id of the Hugging Face Hub."""
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-5
    """The same at every step."""
    penalty_coef: float = 0.1
    """λ, the weight of the τJp penalty."""
    penalty_batch_size: int = 4
    """Inputs of another task per step, a quarter of the batch."""
    max_length: int = 512
    """Tokens of a text, to which all are padded; longer ones lose their end."""
    ties_density: float = 0.1
    """The share of the entries that TIES keeps."""
    seed: int = 0
    smoke: bool = False
    """Run the whole path in seconds, with a tiny T5 and made-up sentences; what it
    finds means nothing."""


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
      likeliest: the same, to the likeliest tokens.
      params_0: its parameters without a task vector.
      moved: from a task vector to what is added to them.
    """

    apply_fn: Callable
    likeliest: Callable
    params_0: Params
    moved: Callable


class Study(NamedTuple):
    """What every method starts from.

    Attributes:
      config: the options.
      mesh: the devices.
      checkpoint: the T5.
      fingerprint: of its parameters.
      tasks: by name.
      models: by method.
      banked: by method, the task vectors that the bank has; None where it has not.
    """

    config: Config
    mesh: Mesh
    checkpoint: t5.T5
    fingerprint: int
    tasks: dict[str, Task]
    models: dict[str, Model]
    banked: dict[str, list]


def start(config: Config) -> Study:
    """Loads and checks everything, and claims the folder."""
    if config.smoke:
        config = dataclasses.replace(
            config,
            **dict(model="tiny_t5", steps=4, batch_size=8, max_length=24),
            **dict(learning_rate=1e-2, save_every=0, mesh="data=1"),
        )
    mesh = runs.start(config)
    checkpoint, tokenizer = load(config)
    net, linear = network(checkpoint), linearized(checkpoint)
    study = Study(
        config=config,
        mesh=mesh,
        checkpoint=checkpoint,
        fingerprint=fingerprint.combined(checkpoint.params),
        tasks=tasks(config, checkpoint, tokenizer),
        models={"nonlinear": net, "linear": linear, "tau_jp_cyclic": linear},
        banked={},
    )
    for method in METHODS:
        pairs = [
            (file_of(config, method, name), identity(study, method, name))
            for name in TASKS
        ]
        study.banked[method] = [bank.read(*pair) for pair in pairs]
        batches_of(study, method, range(len(TASKS)))  # a wrong mesh shows here
    runs.claim(config)
    return study


def load(config: Config):
    """The T5 and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / config.model
        model = tiny_text.write_t5(tiny) if config.smoke else config.model
        checkpoint = t5.load(model)
        tokenizer = text.load_tokenizer(checkpoint.folder)
    text.check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    return checkpoint, tokenizer


def records(config: Config, name: str) -> text.TextTask:
    """The texts and labels of a task."""
    task = glue.TASKS[name]
    if config.smoke:
        made = [tiny_text.glue_records(task, count, count) for count in (40, 12)]
        return glue.protocol(task, *made)
    splits = [glue.load(task, split) for split in ("train", "validation")]
    return glue.protocol(task, *splits, seed=config.seed)


def tasks(config: Config, checkpoint: t5.T5, tokenizer) -> dict[str, Task]:
    """The tasks as tokens, all of the same lengths."""
    of_task = {
        name: language.candidates(tokenizer, glue.TASKS[name].classes) for name in TASKS
    }
    length = max(found.shape[1] for found in of_task.values())

    def source(name, part):
        rows = language.text_to_text(
            tokenizer,
            glue.text_to_text(glue.TASKS[name], part),
            config.max_length,
            length,
        )
        labels = np.stack([row["labels"] for row in rows])
        inputs = np.asarray(t5.shift_right(labels, checkpoint.config))
        first = (np.arange(length) == 0).astype(np.int32)
        return [
            {**row, "decoder_input_ids": ids, FIRST: first}
            for row, ids in zip(rows, inputs, strict=True)
        ]

    found = {}
    for name in TASKS:
        parts = records(config, name)
        batches = {
            part: pipeline.evaluation_batches(source(name, getattr(parts, part)), 32)
            for part in ("validation", "test")
        }
        room = [(0, 0), (0, length - of_task[name].shape[1])]
        candidates = np.pad(of_task[name], room, constant_values=IGNORED)
        found[name] = Task(source(name, parts.train), batches, candidates)
    return found


def network(checkpoint: t5.T5) -> Model:
    apply_fn = t5.language_model(checkpoint.config)
    return Model(apply_fn, _likeliest(apply_fn), checkpoint.params, lambda tau: tau)


def linearized(checkpoint: t5.T5) -> Model:
    """Its parameters are `{"params_0": ..., "tau": ...}`: no sum of both is rounded."""
    logits = t5.language_model(checkpoint.config)

    def apply_fn(params, *inputs):
        outputs, moves = tangent.jvp(logits, params["params_0"], params["tau"], *inputs)
        return outputs + moves

    zero = jax.tree.map(np.zeros_like, checkpoint.params)
    params_0 = {"params_0": checkpoint.params, "tau": zero}
    return Model(apply_fn, _likeliest(apply_fn), params_0, lambda tau: {"tau": tau})


def _likeliest(apply_fn):
    return lambda params, *inputs: jnp.argmax(apply_fn(params, *inputs), axis=-1)


# Training.


def recipe_of(config: Config, method: str) -> train.TrainConfig:
    return train.TrainConfig(
        steps=config.steps,
        warmup_steps=0,
        decay="constant",
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        clip_norm=None,
        linearized=method != "nonlinear",
        penalty="cyclic" if method == "tau_jp_cyclic" else None,
        penalty_coef=config.penalty_coef,
        penalty_batch_size=config.penalty_batch_size,
        seed=config.seed,
    )


def others(name: str) -> list[str]:
    """T_orth: the tasks that a task vector must not disturb."""
    return [other for other in TASKS if other != name]


def file_of(config: Config, method: str, name: str) -> Path:
    return bank.vector_file(config.bank, config.model, method, name)


def identity(study: Study, method: str, name: str) -> dict:
    """What a task vector in the bank must have been trained with."""
    recipe = recipe_of(study.config, method)

    def samples(task):
        return bank.checksum(study.tasks[task].train)

    return {
        "method": method,
        "recipe": bank.plain_recipe(recipe),
        "others": {o: samples(o) for o in others(name)} if recipe.penalty else {},
        "params_0": study.fingerprint,
        "max_length": study.config.max_length,
        "samples": samples(name),
    }


def batches_of(study: Study, method: str, chosen: Sequence[int]) -> Sequence[dict]:
    source = {name: study.tasks[name].train for name in TASKS}
    names = [TASKS[i] for i in chosen]
    return train.task_batches(
        [source[name] for name in names],
        recipe_of(study.config, method),
        seeds=[train.seed_of(name, study.config.seed) for name in names],
        others=[[source[other] for other in others(name)] for name in names],
        inputs=(*INPUTS, FIRST),
        mesh=study.mesh,
    )


def vectors(study: Study, method: str) -> list[Tree]:
    """The task vectors of a method; those that the bank has not are trained."""
    config, taus = study.config, list(study.banked[method])
    missing = [i for i, tau in enumerate(taus) if tau is None]
    if not missing:
        return taus
    names = [TASKS[i] for i in missing]
    checkpoints = runs.checkpoints(config) / method
    recipe = recipe_of(config, method)
    found = train.fine_tune(
        t5.language_model(study.checkpoint.config),
        study.checkpoint.params,
        lambda logits, batch, _: losses.token_cross_entropy(logits, batch["labels"]),
        batches_of(study, method, missing),
        recipe,
        names=names,
        inputs=INPUTS,
        penalty_mask=FIRST if recipe.penalty else None,
        log=config.out / f"train_{method}.jsonl",
        mesh=study.mesh,
        checkpoints=checkpoints if config.save_every else None,
        save_every=config.save_every,
    )
    found = sharding.to_host(found)

    def save():
        for name, tau in zip(names, found, strict=True):
            file = file_of(config, method, name)
            bank.write(file, tau, identity(study, method, name), {})
        shutil.rmtree(checkpoints, ignore_errors=True)

    processes.on_first(save)
    for i, tau in zip(missing, found, strict=True):
        taus[i] = tau
    return taus


# Scores.


def token_score(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """The score of the paper's code, of the likeliest tokens `[N, T]`."""
    counts = labels != IGNORED
    if "matthews" in glue.TASKS[name].metrics:
        return metrics.matthews(predicted[counts], labels[counts])
    return float(np.mean(predicted[counts] == labels[counts]))


def token_scores(study: Study, method: str, added, part: str) -> Callable:
    """The score of tokens on every task, as a function of the coefficient.

    Args:
      added: the vector that is added to the model, for each task.
      part: "validation" or "test".
    """
    model = study.models[method]
    outputs = {
        name: evaluate.forward(
            *(model.likeliest, model.params_0, [model.moved(tau)]),
            *(study.tasks[name].parts[part], INPUTS),
            mesh=study.mesh,
        )
        for name, tau in zip(TASKS, added, strict=True)
    }

    def at(coef):
        return [
            token_score(name, outputs[name]([coef]), true_tokens(study, name, part))
            for name in TASKS
        ]

    return at


def true_tokens(study: Study, name: str, part: str) -> np.ndarray:
    batches = study.tasks[name].parts[part]
    return np.concatenate([batch["labels"][batch["mask"]] for batch in batches])


def rank_scores(study: Study, method: str, added, coef: float) -> list[float]:
    """The official metrics of rank classification on every task's test part."""
    model, found = study.models[method], []
    for name, tau in zip(TASKS, added, strict=True):
        batches = study.tasks[name].parts["test"]
        ranked = rank.label_losses(
            model.apply_fn,
            task_vectors.apply(model.params_0, model.moved(tau), coef),
            batches,
            study.tasks[name].candidates,
            start_token_id=study.checkpoint.config.decoder_start_token_id,
        )
        labels = evaluate.labels(batches)
        found.append(glue.score(glue.TASKS[name], ranked.argmin(axis=1), labels))
    return found


class Scores(NamedTuple):
    """Test scores on every task."""

    tokens: list[float]
    rank: list[float]


def scores(study: Study, method: str, added, coef: float) -> Scores:
    tokens = token_scores(study, method, added, "test")(coef)
    return Scores(tokens, rank_scores(study, method, added, coef))


class Individual(NamedTuple):
    """Scores of the single-task models of a method, by which it is normalised.

    Attributes:
      validation: of tokens.
      test: by both metrics.
    """

    validation: list[float]
    test: Scores


def individual(study: Study, method: str, taus) -> Individual:
    """Every task's own vector on its own data; the bank learns of the scores."""
    found = Individual(
        token_scores(study, method, taus, "validation")(1.0),
        scores(study, method, taus, 1.0),
    )

    def add_metrics():
        for name, tokens, ranked in zip(TASKS, *found.test, strict=True):
            measured = {"token score": tokens, "rank score": ranked}
            bank.add_metrics(file_of(study.config, method, name), measured)

    processes.on_first(add_metrics)
    return found


class Merge(NamedTuple):
    """A way to add all tasks to one model: a vector, to the model of a method."""

    name: str
    method: str
    tau: Params


def merges(study: Study, taus: dict[str, list[Tree]]) -> list[Merge]:
    """The rows of task addition; TIES is of the ordinary vectors."""
    params_0 = study.checkpoint.params
    density = study.config.ties_density
    edited = merge.ties(params_0, taus["nonlinear"], density=density, coef=1.0)
    ties = Merge("TIES", "nonlinear", task_vectors.difference(edited, params_0))
    sums = [
        Merge(name, method, task_vectors.add(taus[method]))
        for method, name in METHODS.items()
    ]
    return [*sums[:2], ties, sums[2]]


def search(study: Study, merged: Merge, single: Individual, coefs) -> evaluate.Search:
    """The coefficient with the best mean normalised token score on validation data.

    Where a single-task model scores nothing, the scores are not normalised.
    """
    added = [merged.tau] * len(TASKS)
    scores_at = token_scores(study, merged.method, added, "validation")
    usable = min(single.validation) > 0
    return evaluate.search(
        scores_at, single.validation if usable else np.ones(len(TASKS)), coefs
    )


# Rows.


def rows(name: str, coef: float, found: Scores, single: Scores | None) -> list[dict]:
    """A line for each of the two metrics, in percent.

    Args:
      single: the scores by which it is normalised; a score that is not above 0
        normalises nothing.
    """
    lines = []
    for metric in Scores._fields:
        absolute, normalized = getattr(found, metric), [None] * len(TASKS)
        if single is not None:
            pairs = zip(absolute, getattr(single, metric), strict=True)
            normalized = [a / alone if alone > 0 else None for a, alone in pairs]
        average = None if None in normalized else np.mean(normalized)
        line = {"method": name, "metric": metric, "coef": coef}
        for task, a, norm in zip(
            (*TASKS, "avg"),
            (*absolute, np.mean(absolute)),
            (*normalized, average),
            strict=True,
        ):
            line[f"{task} abs"] = 100 * float(a)
            line[f"{task} norm"] = None if norm is None else 100 * float(norm)
        lines.append(line)
    return lines


def report(
    study: Study,
    title: str,
    lines: list[dict],
    published: dict,
    note: str,
    curves: dict | None = None,
) -> dict:
    """Writes the report; returns what report.json holds.

    Args:
      lines: from `rows`.
      published: by method, what the paper prints, in the order of `VALUES`.
      curves: by merge, the candidates of its coefficient and their scores.
    """
    results = {"rows": lines, "searches": curves or {}}
    if runs.is_first():
        shown = [{**line, "coef": f"{line['coef']:.2f}"} for line in lines]
        of_metric = {
            metric: [line for line in shown if line["metric"] == metric]
            for metric in Scores._fields
        }

        def table(metric, kind, theirs):
            chosen = [i for i, name in enumerate(VALUES) if name.endswith(kind)]
            beside = tables.beside(
                of_metric[metric],
                {method: [row[i] for i in chosen] for method, row in theirs.items()},
                keys=["method", "coef"],
                values=[VALUES[i] for i in chosen],
                published_keys=["method"],
            )
            return tables.markdown(beside)

        captions = {
            "Score of tokens, as in the paper: Abs.": table("tokens", "abs", published),
            "The same score: Norm.": table("tokens", "norm", published),
            "GLUE's metrics by rank classification: Abs.": table("rank", "abs", {}),
            "The same metrics: Norm.": table("rank", "norm", {}),
        }
        tables.write(study.config.out, title, captions, results, note)
    return results
