"""Shared code of the scripts on prompted RoBERTa: options, tasks, vectors, scores.

A task has a template that asks for one word, and a label word for every class, as in
Gao et al. (2021). The bases paper (Appendix D.2) fine-tunes on 64 samples per class: 10
epochs of AdamW at 2e-5 with a batch of 4. The masked-LM head and the embeddings stay
fixed, so a task vector covers only the blocks of the encoder. `--head class-mean`
supports encoders without a masked-LM head.

The following choices are fixed, not options. They come from the paper and its code:

- No weight decay and no warm-up, and gradients clipped to norm 1: the defaults of their
  code. Their code takes 1024 steps per class, 64 epochs; the paper's 10 epochs are 160
  steps.
- A class with too few samples repeats them. Coefficients are chosen on a part as large
  as the training part. It is drawn from the rest of the training split, as Gao et al.
  do; for a class with few samples it has a quarter of them. The paper does not mention
  such a part.
- The paper adds label words that the tokenizer lacks, with new rows in the frozen
  embeddings. Its code looks words up without the blank before them, and so adds many.
  Here the row of a word with several tokens is the mean of their rows.
- Texts are padded to the longest of their task, to 32, 64, 128, 256 or 512 tokens;
  padding does not change the outputs. There is no dropout.

A smoke run uses a tiny RoBERTa and made-up sentences.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, runs, script, training
from experiments.common.language import prompted_model, prompted_texts
from jaxarith import (
    evaluate,
    fingerprint,
    losses,
    metrics,
    sharding,
)
from jaxarith.data import pipeline, prompts
from jaxarith.models import bert, heads
from jaxarith.typing import ApplyFn, Params, Tree

INPUTS = prompted_model.INPUTS
METHODS = {  # the folder in the bank
    "label-word": "prompted",
    "class-mean": "prompted_class_mean",
}
SMOKE = ("SST2", "CR", "QNLI", "MRPC")
_LENGTHS = (32, 64, 128, 256)  # and --max-length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Banked, runs.Planned):
    """Options of all scripts on prompted RoBERTa."""

    model: str = "FacebookAI/roberta-base"
    """A RoBERTa or BERT: a folder, or an id of the Hugging Face Hub."""
    head: Literal["label-word", "class-mean"] = "label-word"
    """The fixed head of a task. label-word: the rows of the prompt's words; the model
    needs a masked-LM head, as in the paper. class-mean: the mean features of each class
    over the training samples, with the same prompts; works for any sentence encoder."""
    tasks: tuple[str, ...] = ()
    """The tasks, in order: names of the paper's list (Appendix D.3), or files with
    labelled texts, NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST. If NAME is
    in the list, its prompt is used. Columns are label, text and text_pair, as for
    experiments.text_study; a .jsonl file may have any fields of the template."""
    prompt: tuple[str, ...] = ()
    """Prompts of tasks that are files, each NAME=TEMPLATE|CLASS:WORD,CLASS:WORD. The
    template has {mask} and fields, for example {text}."""
    data_dir: Path | None = None
    """Folder in which LM-BFF's datasets.tar was unpacked, for SUBJ, CR, MPQA and MR."""
    shots: int = 64
    """Number of training samples of each class."""
    epochs: int = 10
    steps: int | None = None
    """Number of optimizer steps, instead of --epochs."""
    batch_size: int = 4
    learning_rate: float = 2e-5
    max_length: int = 512
    """Largest number of tokens of a text; the fields of longer texts are cut."""
    samples: int | None = None
    """Largest number of test samples of a task, drawn at random; by default all."""
    evaluation_batch: int = 64
    tasks_together: int = 4
    """Number of tasks that train side by side, if they have the same length and number
    of steps. For each the devices hold three times the parameters of the blocks."""
    seed: int = 0


C = TypeVar("C", bound=Options)


def smoke(options: C, tasks: Sequence[str] = SMOKE, **small: Any) -> C:
    """Returns the options; in a smoke run with small values, and those of `small`."""
    common: dict[str, Any] = {"model": "tiny_roberta", "tasks": tuple(tasks)}
    common |= {"prompt": (), "steps": 4, "shots": 8, "batch_size": 8}
    common |= {"learning_rate": 1e-2, "max_length": 32, "evaluation_batch": 16}
    return runs.smaller(options, **common | small)


class Part(NamedTuple):
    """One part of a task: batches for evaluation, and the labels."""

    batches: list[dict]
    labels: np.ndarray


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      name: name of the task in the bank.
      classes: names of the classes, in the order of their numbers.
      train: the training source.
      validation, test: the other parts.
      head: the fixed head, for `heads.affine_logits`.
      majority: test accuracy of always predicting the most frequent class of the whole
        training split.
    """

    name: str
    classes: tuple[str, ...]
    train: list[dict]
    validation: Part
    test: Part
    head: np.ndarray
    majority: float

    @property
    def length(self) -> int:
        """The number of tokens that its texts are padded to."""
        return len(self.train[0]["input_ids"])


class Setup(NamedTuple):
    """A masked language model and the tasks.

    Attributes:
      options: the options of the script.
      mesh: the devices.
      apply_fn: `apply_fn(params, *INPUTS) -> features[B, D]`.
      params_0: its parameters.
      identity: fingerprint of `params_0`.
      tasks: the tasks.
    """

    options: Options
    mesh: Mesh
    apply_fn: ApplyFn
    params_0: Params
    identity: int
    tasks: list[Task]

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]


# Loading.


def load(
    options: Options, *, changed: dict[str, tuple[str, str]] | None = None
) -> Setup:
    """Loads the tasks and the model, and claims the output folder.

    Args:
      options: the options of the script, as `smoke` returns them.
      changed: dict from a new name to one of the tasks and a template that replaces its
        own. These tasks come last.

    Raises:
      ValueError: tasks are missing or malformed; the message lists all of them.
      FileNotFoundError: the model does not exist.
    """
    script.needs("text", "sklearn", "transformers")
    if not (options.smoke or all("=" in spec for spec in options.tasks)):
        script.needs("text", "datasets")
    mesh = runs.start(options)
    found = prompted_texts.read_all(
        options.tasks, options.prompt, options.data_dir, made_up=options.smoke
    )
    for name, (spec, template) in (changed or {}).items():
        task = found[options.tasks.index(spec)]
        prompt = prompts.Prompt(template, task.prompt.words)
        found.append(task._replace(name=name, prompt=prompt))
    if options.smoke:
        model = prompted_model.tiny(options.head)
    else:
        model = prompted_model.load(options.model, options.head)
    least = model.tokenizer.num_special_tokens_to_add() + 2
    if not least <= options.max_length <= model.config.max_length:
        raise ValueError(
            f"--max-length {options.max_length}: expected {least} at least, and at "
            f"most {model.config.max_length}, the positions of the model."
        )
    tasks = script.collected(found, lambda task: tokens(options, task, model))
    setup = Setup(
        options=options,
        mesh=mesh,
        apply_fn=model.apply_fn,
        params_0=sharding.shard(model.params, mesh),
        identity=fingerprint.combined(model.params),
        tasks=tasks,
    )
    training.check(network(setup), wanted(setup), options.tasks_together)
    runs.claim(options)
    return setup


def tokens(
    options: Options, task: prompted_texts.Texts, model: prompted_model.Model
) -> Task:
    """Returns a task as tokens, with its head."""
    classes = tuple(c for c in task.prompt.words if c in set(task.train.labels))
    if len(classes) < 2:
        raise ValueError(
            f"{task.name}: {len(classes)} classes in its training part; expected two "
            "or more that the prompt has a word for."
        )
    numbers = {name: i for i, name in enumerate(classes)}
    chosen = prompted_texts.draw(
        task.train.labels, classes, options.shots, options.seed
    )
    usable = [i for i, name in enumerate(task.test.labels) if name in numbers]
    if options.samples is not None and len(usable) > options.samples:
        rng = np.random.default_rng(options.seed)
        usable = sorted(rng.choice(usable, options.samples, replace=False).tolist())

    def encoded(rows, indices):
        found = [
            {**rows.record(int(i)), "label": numbers[rows.labels[i]]} for i in indices
        ]
        return prompts.encode(model.tokenizer, task.prompt, found, options.max_length)

    sources = [
        encoded(task.train, chosen[0]),
        encoded(task.train, chosen[1]),
        encoded(task.test, usable),
    ]
    longest = max(int(row["attention_mask"].sum()) for rows in sources for row in rows)
    length = min([n for n in _LENGTHS if n >= longest] + [options.max_length])
    train_source, validation, test = [
        [{**row, **{name: row[name][:length] for name in INPUTS}} for row in rows]
        for rows in sources
    ]
    pool = [name for name in task.train.labels if name in numbers]
    common = max(classes, key=pool.count)
    return Task(
        name=task.name,
        classes=classes,
        train=train_source,
        validation=part(validation, options),
        test=part(test, options),
        head=model.head(train_source, task.prompt.label_words(classes)),
        majority=float(np.mean([row["label"] == numbers[common] for row in test])),
    )


def part(source: list[dict], options: Options) -> Part:
    batches = pipeline.evaluation_batches(source, options.evaluation_batch)
    return Part(batches, evaluate.labels(batches))


# Training.


def network(setup: Setup) -> training.Network:
    """Returns the network that a task vector is trained from."""
    options = setup.options
    return training.Network(
        title=f"{Path(options.model).name}_{METHODS[options.head]}",
        apply_fn=setup.apply_fn,
        params_0=setup.params_0,
        loss=loss,
        mesh=setup.mesh,
        inputs=INPUTS,
        stacked=heads.pad,
    )


def wanted(setup: Setup) -> list[training.Wanted]:
    """Describes the vectors of all tasks; texts of one length train side by side."""
    options, method = setup.options, METHODS[setup.options.head]
    return [
        training.Wanted(
            name=task.name,
            file=bank.vector_file(
                options.bank, options.model, method, task.name.replace("/", "-")
            ),
            recipe=training.recipe(
                options, len(task.train), decay="linear", trained=bert.BLOCKS
            ),
            identity={
                "method": method,
                "samples": bank.checksum(task.train),
                "head": fingerprint.combined(task.head),
                "params_0": setup.identity,
            },
            source=task.train,
            head=task.head,
            kind=task.length,
        )
        for task in setup.tasks
    ]


def loss(features, batch, constants) -> jax.Array:
    """Returns the cross-entropy over the classes."""
    scores = heads.affine_logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def vectors(setup: Setup) -> list[Tree]:
    """Returns the task vectors on the host; trains those that the bank lacks.

    Raises:
      ValueError: the bank has a vector with another configuration.
    """
    return training.vectors(
        setup.options,
        network(setup),
        wanted(setup),
        together=setup.options.tasks_together,
    )


# Scores.


def accuracy(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the accuracy; a measure for `scores`."""
    del task
    return float(np.mean(predictions == labels))


def f1_of(name: str) -> Callable:
    """Returns a measure for `scores`: the F1 of one of the classes."""

    def score(task, predictions, labels):
        positive = task.classes.index(name)
        binary = [(x == positive).astype(int) for x in (predictions, labels)]
        return metrics.f1(*binary)

    return score


def score(setup: Setup, task: Task, params, split: str, measure=accuracy) -> float:
    """Returns the score of a model on the "validation" or "test" part of one task."""
    own = getattr(task, split)
    features = evaluate.outputs(
        setup.apply_fn, params, own.batches, INPUTS, mesh=setup.mesh
    )
    predictions = heads.affine_logits(task.head, features).argmax(-1)
    return measure(task, predictions, own.labels)


def scores(
    setup: Setup, params, split: str, measures: dict[str, Callable] | None = None
) -> np.ndarray:
    """Returns the scores of one model on all tasks, `[T]`.

    Args:
      setup: the model and the tasks.
      params: parameters of the model to score.
      split: "validation" or "test".
      measures: dict from the name of a task to its `score(task, predictions, labels)`;
        other tasks use accuracy.
    """
    params = sharding.shard(params, setup.mesh)  # once for all tasks
    measures = measures or {}
    return np.array(
        [
            score(setup, task, params, split, measures.get(task.name, accuracy))
            for task in setup.tasks
        ]
    )
