"""Reads texts with labels, makes classification tasks of them, and tokenizes them."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from jaxarith import files, tree
from jaxarith.data import labelled, splits
from jaxarith.data.labelled import COLUMNS as COLUMNS

Tokenizer: TypeAlias = Any  # a tokenizer of transformers
Side = Literal["left", "right"]
Record = dict  # {"text": str, "label": str or int}, and "text_pair": str for pairs


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A classification task: the names of its classes, and records with their numbers.

    Attributes:
      name: name of the task.
      classes: names in the order of their numbers.
      train, validation, test: records `{"text": str, "label": int}`, with a
        `"text_pair"` if the task is about two texts; `encode` turns them into tokens.
    """

    name: str
    classes: tuple[str, ...]
    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]


def read(
    file: str | os.PathLike, *, encoding: str = "utf-8-sig", skip_bad: bool = False
) -> list[Record]:
    """Reads the records of a classification file. Its suffix states the format.

    - `.tsv`: a header, then cells separated by tabs; quotes are ordinary characters.
    - `.csv`: a header, then cells separated by commas, in quotes if needed.
    - `.jsonl`, `.ndjson`, `.json`: an object per line.
    - any other suffix: `label text` on every line.

    A table has its labels in the column `label`, and its texts in the first of these
    columns that exist: `text` and `text_pair`, `sentence1` and `sentence2`, `question1`
    and `question2`, `premise` and `hypothesis`, `question` and `sentence`, `text`,
    `sentence`, `question`. Blank lines are ignored.

    Args:
      file: the file.
      encoding: its encoding, as Python names it. No other encoding is tried.
      skip_bad: whether to leave out bad lines, and count them in a warning.

    Returns:
      `{"text": str, "label": str}` per record, in order, with `"text_pair"` for pairs.

    Raises:
      ValueError: the file is missing, empty, without these columns or in another
        encoding, or a line lacks its label or text or is not a record.

    Warns:
      UserWarning: lines were left out.
    """
    path = Path(file)
    if not path.exists():
        raise ValueError(f"{path}: no such file. Check the path.")
    found = labelled.records(_decoded(path, encoding, skip_bad), path)
    bad = [(line, row) for line, row in found if isinstance(row, str)]
    if bad and not skip_bad:
        raise ValueError(f"{path}, line {bad[0][0]}{bad[0][1]}")
    if len(found) == len(bad):
        raise ValueError(
            f"{path} holds no record: it is empty, or has only a header. Add records."
        )
    if bad:
        line, problem = bad[0]
        warnings.warn(
            f"{path}: {len(bad)} of {tree.counted(len(found), 'record')} left out. "
            f"Line {line}{problem}",
            stacklevel=2,
        )
    return [row for _, row in found if not isinstance(row, str)]


def _decoded(path, encoding, skip_bad):
    raw = files.read(path)
    try:
        # Bytes that cannot be decoded become characters that `labelled` recognises.
        return raw.decode(encoding, "surrogateescape" if skip_bad else "strict")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not in {error.encoding}: {error.reason}, byte "
            f"{error.start}. Convert the file, give its encoding (for example "
            "latin-1), or leave such lines out (skip_bad)."
        ) from error


def task(
    name: str,
    train: Sequence[Record],
    validation: Sequence[Record] | None = None,
    test: Sequence[Record] | None = None,
) -> TextTask:
    """Makes a task from the records that `read` returns.

    A missing part becomes a tenth of the training records, at most 5,000, drawn by
    `splits.torch_permutation`. If both are missing, they are disjoint. Classes are
    sorted by name, or by value if all are numbers.

    Args:
      name: name of the task.
      train, validation, test: records of the parts.

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
                records = "training record is", "training records are"
                raise ValueError(
                    f"{name}: {tree.counted(len(train), *records)} too few "
                    f"to take a tenth of them for {part}. Give a file for it."
                )
            order, chosen = order[:-size], order[-size:]
            parts[part] = [train[i] for i in chosen]
    parts["train"] = [train[i] for i in sorted(order)]
    empty = [part for part, records in parts.items() if not len(records)]
    if empty:
        raise ValueError(f"{name}: no record in {' and '.join(empty)}. Add records.")

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
                f"{name}: {part} has labels that train lacks: {', '.join(unseen)}. "
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
    """Loads the tokenizer in the folder of a checkpoint with transformers.

    Args:
      folder: the folder of the checkpoint.

    Raises:
      ValueError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    folder, reason = Path(folder), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        # Without its files, transformers makes a tokenizer with only special tokens.
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if len(tokenizer.get_vocab().keys() - special) > 1:
            return tokenizer
    except Exception as error:  # many kinds, and few say that files are missing
        reason = error
    found = sorted(file.name for file in folder.glob("*")) or "nothing"
    raise ValueError(
        f"{folder} has no tokenizer that transformers can read; it holds {found}. It "
        "needs config.json with tokenizer.json, vocab.json and merges.txt (GPT-2, "
        "RoBERTa), vocab.txt (BERT) or spiece.model (T5; sentencepiece and protobuf "
        "read it)."
    ) from reason


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises a ValueError if the embedding lacks rows for the tokenizer's ids."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model's embedding has "
            f"{vocab_size} rows. Load the tokenizer that belongs to the model. If "
            "words were added to it, append as many rows to the embedding."
        )


def encode(
    tokenizer: Tokenizer, records: Sequence[Record], max_length: int
) -> list[dict]:
    """Encodes records as tokens of one length, for a classifier.

    Longer texts are cut to `max_length` tokens, special tokens included; in a pair, the
    longer text is cut first. Shorter ones are padded on the right.

    Args:
      tokenizer: a tokenizer of transformers. One without a padding token (GPT-2) pads
        with its end-of-text token; the attention mask is 0 there in both cases.
      records: `{"text": str, "label": int}`, with `"text_pair"` in all or in none. The
        label may be a float, for a regression.
      max_length: tokens in each row, S.

    Returns:
      A source: `{"input_ids": i32[S], "attention_mask": i32[S], "label": i32[]}` per
      record, and `"token_type_ids": i32[S]` if the tokenizer makes them (BERT).
    """
    if not len(records):
        raise ValueError("there are no records to encode. Give at least one.")
    texts = [record["text"] for record in records]
    pairs = [record["text_pair"] for record in records if "text_pair" in record]
    if pairs and len(pairs) != len(texts):
        raise ValueError(
            f"only {len(pairs)} of {len(texts)} records have a text_pair; expected all "
            "or none."
        )
    tokens = tokenizer(texts, pairs or None, truncation=True, max_length=max_length)
    ids, mask = pad(tokens["input_ids"], max_length, padding_id(tokenizer))
    columns = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in tokens:
        columns["token_type_ids"], _ = pad(tokens["token_type_ids"], max_length, 0)
    columns["label"] = labels(records)
    return rows(columns)


def labels(records: Sequence[Record]) -> np.ndarray:
    """Returns the labels of records: `i32[B]`, or `f32[B]` if they are floats.

    Args:
      records: records with a `"label"`.

    Raises:
      ValueError: the labels are names.
    """
    values = np.asarray([record["label"] for record in records])
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"the label {values.flat[0]!r} is not a number. Use `task`, which numbers "
            "the classes."
        )
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


def padding_id(tokenizer: Tokenizer) -> int:
    """Returns a tokenizer's padding token, or else its end-of-text token."""
    pad_id = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad_id is None else pad_id


def pad(
    sequences: Sequence[Sequence[int]], length: int, value: int, side: Side = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Pads token sequences of different lengths to one array.

    Args:
      sequences: lists of ids, each with at most `length` ids.
      length: the length of the rows.
      value: the id that fills the padding.
      side: the side of the padding; "left" for the prompts of a causal language model.

    Returns:
      `(ids, mask)`, both `i32[B, length]`; the mask is 0 at padding.

    Raises:
      ValueError: a sequence is longer than `length`.

    Example:
      >>> pad([[5, 6], [7]], 3, 0, side="left")[0].tolist()
      [[0, 5, 6], [0, 0, 7]]
    """
    if side not in get_args(Side):
        raise ValueError(f'side is {side!r}; expected "left" or "right".')
    lengths = np.array([len(sequence) for sequence in sequences], int)
    if (lengths > length).any():
        count = tree.counted(int(lengths.max()), "token")
        raise ValueError(f"a sequence has {count}; expected at most {length}.")
    room = np.arange(length)
    # The mask selects the places row by row, in the order of the ids.
    mask = (
        room < lengths[:, None]
        if side == "right"
        else room >= length - lengths[:, None]
    )
    ids = np.full((len(lengths), length), value, np.int32)
    ids[mask] = [token for sequence in sequences for token in sequence]
    return ids, mask.astype(np.int32)


def rows(columns: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Returns columns of one length as a source of dicts, without a copy.

    Args:
      columns: arrays `[N, ...]` by name.
    """
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def _sorted(labels):
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))
