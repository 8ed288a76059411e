"""What the scripts on prompted RoBERTa share: options, tasks, task vectors, scores.

A task is a template that asks for one word and a label word of every class, as in Gao
et al. (2021), and Zeng et al. (2025, Appendix D.2) fine-tune on 64 samples per class:
10 epochs of AdamW at 2e-5 with a batch of 4; the masked-LM head and the embeddings stay
fixed, so a task vector has the blocks of the encoder alone. `--head class-mean` takes
encoders without that head too.

The paper and the code of its authors decide what is not in our options:

- No weight decay and no warm-up, and gradients clipped to norm 1, as their code has by
  default. Their code takes 1024 steps per class, 64 epochs; the paper's 10 epochs are
  160.
- A class with too few samples repeats them. A part for choosing coefficients, as large
  as the training part, is drawn from what is left of the training split, as Gao et al.
  do; of a class with few samples it has a quarter. The paper does not mention one.
- The paper adds label words that the tokenizer lacks, with new rows in the frozen
  embeddings; its code looks words up without the blank before them, and so adds many.
  Here the row of a word of several tokens is the mean of theirs.
- Texts are padded to the longest of their task, to 32, 64, 128, 256 or 512 tokens:
  padding changes nothing. There is no dropout.

A smoke run takes a tiny RoBERTa and made-up sentences.
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
    """The options of all scripts on prompted RoBERTa."""

    model: str = "FacebookAI/roberta-base"
    """A RoBERTa or BERT: a folder, or an id of the Hugging Face Hub."""
    head: Literal["label-word", "class-mean"] = "label-word"
    """The fixed head of a task: the words of its prompt, of a model with a masked-LM
    head as in the paper; or, of any encoder of sentences, the mean features of the
    classes in the training samples, of prompts all the same."""
    tasks: tuple[str, ...] = ()
    """The tasks, in order: names of the paper's list (Appendix D.3), or files with
    labelled texts, NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST. A file of
    a task of the list takes its prompt. Columns are label and text, text_pair as
    experiments.text_study reads them; in .jsonl any fields of the template."""
    prompt: tuple[str, ...] = ()
    """Prompts of tasks that are files, each NAME=TEMPLATE|CLASS:WORD,CLASS:WORD with
    {mask} and fields such as {text} in the template."""
    data_dir: Path | None = None
    """Folder in which LM-BFF's datasets.tar was unpacked, for SUBJ, CR, MPQA and MR."""
    shots: int = 64
    """Training samples of each class."""
    epochs: int = 10
    steps: int | None = None
    """Optimizer steps in place of those of the epochs."""
    batch_size: int = 4
    learning_rate: float = 2e-5
    max_length: int = 512
    """Tokens of a text; of longer ones the fields lose their ends."""
    samples: int | None = None
    """The largest number of test samples of a task, drawn at random; all by default."""
    evaluation_batch: int = 64
    tasks_together: int = 4
    """How many tasks of one length and one number of steps train side by side. For each
    the devices hold three times the parameters of the blocks."""
    seed: int = 0


C = TypeVar("C", bound=Options)


def smoke(options: C, tasks: Sequence[str] = SMOKE, **small: Any) -> C:
    """The options; in a smoke run those of all these scripts, and `small`."""
    common: dict[str, Any] = {"model": "tiny_roberta", "tasks": tuple(tasks)}
    common |= {"prompt": (), "steps": 4, "shots": 8, "batch_size": 8}
    common |= {"learning_rate": 1e-2, "max_length": 32, "evaluation_batch": 16}
    return runs.smaller(options, **common | small)


class Part(NamedTuple):
    """One part of a task: batches to evaluate on, and the labels."""

    batches: list[dict]
    labels: np.ndarray


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      name: in the bank.
      classes: their names, in the order of their numbers.
      train: the training source.
      validation, test: the other parts.
      head: for `heads.affine_logits`; it stays fixed.
      majority: the accuracy on the test part of the class that most training samples,
        before the few were drawn, have.
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
        """The tokens that its texts are padded to."""
        return len(self.train[0]["input_ids"])


class Setup(NamedTuple):
    """A masked language model and the tasks.

    Attributes:
      options: the options of the script.
      mesh: the devices.
      apply_fn: `apply_fn(params, *INPUTS) -> features[B, D]`.
      params_0: its parameters.
      identity: a fingerprint of them.
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
      changed: by a new name, one of the tasks and a template in place of its own; such
        tasks come last.

    Raises:
      ValueError: tasks are missing or malformed; the message has all of them.
      FileNotFoundError: there is no such model.
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
            f"--max-length {options.max_length}: it must be {least} at least, and the "
            f"model has positions for {model.config.max_length} tokens."
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
    """A task as tokens, with its head."""
    classes = tuple(c for c in task.prompt.words if c in set(task.train.labels))
    if len(classes) < 2:
        raise ValueError(f"{task.name}: {len(classes)} classes in its training part.")
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
    """What a task vector is trained from."""
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
    """The task vectors of all tasks; texts of one length train side by side."""
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
    """Cross-entropy over the classes."""
    scores = heads.affine_logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def vectors(setup: Setup) -> list[Tree]:
    """The task vectors from the bank, on the host; missing ones are trained.

    Raises:
      ValueError: the bank holds a vector of another configuration.
    """
    return training.vectors(
        setup.options,
        network(setup),
        wanted(setup),
        together=setup.options.tasks_together,
    )


# Scores.


def accuracy(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    """A score of a task, as `scores` takes it."""
    del task
    return float(np.mean(predictions == labels))


def f1_of(name: str) -> Callable:
    """F1 of one of the classes, as a score."""

    def score(task, predictions, labels):
        positive = task.classes.index(name)
        binary = [(x == positive).astype(int) for x in (predictions, labels)]
        return metrics.f1(*binary)

    return score


def score(setup: Setup, task: Task, params, split: str, measure=accuracy) -> float:
    """The score of a model on the "validation" or "test" part of one task."""
    own = getattr(task, split)
    features = evaluate.outputs(
        setup.apply_fn, params, own.batches, INPUTS, mesh=setup.mesh
    )
    predictions = heads.affine_logits(task.head, features).argmax(-1)
    return measure(task, predictions, own.labels)


def scores(
    setup: Setup, params, split: str, measures: dict[str, Callable] | None = None
) -> np.ndarray:
    """The scores of one model on all tasks, `[T]`.

    Args:
      measures: by the name of a task its score, `score(task, predictions, labels)`; of
        the others it is accuracy.
    """
    params = sharding.shard(params, setup.mesh)  # once, not for every task
    measures = measures or {}
    return np.array(
        [
            score(setup, task, params, split, measures.get(task.name, accuracy))
            for task in setup.tasks
        ]
    )
