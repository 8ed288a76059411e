"""Figure 18 (editing paper): adds pairs of task vectors of six public T5-base models.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089:
Appendix D.6.

    python -m experiments.editing.figure18_nlp_pairs --data-dir DATA
    python -m experiments.editing.figure18_nlp_pairs --data-dir DATA --tasks imdb qasc

Data: for every task `DATA/<task>_validation.jsonl` and `DATA/<task>_test.jsonl`. Every
line is an object with the texts `input` and `target`, in the form that the task's
checkpoint was trained with. The six models, `mrm8488/t5-base-finetuned-…`, and
`google-t5/t5-base` are fetched from the Hub:

    task        checkpoint              metric       tokens
    imdb        imdb-sentiment          accuracy     -
    race        race                    exact match  64
    qasc        qasc                    exact match  64
    multi_news  summarize-news          ROUGE-2      512
    squad       question-generation-ap  ROUGE-2      64
    common_gen  common_gen              ROUGE-2      64

Accuracy ranks the targets of the file. Exact match and ROUGE-2 (its F-measure) use the
generated text. The column "tokens" limits a generated text: summaries of MultiNews have
264 words on average (Fabbri et al. 2019), and an English word takes about 1.3 tokens;
the other targets are a phrase or a sentence.

To make the files, write a line for each row of a dataset of the Hub. If its test split
has no labels, test on its validation split. If no validation split is left, hold out as
many training rows:

    files       dataset                validation  test        input; target
    imdb        stanfordnlp/imdb       of train    test        text; positive, negative
    race        ehovy/race, all        validation  test        *; the right option
    qasc        allenai/qasc           of train    validation  *; the right option
    multi_news  alexfabbri/multi_news  validation  test        document; summary
    squad       rajpurkar/squad        of train    validation  **; question
    common_gen  allenai/common_gen     of train    validation  concepts; target

*: question, options and facts or article; **: "answer: … context: …". The card of a
model shows the exact form, and words before a target, for example "question:"; the
model of race has no card. We have not tried them. A form is right if the model's own
score is high; `report.json` has it under "single".

Two vectors are added with one coefficient out of 0, 0.05, …, 1. The score on each of
the two tasks is divided by that of its own model. Published: a plot, and in percent

    pairs              normalized
    mean of all pairs  96.7

The paper leaves the following open; our choices are:

- Every pair has the coefficient with the best mean normalised score on the validation
  files. The figure shows the scores on the test files.
- Generation takes the most likely token. ROUGE-2 does not stem words.
- θ0 is the first version of T5-base, as the names suggest.
"""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import planning, runs, script, tables
from experiments.common.language import planned, text_files, text_to_text, tiny_text
from jaxarith import evaluate, metrics, plots, task_vectors
from jaxarith.data import glue, language
from jaxarith.models import t5
from jaxarith.typing import Params

_TASKS = tables.published(__doc__, "task", value=str)
CHECKPOINTS = {
    k: f"mrm8488/t5-base-finetuned-{name}" for k, (name, *_) in _TASKS.items()
}
SAMPLES = 500  # texts that a plan assumes for a file without --samples
METRICS = {task: metric for task, (_, metric, _) in _TASKS.items()}
NEW_TOKENS = {
    task: int(tokens) for task, (*_, tokens) in _TASKS.items() if tokens != "-"
}
PUBLISHED = tables.published(__doc__, "pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(text_to_text.Options):
    """Figure 18 (editing paper): add pairs of T5-base models of the Hub."""

    model: str = "google-t5/t5-base"
    """The T5 that all models were fine-tuned from: a folder, or an id of the Hub."""
    tasks: tuple[str, ...] = tuple(CHECKPOINTS)
    """Names of at least two tasks."""
    checkpoints: tuple[str, ...] = ()
    """The models of the tasks, folders or ids; by default those of the paper."""
    data_dir: Path = Path("data")
    """Folder with the files of the tasks."""
    samples: int | None = 500
    """Number of texts of a file, from its start."""
    max_length: int = 512
    max_new_tokens: int | None = None
    """Largest number of tokens of a generated text; by default that of the task."""
    coefs: tuple[float, ...] = tuple(i / 20 for i in range(21))
    """Candidate values of the coefficient."""


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      name: name of the task.
      records: the records `{"text", "target"}` of "validation" and "test".
      batches: the same records as tokens.
      classes: the possible targets, for tasks that rank them.
      max_new_tokens: largest number of tokens of a text, for tasks that generate.
    """

    name: str
    records: dict[str, list[dict]]
    batches: dict[str, list[dict]]
    classes: list[str]
    max_new_tokens: int


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    if record := planning.recorder():
        plan(config, record)
        return {}
    script.needs("text", "rouge_score", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        if config.smoke:
            return run(*smoke(config, Path(folder)))
        own = tuple(CHECKPOINTS.get(name, name) for name in config.tasks)
        return run(config, config.checkpoints or own)


def smoke(config: Config, folder: Path) -> tuple[Config, Sequence[str]]:
    """Makes tiny models and data; targets are texts of the task's own model."""
    tiny = tiny_text.write_t5(folder / "tiny_t5")
    names = ("imdb", "race", "common_gen")
    models = [
        str(tiny_text.write_like(folder / name, tiny, i))
        for i, name in enumerate(names)
    ]
    config = runs.smaller(
        config,
        model="tiny_t5",
        tasks=names,
        checkpoints=names,
        data_dir=folder,
        max_length=12,
        max_new_tokens=4,
        coefs=(0.0, 1.0),
        evaluation_batch=16,
    )
    base = text_to_text.load(config, runs.start(config), config.model)
    records = glue.text_to_text(
        glue.TASKS["sst2"], tiny_text.glue_records(glue.TASKS["sst2"], 16, 0)
    )
    for name, model in zip(names, models, strict=True):
        rows = [{"input": r["text"], "target": r["target"]} for r in records]
        if METRICS[name] != "accuracy":
            batches = text_to_text.batches(base, [{"text": r["text"]} for r in records])
            params = t5.load(model).params
            written = text_to_text.generated(base, params, batches, 4)
            pairs = zip(rows, written, strict=True)
            rows = [{**row, "target": target} for row, target in pairs]
        for part in ("validation", "test"):
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / f"{name}_{part}.jsonl").write_text(lines)
    return config, models


def run(config: Config, models: Sequence[str]) -> dict:
    """Runs the script, with the folders or ids of the tasks' models."""
    known = ", ".join(CHECKPOINTS)
    different = set(config.tasks)
    if not 1 < len(config.tasks) == len(different) or different - set(CHECKPOINTS):
        raise ValueError(
            f"--tasks {config.tasks}: expected two or more of {known}, each only once."
        )
    if len(models) != len(config.tasks):
        raise ValueError(
            f"{len(models)} --checkpoints for {len(config.tasks)} tasks; expected one "
            "for each task."
        )
    records = {name: read(config, name) for name in config.tasks}
    mesh = runs.start(config)
    base = text_to_text.load(config, mesh, config.model)
    tasks = {name: prepare(config, base, name, records[name]) for name in config.tasks}
    params_0 = base.checkpoint.params
    taus = {
        name: text_to_text.external_vector(base, model)
        for name, model in zip(
            tqdm(config.tasks, desc="models", unit="model"), models, strict=True
        )
    }
    runs.claim(config)

    def scores(tau, coef, part, names):
        params = task_vectors.apply(params_0, tau, coef)
        return [score(base, tasks[name], params, part) for name in names]

    single = {
        part: {name: scores(taus[name], 1.0, part, [name])[0] for name in config.tasks}
        for part in ("validation", "test")
    }
    for part, found in single.items():
        if bad := [name for name, value in found.items() if not value > 0]:
            raise ValueError(
                f"the tasks' own models score 0 on {part} data of {', '.join(bad)}. "
                "Write inputs and targets in the form that they were trained with."
            )
    lines = []
    pairs = list(itertools.combinations(config.tasks, 2))
    for pair in tqdm(pairs, desc="pairs", unit="pair"):
        tau = task_vectors.add([taus[name] for name in pair])
        lines.append(measure(config, pair, tau, scores, single))
    mean = float(np.mean([line["normalized"] for line in lines]))
    results = {"rows": lines, "single": single, "mean": mean}
    if runs.is_first():
        write(config, results)
    return results


def plan(config: Config, record: planning.Recorder):
    """Reports the passes of single models and all pairs to the plan; trains nothing."""
    samples = SAMPLES if config.samples is None else config.samples
    # The own model on both parts; then a search and a row with every other task.
    others = len(config.tasks) - 1
    passes = samples * (2 + others * (len(config.coefs) + 1))
    for name in config.tasks:
        shape = (2, planned.ANSWER)
        if name in NEW_TOKENS:
            shape = (config.max_new_tokens or NEW_TOKENS[name],)
        record.evaluate(
            planned.t5_model(config.model, config.max_length, shape), passes
        )
    record.note(
        f"Every file counts as {samples} texts, --samples. A generated text counts as "
        "one pass over its largest number of tokens."
    )


def read(config: Config, name: str) -> dict[str, list[dict]]:
    """Reads the records of a task's two files."""
    found = {}
    for part in ("validation", "test"):
        file = config.data_dir / f"{name}_{part}.jsonl"
        rows = text_files.read_table(file, ("input", "target"))[: config.samples]
        found[part] = [{"text": row["input"], "target": row["target"]} for row in rows]
        if not found[part]:
            raise ValueError(f"{file} has no record; expected at least one.")
    return found


def prepare(config: Config, base: text_to_text.Base, name: str, records: dict) -> Task:
    """Returns a task as tokens."""
    batches = {part: text_to_text.batches(base, rows) for part, rows in records.items()}
    targets = {row["target"] for rows in records.values() for row in rows}
    tokens = config.max_new_tokens or NEW_TOKENS.get(name, 0)
    return Task(name, records, batches, sorted(targets), tokens)


def score(base: text_to_text.Base, task: Task, params: Params, part: str) -> float:
    """Returns the task's own metric, from 0 to 1."""
    batches = task.batches[part]
    targets = [record["target"] for record in task.records[part]]
    if METRICS[task.name] == "accuracy":
        candidates = language.candidates(base.tokenizer, task.classes)
        chosen = text_to_text.ranked(base, params, batches, candidates)
        return metrics.exact_match([task.classes[i] for i in chosen], targets)
    written = text_to_text.generated(base, params, batches, task.max_new_tokens)
    if METRICS[task.name] == "exact match":
        return metrics.exact_match(written, targets)
    return metrics.rouge_2(written, targets)


def measure(config: Config, pair, tau, scores, single) -> dict:
    """Returns the row of a pair: its coefficient, and test scores of both tasks.

    Args:
      config: options of the script.
      pair: names of the two tasks.
      tau: the sum of their vectors.
      scores: `scores(tau, coef, part, names)`, returns scores on the named tasks.
      single: scores of each task's own model, by part and task.
    """
    search = evaluate.search(
        lambda coef: scores(tau, coef, "validation", pair),
        [single["validation"][name] for name in pair],
        config.coefs,
    )
    found = scores(tau, search.coef, "test", pair)
    normalized = [
        100 * value / single["test"][name]
        for name, value in zip(pair, found, strict=True)
    ]
    line = {"first": pair[0], "second": pair[1], "coef": search.coef}
    for position, own, ratio in zip(
        ("first", "second"), found, normalized, strict=True
    ):
        line |= {f"{position} score": 100 * own, f"{position} normalized": ratio}
    return {**line, "normalized": float(np.mean(normalized))}


def write(config: Config, results: dict):
    """Writes the figure and the report."""
    lines = results["rows"]
    matrix = np.full((len(config.tasks),) * 2, 100.0)
    for line in lines:
        i, j = (config.tasks.index(line[key]) for key in ("first", "second"))
        matrix[i, j] = matrix[j, i] = line["normalized"]
    plots.matrices(
        config.out / "figure18.png",
        {"sum of two task vectors": matrix},
        config.tasks,
        rows="first task",
        columns="second task (the diagonal is 100 %)",
        value="mean normalised score of both tasks (%)",
        digits=1,
    )
    mean = [{"pairs": "mean of all pairs", "normalized": results["mean"]}]
    beside = tables.beside(mean, PUBLISHED, keys=["pairs"], values=["normalized"])
    shown = {
        "Normalised score, percent of the score of the tasks' own models": beside,
        "All pairs": [{**r, "coef": f"{r['coef']:g}"} for r in lines],
    }
    title = "Figure 18: pairs of language tasks"
    tables.write(config.out, title, shown, results)


if __name__ == "__main__":
    script.run(Config, main)
