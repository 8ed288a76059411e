"""The eight GLUE tasks of the papers: records, the T5 format, and scores.

Wang et al. GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding. ICLR 2019. The text-to-text format is that of Raffel et al. Exploring the
Limits of Transfer Learning with a Unified Text-to-Text Transformer. JMLR 2020, App. D.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from jaxarith import metrics, tree
from jaxarith.data import splits
from jaxarith.data.text import Record, TextTask

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
      name: its configuration in Hugging Face's `nyu-mll/glue`, and its prefix in T5's
        format.
      fields: Hugging Face's columns for the text, and for its pair.
      classes: names in Hugging Face's order, which are also T5's target words; none for
        STS-B.
      metrics: the official metrics; `score` returns their mean.
      columns: the columns of text, pair and label in the files that GLUE distributes.
      prompt: the names of the fields in T5's format, in its order.
    """

    name: str
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    prompt: tuple[str, ...]


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews",),
            # The file has no header: source, label, the author's mark, sentence.
            ("3", "1"),
            ("sentence",),
        ),
        Task(
            "sst2",
            ("sentence",),
            ("negative", "positive"),
            ("accuracy",),
            ("sentence", "label"),
            ("sentence",),
        ),
        Task(
            "mrpc",
            _SENTENCES,
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            ("#1 String", "#2 String", "Quality"),
            _SENTENCES,
        ),
        Task(
            "stsb",
            _SENTENCES,
            (),
            ("pearson", "spearman"),
            (*_SENTENCES, "score"),
            _SENTENCES,
        ),
        Task(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            ("question1", "question2", "is_duplicate"),
            ("question1", "question2"),
        ),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            (*_SENTENCES, "gold_label"),
            ("hypothesis", "premise"),
        ),
        Task(
            "qnli",
            ("question", "sentence"),
            _ENTAILMENT,
            ("accuracy",),
            ("question", "sentence", "label"),
            ("question", "sentence"),
        ),
        Task(
            "rte",
            _SENTENCES,
            _ENTAILMENT,
            ("accuracy",),
            (*_SENTENCES, "label"),
            _SENTENCES,
        ),
    )
}


def load(task: Task, split: Split) -> list[Record]:
    """Loads the records of a split with Hugging Face `datasets`.

    Args:
      task: one of `TASKS`.
      split: "train" or "validation"; for MNLI the matched validation split. GLUE does
        not publish the labels of its test splits.

    Returns:
      `{"text": str, "label": int}` per record, with `"text_pair"` for two sentences;
      the label of STS-B is a float from 0 to 5.

    Raises:
      ValueError: `split` is another split.
    """
    if split not in get_args(Split):
        raise ValueError(
            f'{task.name} has no labels for {split!r}. Load "train", or "validation", '
            "which the papers use as test data."
        )
    import datasets

    matched = (task.name, split) == ("mnli", "validation")
    name = "validation_matched" if matched else split
    rows: Any = datasets.load_dataset("nyu-mll/glue", task.name, split=name)
    names = dict(zip(("text", "text_pair"), task.fields, strict=False))
    return [
        {**{field: row[name] for field, name in names.items()}, "label": row["label"]}
        for row in rows
    ]


def read_tsv(task: Task, file: str | os.PathLike) -> list[Record]:
    """Reads the records of a tsv file that GLUE distributes.

    Tabs separate the cells; quotes are ordinary characters. CoLA has no header. QQP's
    `train.tsv` has a few broken lines, which are left out, as Hugging Face does.

    Args:
      task: one of `TASKS`.
      file: the file.

    Returns:
      The records, as `load` returns them.

    Raises:
      ValueError: the file is missing, empty or of another task, or a line lacks a cell
        or has an unknown label.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Check the path.")
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    cells = [line.rstrip("\r").split("\t") for line in lines]
    header = [str(i) for i in range(4)] if task.name == "cola" else cells.pop(0)
    first = 1 if task.name == "cola" else 2
    missing = [name for name in task.columns if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)} of {task.name}'s labelled "
            f"files; it has {', '.join(header)}."
        )
    *texts, label = (header.index(name) for name in task.columns)
    records = []
    for number, row in enumerate(cells, first):
        if row == [""]:
            continue
        if len(row) <= max(label, *texts):
            if task.name == "qqp":
                continue
            cells = tree.counted(len(row), "cell")
            raise ValueError(f"{path}, line {number} has only {cells}.")
        names = zip(("text", "text_pair"), texts, strict=False)
        record = {field: row[column] for field, column in names}
        try:
            records.append({**record, "label": _number(task, row[label])})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no record. Download it again.")
    return records


def protocol(
    task: Task,
    train: Sequence[Record],
    validation: Sequence[Record],
    *,
    seed: int = 0,
) -> TextTask:
    """Returns the parts that the papers use.

    GLUE's validation split is the test part. The validation part has the same size and
    is drawn at random from the training split (Ilharco et al. 2023, Section 4.2).

    Args:
      task: one of `TASKS`.
      train, validation: the records of the two splits.
      seed: seed of the draw.

    Raises:
      ValueError: the training split is not larger than the validation split.
    """
    if len(train) <= len(validation) or not validation:
        raise ValueError(
            f"{task.name}: cannot take {len(validation)} of {len(train)} training "
            "records for validation. Give a larger training split."
        )
    order = splits.torch_permutation(len(train), seed)
    kept, held_out = order[: -len(validation)], order[-len(validation) :]
    return TextTask(
        task.name,
        task.classes,
        [train[i] for i in kept],
        [train[i] for i in held_out],
        list(validation),
    )


def text_to_text(task: Task, records: Sequence[Record]) -> list[Record]:
    """Converts records to T5's format.

    The input is the name of the task, then the name and the text of every field. The
    target is the name of the class, or STS-B's score rounded to the nearest 0.2.

    Args:
      task: one of `TASKS`.
      records: records as `load` returns them.

    Returns:
      `{"text": str, "target": str, "label": int or float}` per record.

    Example:
      >>> text_to_text(TASKS["sst2"], [{"text": "a fine film", "label": 1}])
      [{'text': 'sst2 sentence: a fine film', 'target': 'positive', 'label': 1}]
    """
    fields = dict(zip(task.fields, ("text", "text_pair"), strict=False))
    return [
        {
            "text": " ".join(
                [
                    task.name,
                    *(f"{name}: {record[fields[name]]}" for name in task.prompt),
                ]
            ),
            "target": target(task, record["label"]),
            "label": record["label"],
        }
        for record in records
    ]


def target(task: Task, label: float) -> str:
    """Returns the text that T5 should answer for a label.

    Example:
      >>> target(TASKS["rte"], 0), target(TASKS["stsb"], 3.35)
      ('entailment', '3.4')
    """
    return (
        task.classes[int(label)] if task.classes else f"{np.round(label * 5) / 5:.1f}"
    )


def answer(task: Task, text: str) -> float:
    """Returns the label that a generated text states; -1 if it states none.

    Example:
      >>> answer(TASKS["rte"], "not_entailment"), answer(TASKS["stsb"], "3.4")
      (1, 3.4)
    """
    text = text.strip()
    if task.classes:
        return task.classes.index(text) if text in task.classes else -1
    try:
        return _score(text)
    except ValueError:
        return -1


def score(task: Task, predictions: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean of a task's official metrics.

    Args:
      task: one of `TASKS`.
      predictions, labels: `i32[B]`, or floats for STS-B.

    Raises:
      ValueError: the two have different lengths, or are empty.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"{task.name}: predictions have the shape {predictions.shape} and labels "
            f"{labels.shape}; both must be [B]."
        )
    functions = {
        "accuracy": lambda predictions, labels: np.mean(predictions == labels),
        "f1": metrics.f1,
        "matthews": metrics.matthews,
        "pearson": metrics.pearson,
        "spearman": metrics.spearman,
    }
    return float(np.mean([functions[m](predictions, labels) for m in task.metrics]))


def _number(task, label):
    """Returns the label in a cell of a file: a class by name or number, or a score."""
    if not task.classes:
        return _score(label)
    if label in task.classes:
        return task.classes.index(label)
    if label in map(str, range(len(task.classes))):
        return int(label)
    raise ValueError(
        f"{label!r} is not a label of {task.name}; expected {', '.join(task.classes)}."
    )


def _score(text):
    value = float(text)
    if not 0 <= value <= 5:
        raise ValueError(f"{text!r} is not a score from 0 to 5.")
    return value
