"""The quickstart's study on texts: any BERT or RoBERTa, any files of labelled texts.

The script fine-tunes the encoder on every task in four ways: ordinary, linearised,
linearised with the curvature of the other tasks, and linearised with the τJp penalty.
The head is made from the pre-trained model and stays fixed. The script then makes task
vectors, merges them, evaluates, and writes a table, figures, task vectors and a merged
model.

    python -m experiments.text_study --model MODEL --out runs/text \\
        --task reviews=reviews.csv sst2=train.tsv,dev.tsv trec=trec.jsonl
    python -m experiments.text_study --model roberta-base --out runs/prompts \\
        --head label-word --task films=films.csv books=books.csv \\
        --prompt 'films={text} It was {mask}.|0:terrible,1:great' \\
                 'books={text} The book is {mask}.|bad:dull,good:exciting'

A file is .tsv or .csv with a header, or .jsonl; with any other suffix, every line is
`label text`. The columns are `label` and the first of the following that the file has:
`text` and `text_pair`, `sentence1` and `sentence2`, `question1` and `question2`,
`premise` and `hypothesis`, `question` and `sentence`, `text`, `sentence`, `question`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import script, studies, study_merges
from experiments.common.language import text_files
from jaxarith import evaluate, hub
from jaxarith.data import pipeline, prompts, splits, text
from jaxarith.models import bert, heads

_BATCH = 32  # texts in a batch of an evaluation
_HEAD_TEXTS = 250  # largest number of texts per class for a class-mean head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(text_files.Options, studies.Config):
    """Fine-tune, merge and evaluate on files of labelled texts."""

    model: str
    """A checkpoint of a BERT or RoBERTa: a folder, or an id of the Hugging Face Hub."""
    task: tuple[str, ...]
    """The tasks, each NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST. A part
    without a file is a tenth of the training file."""
    head: Literal["class-mean", "label-word"] = "class-mean"
    """The fixed head of a task. class-mean: the mean features of its classes, for any
    model. label-word: the label words of a prompt, for a masked language model."""
    prompt: tuple[str, ...] = ()
    """Prompts for label words, each NAME=TEMPLATE|CLASS:WORD,CLASS:WORD with {text} and
    {mask} in the template. sst2, mr, subj, trec and some others have a prompt of their
    own; the labels of their files must be Hugging Face's names of the classes."""
    merges: tuple[study_merges.Merge, ...] = ("ties", "tsv", "iso_c")
    """Merges of the ordinary vectors, besides task arithmetic."""
    max_length: int = 48
    """Largest number of tokens of a text; longer texts are cut. The time of a run is
    proportional to it."""
    batch_size: int = 16
    learning_rate: float = 5e-4
    penalty_coef: float = 0.02
    """Weight of the τJp penalty. If tasks have much in common, the papers' 0.1 for CLIP
    costs single tasks more accuracy than their sum gains."""
    curvature_rank: int = 8
    samples: int = 600
    """Largest number of texts of a test split, drawn at random. The validation split,
    which chooses coefficients, has at most a third of it."""


class Heads(NamedTuple):
    """The functions that depend on the kind of head.

    Attributes:
      apply_fn: the encoder, `apply_fn(params, *inputs) -> features[B, D]`.
      logits: `logits(head, features, valid)`.
      encode: `encode(task, records)`, returns a source of tokens.
      head: `head(task, source)`, makes a head from a source of training samples.
    """

    apply_fn: Callable
    logits: Callable
    encode: Callable
    head: Callable


def class_mean_heads(config: Config, model: bert.Bert, tokenizer) -> Heads:
    apply_fn = bert.mean_encoder(model.config)

    def head(task, source):
        labels = np.array([sample["label"] for sample in source])
        order = splits.torch_permutation(len(source), config.seed)
        of_class = [order[labels[order] == c] for c in range(len(task.classes))]
        chosen = np.concatenate([found[:_HEAD_TEXTS] for found in of_class])
        batches = pipeline.evaluation_batches([source[i] for i in chosen], _BATCH)
        inputs = inputs_of(source)
        features = evaluate.outputs(apply_fn, model.params, batches, inputs)
        return heads.class_means(features, evaluate.labels(batches), len(task.classes))

    def encode(task, records):
        return text.encode(tokenizer, records, config.max_length)

    return Heads(apply_fn, heads.logits, encode, head)


def label_word_heads(
    config: Config, model: bert.Bert, tokenizer, tasks: list[text.TextTask]
) -> Heads:
    classes = {task.name: task.classes for task in tasks}
    given = dict(map(text_files.read_prompt, config.prompt))
    if len(given) < len(config.prompt):
        raise ValueError(
            f"{len(config.prompt)} --prompt for {len(given)} tasks; give each task "
            "only one."
        )
    for name, prompt in given.items():
        if name not in classes:
            raise ValueError(
                f"--prompt is given for {name}, which --task does not name. Add it to "
                "--task, or remove the prompt."
            )
        if unknown := prompt.words.keys() - set(classes[name]):
            raise ValueError(
                f"--prompt {name} has words for {', '.join(sorted(unknown))}; the "
                f"classes of the task are {', '.join(classes[name])}."
            )
    known = prompts.TASKS | given
    if without := [task.name for task in tasks if task.name not in known]:
        raise ValueError(
            f"no prompt for {', '.join(without)}. Give one by --prompt; only "
            f"{', '.join(prompts.TASKS)} have a prompt of their own."
        )
    words = {
        task.name: prompts.word_ids(
            tokenizer, known[task.name].label_words(task.classes)
        )
        for task in tasks
    }
    output = bert.output_words(model.config, model.params)
    return Heads(
        bert.mask_encoder(model.config, tokenizer.mask_token_id),
        heads.affine_logits,
        lambda task, records: prompts.encode(
            tokenizer, known[task.name], records, config.max_length
        ),
        lambda task, source: heads.label_words(*output, words[task.name]),
    )


def inputs_of(source) -> tuple[str, ...]:
    """Returns the fields of a sample that the encoder reads."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(name for name in names if name in source[0])


def merged_config(model: bert.Bert, label_words: bool) -> dict:
    """Returns the config.json of the merged model.

    It is that of the checkpoint, without a head that was not loaded.
    """
    raw = hub.read_json(model.folder)
    base = {"bert": "BertModel", "roberta": "RobertaModel"}[model.config.model_type]
    return raw if label_words else raw | {"architectures": [base]}


def prepare(config: Config) -> studies.Study:
    """Loads the model, the tasks and their heads."""
    if config.samples < 3:
        raise ValueError(f"--samples {config.samples}: expected 3 or more.")
    if config.prompt and config.head != "label-word":
        raise ValueError(
            f"--prompt works only with --head label-word, not {config.head}."
        )
    tasks = [text_files.read_task(option, config) for option in config.task]
    label_words = config.head == "label-word"
    model = bert.load(config.model, head="masked_lm" if label_words else None)
    tokenizer = text.load_tokenizer(model.folder)
    text.check_vocabulary(tokenizer, model.config.vocab_size)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if not least <= config.max_length <= model.config.max_length:
        raise ValueError(
            f"--max-length {config.max_length}: expected {least} at least, and at most "
            f"{model.config.max_length}, the positions of the model."
        )
    if label_words:
        kind = label_word_heads(config, model, tokenizer, tasks)
    else:
        kind = class_mean_heads(config, model, tokenizer)

    def encoded(split, most=None):
        sources = []
        for task in tasks:
            records = getattr(task, split)
            chosen = splits.torch_permutation(len(records), config.seed)[:most]
            sources.append(kind.encode(task, [records[i] for i in sorted(chosen)]))
        return sources

    print("tokens …")
    train = encoded("train")
    full = np.mean([row["attention_mask"][-1] for source in train for row in source])
    print(f"{full:.1%} of the training texts fill or exceed {config.max_length} tokens")
    progress = tqdm(tasks, desc="heads", unit="task")
    head_of = [kind.head(task, x) for task, x in zip(progress, train, strict=True)]

    def datasets(split, most):
        return studies.datasets(encoded(split, most), head_of, kind.logits, _BATCH)

    return studies.Study(
        config=config,
        model=model,
        apply_fn=kind.apply_fn,
        params_0=model.params,
        trained=bert.BLOCKS,
        blocks=bert.BLOCK_LINEAR_WEIGHTS,
        inputs=inputs_of(train[0]),
        token_mask="attention_mask",
        logits=kind.logits,
        merged_config=merged_config(model, label_words),
        names=[task.name for task in tasks],
        classes=[task.classes for task in tasks],
        sources=train,
        validation=datasets("validation", config.samples // 3),
        test=datasets("test", config.samples),
    )


@script.full_precision
def main(config: Config) -> dict:
    """Runs the study; returns the content of `report.json`."""
    script.needs("demo", "transformers")
    studies.check([text_files.task_files(option)[0] for option in config.task])
    if config.smoke:
        config = dataclasses.replace(
            config, steps=4, batch_size=8, penalty_batch_size=8, samples=48
        )
    return studies.run(config, prepare, "Texts, merged")


if __name__ == "__main__":
    script.run(Config, main)
