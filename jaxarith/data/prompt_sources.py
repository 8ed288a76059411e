"""Finds and reads the prompted tasks of the task-vector-bases paper.

`prompts.bases_tasks` has the paper's list (Appendix D.3): a template and label words of
every task, with an id on the Hugging Face hub. `prompt_sources.json` beside this file
adds the facts that reading needs: configuration, splits, columns, and the class of each
label. It follows the authors' code where that code states them, and was not tried
against the hub.

Zeng et al. Efficient Model Editing with Task Vector Bases: A Theoretical Framework and
Scalable Approach. arXiv:2502.01015.
"""

import csv
import functools
import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxarith.data import prompts
from jaxarith.data.prompts import Prompt
from jaxarith.data.text import Record

# The archive of Gao, Fisch, Chen (2021), for the tasks whose entry names it.
LM_BFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar"

# The hub converts datasets that are scripts and keeps the result here.
CONVERTED = "hf://datasets/{}@refs%2Fconvert%2Fparquet"


class Source(NamedTuple):
    """A task of the list and the place of its records.

    Attributes:
      name: name of the task; ANLI has three tasks, bAbI twenty, ARC two.
      prompt: the template and the label words.
      dataset: an id on the Hugging Face hub, or an address.
      config: the configuration of the dataset, if it has several.
      files: if the dataset is an address, the folder of its files.
      train, test: the splits, or files. The paper tests on the validation split if the
        test split has no labels.
      fields: the fields of a record, as templates of a row's columns.
      label: the column of the label.
      classes: the class of the prompt for each label. Rows with other labels are left
        out.
      note: how the task differs from the printed one; empty if it does not.
    """

    name: str
    prompt: Prompt
    dataset: str
    config: str | None
    files: str | None
    train: str
    test: str
    fields: Mapping[str, str]
    label: str
    classes: Mapping[str, str]
    note: str


class Rows(NamedTuple):
    """A split whose records are made on access.

    Attributes:
      labels: the class of every row; None for a row that is left out.
      record: `record(i)` returns the fields of row i.
    """

    labels: list[str | None]
    record: Callable[[int], Record]


@functools.cache
def sources() -> dict[str, Source]:
    """Returns the 72 tasks of the list by name, and QQP, one of the twelve tasks.

    Example:
      >>> source = sources()["ARC Easy"]
      >>> source.dataset, source.config, source.classes["B"]
      ('allenai/ai2_arc', 'ARC-Easy', '1')
    """
    raw = json.loads((Path(__file__).parent / "prompt_sources.json").read_text())
    listed = prompts.bases_tasks()
    found = {}
    for name, entry in raw.items():
        known = listed.get(entry["prompt"])
        prompt = known.prompt if known else prompts.TASKS[entry["prompt"]]
        if "words" in entry:
            prompt = Prompt(prompt.template, entry["words"])
        found[name] = Source(
            name=name,
            prompt=prompt,
            dataset=known.dataset if known else entry["dataset"],
            config=entry.get("config"),
            files=entry.get("files"),
            train=entry["train"],
            test=entry["test"],
            fields=entry["fields"],
            label=entry["label"],
            classes=entry["classes"],
            note=entry.get("note", ""),
        )
    return found


def load(source: Source, part: str, data_dir: Path | None = None) -> Rows:
    """Loads the "train" or "test" part of a task.

    Args:
      source: one of `sources`.
      part: "train" or "test".
      data_dir: the folder in which LM-BFF's `datasets.tar` was unpacked, for SUBJ, CR,
        MPQA and MR.

    Raises:
      ValueError: files, a split or a column are missing; the message lists the splits
        that exist.
      ImportError: `datasets` is not installed.
    """
    split = source.train if part == "train" else source.test
    if source.files is None:
        return _rows(source, _hub(source.dataset, source.config, split))
    file = Path(data_dir or ".") / source.files / split
    if not file.is_file():
        raise ValueError(
            f"{source.name}: no file {file}. Unpack {LM_BFF} in a folder and give that "
            "folder as --data-dir."
        )
    with open(file, newline="", encoding="utf-8") as lines:
        cells = [row for row in csv.reader(lines) if row]
    columns = {"label": [c[0] for c in cells], "text": [",".join(c[1:]) for c in cells]}
    return _rows(source, columns)


def _hub(dataset, config, split):
    import datasets

    try:
        return datasets.load_dataset(dataset, config, split=split)
    except RuntimeError as error:
        # Since version 4, `datasets` runs no scripts; the hub has their converted data.
        if "scripts are no longer supported" not in str(error):
            raise
        return _converted(CONVERTED.format(dataset), config, split)


def _converted(root, config, split):
    """Loads a split of the hub's conversion, `ROOT/CONFIG/SPLIT/*.parquet`.

    The files are named one by one, because that branch has no card with configurations:
    `datasets` would take all files as one configuration "default".
    """
    import datasets
    import fsspec

    system, folder = fsspec.core.url_to_fs(root)
    files = system.glob(f"{folder}/*/*/*.parquet")
    found = sorted({tuple(file.split("/")[-3:-1]) for file in files})
    configs = sorted({name for name, _ in found})
    if config is None and len(configs) == 1:
        [config] = configs
    if (config, split) not in found:
        listed = ", ".join("/".join(pair) for pair in found) or "no Parquet file"
        raise ValueError(
            f"{root} has no {config or 'default'}/{split}; it has {listed}. Give the "
            "task as a file, NAME=FILE."
        )
    place = {split: f"{root}/{config}/{split}/*.parquet"}
    return datasets.load_dataset("parquet", data_files=place, split=split)


def _rows(source, table):
    """Returns the rows of a dataset, or of a dict of columns."""
    columns = list(getattr(table, "column_names", table))
    filled = {name: _names(template) for name, template in source.fields.items()}
    needed = {source.label, *(name for found in filled.values() for name in found)}
    if missing := sorted(needed - set(columns)):
        raise ValueError(
            f"{source.name}: {source.dataset} has no column {', '.join(missing)}. It "
            f"has {', '.join(columns)}. Give the task as a file, {source.name}=FILE."
        )
    labels = [source.classes.get(_plain(label)) for label in table[source.label]]

    def record(i):
        if isinstance(table, dict):
            row = {name: table[name][i] for name in columns}
        else:
            row = table[int(i)]
        return fields(source, row)

    return Rows(labels, record)


def fields(source: Source, row: Mapping) -> Record:
    """Returns the fields of a record from a row of the dataset.

    A choice that a row lacks becomes the empty text, and several texts are joined.

    Args:
      source: one of `sources`.
      row: the values of the row by column.

    Example:
      >>> row = {"question": "Which?", "choices": {"text": ["x", "y"]}}
      >>> list(fields(sources()["ARC Easy"], row).values())
      ['Which?', 'x', 'y', '', '', '']
    """
    fill = _Filler().vformat
    return {name: fill(text, (), row).strip() for name, text in source.fields.items()}


class _Filler(string.Formatter):
    def get_field(self, field_name, args, kwargs):
        try:
            return super().get_field(field_name, args, kwargs)
        except IndexError:
            return "", field_name

    def format_field(self, value, format_spec):
        if isinstance(value, list | tuple):
            return " ".join(map(str, value))
        return "" if value is None else format(value, format_spec)


def _names(template):
    """Returns the columns that a template reads."""
    parts = string.Formatter().parse(template)
    return {name.split("[")[0].split(".")[0] for _, name, _, _ in parts if name}


def _plain(label):
    """Returns a label as text; a whole number has no decimal point."""
    if isinstance(label, bool | float) and float(label).is_integer():
        label = int(label)
    return str(label)
