"""Loads tasks as texts with prompts: from the bases paper's list, or from files.

It also draws the few samples of each class that a prompted model is trained on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common import script
from experiments.common.language import text_files, tiny_text
from jaxarith.data import prompt_sources, prompts, splits, text


class Texts(NamedTuple):
    """A task as texts.

    Attributes:
      name: name of the task.
      prompt: its template and words.
      train: the training split.
      test: the test split.
    """

    name: str
    prompt: prompts.Prompt
    train: prompt_sources.Rows
    test: prompt_sources.Rows


def read_all(
    specs: Sequence[str],
    given: Sequence[str],
    data_dir: Path | None,
    *,
    made_up: bool = False,
) -> list[Texts]:
    """Loads the tasks as texts; reports the mistakes of all tasks in one error.

    Args:
      specs: names of the paper's list, or `NAME=FILE`, see `text_files.task_files`.
      given: prompts, see `text_files.read_prompt`; they replace those of the list.
      data_dir: the folder with the files of LM-BFF.
      made_up: use made-up sentences instead of the data, for a smoke run.

    Raises:
      ValueError: a task is missing or malformed; the message lists all of them.
    """
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"--tasks: expected at least one task, and each only once; got "
            f"{', '.join(specs)}."
        )
    of_task = dict(map(text_files.read_prompt, given))
    if unknown := [name for name in of_task if name not in names]:
        raise ValueError(
            f"--prompt is given for {', '.join(unknown)}, which --tasks does not name. "
            "Add it to --tasks, or remove the prompt."
        )
    return script.collected(
        specs,
        lambda spec: _read(spec, of_task, data_dir, made_up),
        errors=script.OF_DATASETS,
        named=True,
    )


def _read(spec, given, data_dir, made_up) -> Texts:
    name, equals, _ = spec.partition("=")
    source = prompt_sources.sources().get(name)
    prompt = given.get(name) or (source and source.prompt) or prompts.TASKS.get(name)
    if prompt is None:
        raise ValueError("not a task of the list; give its file and its --prompt.")
    if made_up:
        return Texts(name, prompt, *(_made_up(prompt, count) for count in (40, 16)))
    if equals:
        return Texts(name, prompt, *_file_parts(spec, prompt))
    if source is None:
        raise ValueError("no dataset is known for it; give its file, NAME=FILE.")
    parts = (prompt_sources.load(source, part, data_dir) for part in ("train", "test"))
    return Texts(name, prompt, *parts)


def _made_up(prompt: prompts.Prompt, count: int) -> prompt_sources.Rows:
    records = tiny_text.prompt_records(prompt, count, count)
    return prompt_sources.Rows([r["label"] for r in records], records.__getitem__)


def _file_parts(spec: str, prompt: prompts.Prompt) -> list[prompt_sources.Rows]:
    """Returns the training and the test part of a task that is given as files."""
    name, paths = text_files.task_files(spec)
    first, *others = [_records(path, prompt.fields) for path in paths]
    # A validation file joins the pool from which the few samples are drawn.
    pool = first + (others[0] if len(others) == 2 else [])
    task = text.task(name, pool, pool[:1], others[-1] if others else None)
    prompt.label_words(task.classes)  # raises if a class has no word

    def rows(part):
        labels = [task.classes[record["label"]] for record in part]
        return prompt_sources.Rows(labels, list(part).__getitem__)

    return [rows(task.train), rows(task.test)]


def _records(file: Path, fields: Sequence[str]) -> list[text.Record]:
    """Reads the records of a file; from .jsonl with all fields of the template."""
    if set(fields) <= {"text", "text_pair"} or file.suffix != ".jsonl":
        return text.read(file)
    names = (*fields, "label")
    rows = text_files.read_table(file, names)
    return [{name: str(row[name]) for name in names} for row in rows]


def draw(
    labels: Sequence[str | None], classes: Sequence[str], shots: int, seed: int
) -> tuple[list[int], list[int]]:
    """Draws rows for training, equally many of every class, and others for validation.

    Args:
      labels: the class of every row; rows with another label are not drawn.
      classes: the classes.
      shots: training rows per class; a class with fewer rows repeats them.
      seed: seed of the order.

    Returns:
      The rows of both parts; the second has at most `shots` of each class.

    Raises:
      ValueError: a class has fewer than two rows.

    Example:
      >>> found = draw(["a", "b", "a", None, "b", "a"], ["a", "b"], 2, 0)
      >>> [len(part) for part in found], not set(found[0]) & set(found[1])
      ([4, 2], True)
    """
    of_class: dict[str, list[int]] = {name: [] for name in classes}
    for i in splits.torch_permutation(len(labels), seed):
        if labels[i] in of_class:
            of_class[labels[i]].append(int(i))
    drawn, held_out = [], []
    for name, rows in of_class.items():
        if len(rows) < 2:
            raise ValueError(
                f"the class {name} has {len(rows)} rows; two or more are needed."
            )
        kept = min(shots, max(1, len(rows) - max(1, len(rows) // 4)))
        drawn += np.resize(rows[:kept], shots).tolist()
        held_out += rows[kept : kept + shots]
    return drawn, held_out
