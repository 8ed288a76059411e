"""Texts with labels: their files, classification tasks, and tokens for a model."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from jaxarith import files
from jaxarith.data import labelled, splits
from jaxarith.data.labelled import COLUMNS as COLUMNS

Tokenizer: TypeAlias = Any  # one of transformers
Side = Literal["left", "right"]
Record = dict  # {"text": str, "label": str or int}, and "text_pair": str for pairs


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A classification task: the names of its classes, and records with their numbers.

    Attributes:
      name: name of the task.
      classes: names in the order of their numbers.
      train, validation, test: records `{"text": str, "label": int}`, with a
        `"text_pair"` where the task is about two texts; `encode` makes tokens of them.
    """

    name: str
    classes: tuple[str, ...]
    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]


def read(
    file: str | os.PathLike, *, encoding: str = "utf-8-sig", skip_bad: bool = False
) -> list[Record]:
    """The records of a classification file, by its suffix.

    - `.tsv`: a header, then cells between tabs; a quote is a character like any other.
    - `.csv`: a header, then cells between commas, quoted where they need it.
    - `.jsonl`, `.ndjson`, `.json`: an object per line.
    - anything else: `label text` on every line.

    A table holds its labels under `label` and its texts under the first of these that
    it has: `text` and `text_pair`, `sentence1` and `sentence2`, `question1` and
    `question2`, `premise` and `hypothesis`, `question` and `sentence`, `text`,
    `sentence`, `question`. Blank lines do not count.

    Args:
      file: the file.
      encoding: its encoding, as Python names it. No other is ever tried.
      skip_bad: whether lines that are wrong are left out, and counted in a warning.

    Returns:
      `{"text": str, "label": str}` per record, in order, with `"text_pair"` for pairs.

    Raises:
      ValueError: the file is missing, empty, without these columns, in another
        encoding, or a line lacks its label or text or is no record.

    Warns:
      UserWarning: lines were left out.
    """
    path = Path(file)
    if not path.exists():
        raise ValueError(f"{path}: no such file.")
    found = labelled.records(_decoded(path, encoding, skip_bad), path)
    bad = [(line, row) for line, row in found if isinstance(row, str)]
    if bad and not skip_bad:
        raise ValueError(f"{path}, line {bad[0][0]}{bad[0][1]}")
    if len(found) == len(bad):
        raise ValueError(f"{path} holds no record: it is empty, or has only a header.")
    if bad:
        line, problem = bad[0]
        warnings.warn(
            f"{path}: {len(bad)} of {len(found)} records were left out; the first, "
            f"line {line}{problem}",
            stacklevel=2,
        )
    return [row for _, row in found if not isinstance(row, str)]


def _decoded(path, encoding, skip_bad):
    raw = files.read(path)
    try:
        # What cannot be decoded becomes characters that `labelled` knows.
        return raw.decode(encoding, "surrogateescape" if skip_bad else "strict")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not in {error.encoding}: {error.reason}, byte "
            f"{error.start}. Convert the file, give its encoding (such as latin-1), or "
            "leave such lines out (skip_bad)."
        ) from error


def task(
    name: str,
    train: Sequence[Record],
    validation: Sequence[Record] | None = None,
    test: Sequence[Record] | None = None,
) -> TextTask:
    """A task of the records that `read` returns.

    A part that is not given is a tenth of the training records, at most 5,000, drawn
    without order by `splits.torch_permutation`; where both are missing, they are
    disjoint. Classes are sorted by name, or by value where all are numbers.

    Raises:
      ValueError: a part is empty, the training part has a single class, or another part
        has a class that the training part lacks.

    Example:
      >>> records = [{"text": f"text {i}", "label": str(i % 2)} for i in range(40)]
      >>> mine = task("parity", records)
      >>> mine.classes, len(mine.train), len(mine.validation), len(mine.test)
      (('0', '1'), 32, 4, 4)
    """
    parts = {"train": train, "validation": validation, "test": test}
    order, size = splits.torch_permutation(len(train)), min(len(train) // 10, 5000)
    drawn = [part for part in ("test", "validation") if parts[part] is None]
    for part in ("test", "validation"):
        if parts[part] is None:
            if not size:
                raise ValueError(
                    f"{name}: {len(train)} training records are too few to split a "
                    f"tenth off for {part}. Give a file for it."
                )
            order, chosen = order[:-size], order[-size:]
            parts[part] = [train[i] for i in chosen]
    parts["train"] = [train[i] for i in sorted(order)]
    empty = [part for part, records in parts.items() if not len(records)]
    if empty:
        raise ValueError(f"{name}: no record in {' and '.join(empty)}.")

    classes = _sorted({record["label"] for record in parts["train"]})
    if len(classes) < 2:
        raise ValueError(
            f"{name}: every training record has the label {next(iter(classes))!r}; "
            "a classification task needs two classes."
        )
    numbers = {label: number for number, label in enumerate(classes)}
    for part, records in parts.items():
        unseen = _sorted({record["label"] for record in records} - set(numbers))
        if unseen:
            advice = "Correct the labels, or leave these classes out."
            if part in drawn:
                advice = (
                    f"They are so rare that the tenth drawn for {part} has them all. "
                    "Leave these classes out, or give a file for each part."
                )
            raise ValueError(
                f"{name}: {part} has labels that train has not: {', '.join(unseen)}. "
                f"Train has {', '.join(classes)}. {advice}"
            )
    return TextTask(
        name,
        classes,
        **{
            part: [{**record, "label": numbers[record["label"]]} for record in records]
            for part, records in parts.items()
        },
    )


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer that lies with a checkpoint, through transformers.

    Raises:
      ValueError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    folder, reason = Path(folder), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        # Without its files, transformers makes a tokenizer of special tokens alone.
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if len(tokenizer.get_vocab().keys() - special) > 1:
            return tokenizer
    except Exception as error:  # of many kinds, and few say that files are missing
        reason = error
    found = sorted(file.name for file in folder.glob("*")) or "nothing"
    raise ValueError(
        f"{folder} has no tokenizer that transformers can read; it holds {found}. It "
        "needs config.json with tokenizer.json, vocab.json and merges.txt (GPT-2, "
        "RoBERTa), vocab.txt (BERT) or spiece.model (T5; sentencepiece and protobuf "
        "read it)."
    ) from reason


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises a ValueError where the embedding lacks rows for the tokenizer's ids."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest} and the model's embedding has "
            f"{vocab_size} rows. Load the tokenizer that belongs to the model; if "
            "words were added to it, append as many rows to the embedding."
        )


def encode(
    tokenizer: Tokenizer, records: Sequence[Record], max_length: int
) -> list[dict]:
    """Records as tokens of one length, for a classifier.

    Longer texts are cut to `max_length` tokens, special tokens included; of a pair, the
    longer text first. Shorter ones are padded on the right.

    Args:
      tokenizer: a tokenizer of transformers. One without a padding token (GPT-2) pads
        with its end of text; the attention mask is 0 there either way.
      records: `{"text": str, "label": int}`, with `"text_pair"` in all or in none; the
        label may be a float, for a regression.

    Returns:
      A source: `{"input_ids": i32[S], "attention_mask": i32[S], "label": i32[]}` per
      record, and `"token_type_ids": i32[S]` where the tokenizer makes them (BERT).
    """
    if not len(records):
        raise ValueError("there are no records to encode.")
    texts = [record["text"] for record in records]
    pairs = [record["text_pair"] for record in records if "text_pair" in record]
    if pairs and len(pairs) != len(texts):
        raise ValueError(f"{len(pairs)} of {len(texts)} records have a text_pair.")
    tokens = tokenizer(texts, pairs or None, truncation=True, max_length=max_length)
    ids, mask = pad(tokens["input_ids"], max_length, padding_id(tokenizer))
    columns = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in tokens:
        columns["token_type_ids"], _ = pad(tokens["token_type_ids"], max_length, 0)
    columns["label"] = labels(records)
    return rows(columns)


def labels(records: Sequence[Record]) -> np.ndarray:
    """The labels of records: `i32[B]`, or `f32[B]` where they are floats.

    Raises:
      ValueError: they are names.
    """
    values = np.asarray([record["label"] for record in records])
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"the label {values.flat[0]!r} is no number; `task` numbers the classes."
        )
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


def padding_id(tokenizer: Tokenizer) -> int:
    """What a tokenizer pads with: its end of text where it has no token for it."""
    pad_id = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad_id is None else pad_id


def pad(
    sequences: Sequence[Sequence[int]], length: int, value: int, side: Side = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Token sequences of many lengths as one array.

    Args:
      sequences: ids, at most `length` of each.
      value: fills the room that is left.
      side: where that room is; "left" for the prompts of a causal language model.

    Returns:
      `(ids, mask)`, both `i32[B, length]`; the mask is 0 at padding.

    Raises:
      ValueError: a sequence is longer than `length`.

    Example:
      >>> pad([[5, 6], [7]], 3, 0, side="left")[0].tolist()
      [[0, 5, 6], [0, 0, 7]]
    """
    if side not in get_args(Side):
        raise ValueError(f'cannot pad on the {side!r} side; "left" or "right".')
    lengths = np.array([len(sequence) for sequence in sequences], int)
    if (lengths > length).any():
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit {length}.")
    room = np.arange(length)
    # The mask picks the places row by row, in the order of the ids.
    mask = (
        room < lengths[:, None]
        if side == "right"
        else room >= length - lengths[:, None]
    )
    ids = np.full((len(lengths), length), value, np.int32)
    ids[mask] = [token for sequence in sequences for token in sequence]
    return ids, mask.astype(np.int32)


def rows(columns: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Columns of a common length as a source of dicts, without a copy."""
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def _sorted(labels):
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))
