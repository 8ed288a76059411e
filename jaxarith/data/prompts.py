"""Classification as masked language modelling: prompts and label words.

Gao, Fisch, Chen. Making Pre-trained Language Models Better Few-shot Learners. ACL 2021.
Templates and words are those of the task-vector-bases paper (Appendix D.3).
"""

import dataclasses
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxarith.data import splits, text
from jaxarith.data.text import Record, Tokenizer

_MASK = "mask"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A template that asks for one word, and the word for every class.

    Attributes:
      template: a text with `{mask}` once, and with fields of a record (`{text}`).
      words: the label words, by the names of the classes.

    Raises:
      ValueError: the template has no `{mask}`, or several, or no field.

    Example:
      >>> prompt = Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"})
      >>> prompt.fields, prompt.label_words(["good", "bad"])
      (('text',), ('great', 'terrible'))
    """

    template: str
    words: Mapping[str, str]

    def __post_init__(self):
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.template)]
        except ValueError:  # a brace without its partner
            names = []
        if names.count(_MASK) != 1 or "" in names or not self.fields:
            raise ValueError(
                f"the template {self.template!r} must contain {{mask}} once and a "
                "field such as {text}."
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record in the template, in order."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template)]
        return tuple(dict.fromkeys(name for name in names if name and name != _MASK))

    def label_words(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Returns the label words for classes, in the order of the classes.

        Raises:
          ValueError: a class has no word.
        """
        missing = [name for name in classes if name not in self.words]
        if missing:
            raise ValueError(
                f"the prompt has no label word for {', '.join(missing)}; it has words "
                f"for {', '.join(self.words)}. Give every class of the task a word."
            )
        return tuple(self.words[name] for name in classes)


_SENTIMENT = Prompt(
    "{text} It was {mask}.", {"negative": "terrible", "positive": "great"}
)
_ENTAILMENT = {"entailment": "Yes", "not_entailment": "No"}
_INFERENCE = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

# The twelve tasks of He et al. 2024 (Localize-and-Stitch), with Hugging Face's names of
# the classes, as the bases paper prints them. It lacks QQP, which is from the code of
# He et al. That code differs from the paper: "Number" for NUM; no blank before the
# comma; the first sentence of QNLI, SNLI, MNLI and RTE has no last token; the second
# sentence begins with a small letter.
TASKS = {
    "sst2": _SENTIMENT,
    "cr": _SENTIMENT,
    "mr": _SENTIMENT,
    "mpqa": _SENTIMENT,
    "trec": Prompt(
        "{mask}: {text}",
        {
            "ABBR": "Expression",
            "ENTY": "Entity",
            "DESC": "Description",
            "HUM": "Human",
            "LOC": "Location",
            "NUM": "number",
        },
    ),
    "subj": Prompt(
        "{text} This is {mask}.",
        {"subjective": "subjective", "objective": "objective"},
    ),
    "qnli": Prompt("{text}? {mask} , {text_pair}", _ENTAILMENT),
    "snli": Prompt("{text}? {mask} , {text_pair}", _INFERENCE),
    "mnli": Prompt("{text}? {mask} , {text_pair}", _INFERENCE),
    "rte": Prompt("{text}? {mask} , {text_pair}", _ENTAILMENT),
    "mrpc": Prompt(
        "{text} {mask} , {text_pair}", {"not_equivalent": "No", "equivalent": "Yes"}
    ),
    "qqp": Prompt(
        "{text} {mask}, {text_pair}", {"not_duplicate": "No", "duplicate": "Yes"}
    ),
}


class Entry(NamedTuple):
    """A paragraph of the bases paper's task list.

    Attributes:
      prompt: the template and the words, with the paper's names of classes.
      dataset: an id on the Hugging Face hub, or an address.
      tasks: the number of tasks that share this prompt (three of ANLI, twenty of bAbI).
    """

    prompt: Prompt
    dataset: str
    tasks: int


def bases_tasks() -> dict[str, Entry]:
    """Returns the language tasks of the task-vector-bases paper (Appendix D.3) by name.

    The entries are as printed, where the print is complete. They are 72; the paper uses
    70 and does not say which. Web of Science has seven labels in the paper, but six
    words. Full stops that end the paper's own sentences are not in the templates.
    Fields other than `text` and `text_pair` are `word`, `phrase1`, `phrase2`,
    `context`, `question` and `choice1` to `choice5`; a choice that a question lacks is
    the empty text.
    """
    raw = json.loads((Path(__file__).parent / "prompt_tasks.json").read_text())
    return {
        name: Entry(
            Prompt(entry["template"], entry["words"]),
            entry["dataset"],
            entry.get("tasks", 1),
        )
        for name, entry in raw.items()
    }


def fill(prompt: Prompt, record: Record, mask_token: str) -> str:
    """Returns the prompt's text with the fields of a record filled in.

    Args:
      prompt: the prompt.
      record: the fields of the template, by name.
      mask_token: the tokenizer's mask token.

    Raises:
      ValueError: the record lacks a field, or holds the mask token itself.

    Example:
      >>> fill(TASKS["sst2"], {"text": "No fun at all."}, "<mask>")
      'No fun at all. It was <mask>.'
    """
    missing = [name for name in prompt.fields if name not in record]
    if missing:
        raise ValueError(
            f"the template {prompt.template!r} needs {', '.join(missing)}, but the "
            f"record has {', '.join(record)}."
        )
    fields = {name: record[name] for name in prompt.fields}
    if any(mask_token in value for value in fields.values()):
        raise ValueError(
            f"a text contains the mask token {mask_token!r}: {fields}. Remove it."
        )
    return prompt.template.format(**fields, **{_MASK: mask_token})


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> np.ndarray:
    """Returns the token of every label word inside a text, after a blank.

    A word that was added to the tokenizer is found as it was added. (The bases paper
    adds unknown words.)

    Args:
      tokenizer: a tokenizer of transformers.
      words: the label word of every class.

    Returns:
      `i32[classes]`.

    Raises:
      ValueError: a word is several tokens, or unknown, or two classes share a token.
    """
    added, ids = tokenizer.get_added_vocab(), []
    for word in words:
        tokens = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if word in added:
            tokens = [added[word]]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise ValueError(
                f"the label word {word!r} has the tokens {pieces}; expected one token. "
                f"Choose another word, or add it with tokenizer.add_tokens([{word!r}]) "
                "and add a row to the model's word embedding."
            )
        ids += tokens
    if len(set(ids)) < len(ids):
        raise ValueError(f"two classes share a label word: {', '.join(words)}.")
    return np.asarray(ids, np.int32)


def word_pieces(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of every label word after a blank, one or several.

    If a word has several tokens, the mean of their rows in the output matrix can serve
    as the word's own row, as if a token had been added for it. The bases paper adds
    tokens, and does not say what their rows are.

    Args:
      tokenizer: a tokenizer of transformers.
      words: the label word of every class.

    Raises:
      ValueError: a word is unknown, or two classes share a word.
    """
    pieces = [tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in words]
    unknown = [
        word
        for word, ids in zip(words, pieces, strict=True)
        if not ids or tokenizer.unk_token_id in ids
    ]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(unknown)}.")
    if len(set(map(tuple, pieces))) < len(pieces):
        raise ValueError(f"two classes share a label word: {', '.join(words)}.")
    return pieces


def few_shot(records: Sequence[Record], per_class: int, seed: int = 0) -> list[Record]:
    """Draws records at random, equally many of every class (64 in the bases paper).

    Args:
      records: records with a `"label"`.
      per_class: the number of records for each class.
      seed: seed of the draw.

    Raises:
      ValueError: a class has fewer records.
    """
    drawn: dict[Any, list[Record]] = {}
    for i in splits.torch_permutation(len(records), seed):
        of_class = drawn.setdefault(records[i]["label"], [])
        if len(of_class) < per_class:
            of_class.append(records[i])
    few = {label: len(found) for label, found in drawn.items()}
    few = {label: number for label, number in few.items() if number < per_class}
    if few or not drawn:
        raise ValueError(
            f"cannot draw {per_class} records per class; these classes have fewer: "
            f"{few or 'there are no records'}."
        )
    return [record for label in sorted(drawn) for record in drawn[label]]


def encode(
    tokenizer: Tokenizer, prompt: Prompt, records: Sequence[Record], max_length: int
) -> list[dict]:
    """Encodes records in their prompt as tokens of one length, padded on the right.

    If a text is too long, the ends of the longest fields are cut, but never the
    template. So the mask is kept: it is where `input_ids` is `tokenizer.mask_token_id`.

    Args:
      tokenizer: a tokenizer of transformers with a mask token.
      prompt: the prompt.
      records: `{"label": int}` and the fields of the template.
      max_length: tokens in each row, S.

    Returns:
      A source: `{"input_ids": i32[S], "attention_mask": i32[S], "label": i32[]}` per
      record.

    Raises:
      ValueError: the tokenizer has no mask token, or the template alone is too long.
    """
    if tokenizer.mask_token is None:
        raise ValueError(
            "the tokenizer has no mask token, but prompts need a masked language "
            "model. Use RoBERTa or BERT."
        )
    texts = [_filled(tokenizer, prompt, record) for record in records]
    sequences = [
        ids
        if len(ids) <= max_length
        else _shortened(tokenizer, prompt, record, max_length)
        for ids, record in zip(tokenizer(texts)["input_ids"], records, strict=True)
    ]
    ids, mask = text.pad(sequences, max_length, text.padding_id(tokenizer))
    columns = {"input_ids": ids, "attention_mask": mask, "label": text.labels(records)}
    return text.rows(columns)


def _filled(tokenizer, prompt, record):
    # RoBERTa's mask token includes the blank before it. If transformers 5 reads it from
    # vocab.json and merges.txt, it does not, and the blank would be a separate token.
    mask = tokenizer.mask_token
    return fill(prompt, record, mask).replace(f" {mask}", mask)


def _shortened(tokenizer, prompt, record, max_length):
    fields = {name: record[name] for name in prompt.fields}
    while True:
        ids = tokenizer(_filled(tokenizer, prompt, fields))["input_ids"]
        excess = len(ids) - max_length
        if excess <= 0:
            return ids
        ends = {name: _token_ends(tokenizer, value) for name, value in fields.items()}
        kept = {name: len(found) for name, found in ends.items()}
        if sum(kept.values()) == 0:
            raise ValueError(
                f"the template {prompt.template!r} alone takes {len(ids)} tokens, but "
                f"max_length is {max_length}. Raise max_length."
            )
        while excess > 0 and any(kept.values()):
            longest = max(kept, key=kept.__getitem__)
            kept[longest] -= 1
            excess -= prompt.template.count(f"{{{longest}}}")  # it may occur twice
        # The rest may get other tokens at its new end, so the loop checks again.
        fields = {
            name: value[: ends[name][kept[name] - 1]] if kept[name] else ""
            for name, value in fields.items()
        }


def _token_ends(tokenizer, value):
    encoding = tokenizer(value, add_special_tokens=False, return_offsets_mapping=True)
    return [end for _, end in encoding["offset_mapping"]]
