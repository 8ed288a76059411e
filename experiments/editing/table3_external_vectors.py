"""Table 3 (editing paper): improves T5-base on GLUE tasks by external vectors.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089: section
4.2, Appendix D.7.

    python -m experiments.editing.table3_external_vectors \\
        --external mrm8488/t5-base-finetuned-imdb-sentiment my/folder

Data: `nyu-mll/glue` and the T5s, fetched from the Hugging Face Hub (`pip install -e
'.[text]'` installs the readers). `--external` names fine-tuned copies of the same T5,
folders or ids; from a file with one on every line, use `--external $(cat ids.txt)`.
With --preselect 20 only the twenty nearest models are scored for a task.

A T5 is fine-tuned on each task, and the vector of one external model is added to it.
The model and its coefficient are chosen on a validation part of the training split; if
none helps, no vector is added. GLUE's validation split is the test part, and the
validation part has the same size. The answer is the label with the smallest perplexity.
Published, the mean of F1 and accuracy (MRPC), accuracy (RTE, SST-2) and Matthews
correlation (CoLA), in percent:

    method                     MRPC  RTE   CoLA  SST-2  average
    Zero-shot                  74.8  52.7  8.29  92.7   57.1
    Fine-tuned                 88.5  77.3  52.3  94.5   78.1
    Fine-tuned + task vectors  89.3  77.5  53.0  94.7   78.6

The paper uses 427 models that it does not list. It also leaves the following open; our
choices are:

- The prompts have T5's own format, in which T5 has seen these tasks.
- The candidate coefficients are 0.1, 0.2, …, 1.
- The 3 seeds set the order of the samples and the held-out part.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import bank, partial, planning, runs, script, tables, training
from experiments.common.language import planned, text_to_text, tiny_text
from jaxarith import evaluate, fingerprint, task_vectors, tree
from jaxarith.data import glue, language
from jaxarith.merge.bases_arithmetic import similarities
from jaxarith.typing import Params, Taus

TASKS = ("mrpc", "rte", "cola", "sst2")  # in the order of the table
PUBLISHED = tables.published(__doc__, "method")
ROWS = tuple(PUBLISHED)
PAPERS_MODELS = 427


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(text_to_text.Options):
    """Table 3 (editing paper): add external vectors to T5s fine-tuned on GLUE."""

    model: str = "google-t5/t5-base"
    """A T5: a folder, or an id of the Hugging Face Hub."""
    external: tuple[str, ...] = ()
    """Fine-tuned copies of the T5: folders, or ids of the Hub."""
    coefs: tuple[float, ...] = tuple(i / 10 for i in range(1, 11))
    """Candidate coefficients of an external vector."""
    preselect: int | None = None
    """Number of vectors to score for every task, those with the largest cosine with its
    own vector; by default all. A run with all reports what this would have missed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the rows are means over them."""
    epochs: float = 5
    batch_size: int = 32
    learning_rate: float = 1e-5


class Task(NamedTuple):
    """A task as tokens, for one seed.

    Attributes:
      name: name of the task.
      seed: the seed.
      wanted: description of its task vector.
      validation, test: batches for evaluation.
      candidates: the possible answers as tokens, `[C, T]`.
    """

    name: str
    seed: int
    wanted: training.Wanted
    validation: list[dict]
    test: list[dict]
    candidates: np.ndarray


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    script.needs("text", "sklearn", "transformers")
    if not config.smoke:
        script.needs("text", "datasets")
    if record := planning.recorder():
        plan(config, record)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        if not config.smoke:
            return run(config, config.external)
        tiny = tiny_text.write_t5(Path(folder) / "tiny_t5")
        config = runs.smaller(
            config,
            model="tiny_t5",
            external=("other_0", "other_1"),
            coefs=(0.5, 1.0),
            seeds=(0,),
            epochs=1,
            batch_size=8,
            learning_rate=1e-2,
            max_length=24,
        )
        others = [
            str(tiny_text.write_like(Path(folder) / name, tiny, i))
            for i, name in enumerate(config.external)
        ]
        return run(config, others)


def run(config: Config, others: Sequence[str]) -> dict:
    """Runs the script, with the folders or ids of the external models."""
    if not others:
        raise ValueError("--external is empty; name at least one model.")
    mesh = runs.start(config)
    base = text_to_text.load(config, mesh, config.model)
    if config.preselect is not None and not 0 < config.preselect <= len(others):
        raise ValueError(
            f"--preselect {config.preselect}: expected 1 to {len(others)}, the number "
            "of external models."
        )
    # Hundreds of models do not fit in memory. All are read here once, to find mistakes
    # before hours of work, and once more when they are scored.
    for other in tqdm(others, desc="external models", unit="model"):
        text_to_text.external_vector(base, other)
    tasks = [prepare(config, base, name, s) for s in config.seeds for name in TASKS]
    network, wanted = text_to_text.network(base), [task.wanted for task in tasks]
    training.check(network, wanted, together=1)
    runs.claim(config)
    taus = training.vectors(config, network, wanted, together=1)

    scores, cosines = survey(config, base, tasks, taus, others)
    own = zip(tqdm(tasks, desc="test", unit="task"), taus, scores, cosines, strict=True)
    searches = [measure(config, base, others, *each) for each in own]
    lines = [row(name, searches) for name in ROWS]
    results = {"rows": lines, "searches": searches}
    values = [*TASKS, "average"]
    beside = tables.beside(lines, PUBLISHED, keys=["method"], values=values)
    seeds = tree.counted(len(config.seeds), "seed")
    caption = f"Test scores in percent, means over {seeds}"
    chosen = [
        {
            "task": found["task"],
            "seed": found["seed"],
            "vector": found["external"] or "none",
            "coefficient": f"{found['coef']:g}",
            "rank by cosine": found["rank by cosine"],
        }
        for found in searches
    ]
    shown = {caption: beside, "Chosen vectors": chosen}
    if config.preselect is None:
        shown["Vectors that --preselect N would have kept"] = kept(
            searches, len(others)
        )
    return tables.write(config.out, "Table 3: external task vectors", shown, results)


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and the passes of the survey and all rows to the plan."""
    answer, others = planned.ANSWER, len(config.external) or PAPERS_MODELS
    if not config.external:
        record.note(f"Without --external, {others} models are assumed: the paper's.")
    full = planned.t5_model(config.model, config.max_length, (answer,))
    wanted = []
    for seed, name in itertools.product(config.seeds, TASKS):
        samples, _ = planned.glue_parts(name)
        rate = config.learning_rate
        recipe = text_to_text.recipe(config, samples, learning_rate=rate, seed=seed)
        known = f"glue_{name}_seed{seed}"
        file = bank.vector_file(config.bank, config.model, text_to_text.METHOD, known)
        wanted.append(planned.wanted(known, file, recipe))
    method = text_to_text.METHOD
    planned.vectors(record, full, method, text_to_text.loss, wanted, together=1)
    scored = others if config.preselect is None else config.preselect
    rows = scored * len(config.coefs) + 1 + len(ROWS)  # one validates the own model
    texts = len(config.seeds) * sum(planned.glue_parts(name)[1] for name in TASKS)
    ranks = planned.t5_model(config.model, config.max_length, (2, answer))
    record.evaluate(ranks, rows * texts)
    record.note(planned.ANSWERS)


def prepare(config: Config, base: text_to_text.Base, name: str, seed: int) -> Task:
    """Returns a task as tokens."""
    task = glue.TASKS[name]
    parts = text_to_text.glue_task(config, name, seed)
    records = {
        part: glue.text_to_text(task, getattr(parts, part))
        for part in ("train", "validation", "test")
    }
    candidates = language.candidates(base.tokenizer, task.classes)
    source = text_to_text.training_source(base, records["train"], candidates.shape[1])
    rate = config.learning_rate
    recipe = text_to_text.recipe(config, len(source), learning_rate=rate, seed=seed)
    return Task(
        name=name,
        seed=seed,
        wanted=text_to_text.wanted(base, f"glue_{name}_seed{seed}", source, recipe),
        validation=text_to_text.batches(base, records["validation"]),
        test=text_to_text.batches(base, records["test"]),
        candidates=candidates,
    )


def accuracy_of(base: text_to_text.Base, task: Task, params: Params, part: str):
    """Returns the task's metric on its "validation" or "test" part."""
    batches = getattr(task, part)
    predicted = text_to_text.ranked(base, params, batches, task.candidates)
    return glue.score(glue.TASKS[task.name], predicted, evaluate.labels(batches))


def survey(
    config: Config,
    base: text_to_text.Base,
    tasks: Sequence[Task],
    taus: Taus,
    others: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores n external vectors at m coefficients on the validation part of every task.

    Scores are saved in `scores/` in the run's folder, and not measured again.

    Returns:
      Scores `[task, n, m]`, and cosines `[task, n]` with the tasks' own vectors. They
      are NaN for vectors that were not scored.
    """
    params_0 = base.checkpoint.params
    scores = np.full((len(tasks), len(others), len(config.coefs)), np.nan)
    cosines = np.full(scores.shape[:2], np.nan)
    chosen = np.ones(cosines.shape, bool)
    if config.preselect is not None:
        for i, other in enumerate(tqdm(others, desc="cosines", unit="model")):
            external = text_to_text.external_vector(base, other)
            cosines[:, i] = similarities(taus, external)
        chosen = nearest(cosines, config.preselect)
    scored = np.flatnonzero(chosen.any(axis=0)).tolist()
    vectors = [fingerprint.combined(tau) for tau in taus]
    models = {"params_0": base.fingerprint, "vectors": vectors}

    @functools.lru_cache(maxsize=1)
    def fine_tuned(t: int):
        return task_vectors.apply(params_0, taus[t])

    for i in tqdm(scored, desc="search", unit="model"):
        external = text_to_text.external_vector(base, others[i])
        cosines[:, i] = similarities(taus, external)

        def score(rows, external=external):
            """Returns a score for each row (number of a task, coefficient)."""
            found = []
            for t, coef in rows:
                task = int(t)
                added = task_vectors.apply(fine_tuned(task), external, float(coef))
                found.append(accuracy_of(base, tasks[task], added, "validation"))
            return np.array(found)

        own = np.flatnonzero(chosen[:, i])
        scores[own, i] = partial.scored(
            config.out / "scores" / f"external_{i}.json",
            models | {"external": fingerprint.combined(external)},
            np.array(list(itertools.product(own, config.coefs))),
            score,
            together=len(config.coefs),
            resume=config.resume,
        ).reshape(len(own), -1)
    return scores, cosines


def nearest(cosines: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` largest entries of each row of `[task, n]`.

    The first ones win if several are equal.

    Example:
      >>> nearest(np.array([[0.1, 0.3, 0.2]]), 2)
      array([[False,  True,  True]])
    """
    ranks = np.argsort(np.argsort(-cosines, axis=1, kind="stable"), axis=1)
    return ranks < count


def measure(
    config: Config,
    base: text_to_text.Base,
    others: Sequence[str],
    task: Task,
    tau: Params,
    scores: np.ndarray,
    cosines: np.ndarray,
) -> dict:
    """Chooses the external vector for one task and seed; returns its test scores.

    Args:
      config: options of the script.
      base: the T5.
      others: folders or ids of the n external models.
      task: the task.
      tau: the task's own vector.
      scores: validation scores `[n, m]`, NaN for vectors that were not scored.
      cosines: cosines with the task's own vector, `[n]`.
    """
    params_0 = base.checkpoint.params
    fine_tuned = task_vectors.apply(params_0, tau)
    scored = np.flatnonzero(~np.isnan(scores).any(axis=1))
    search = evaluate.search_external(
        lambda index, coef: scores[scored[index], config.coefs.index(coef)],
        len(scored),
        config.coefs,
        baseline=accuracy_of(base, task, fine_tuned, "validation"),
    )
    zero_shot, alone = (
        accuracy_of(base, task, params, "test") for params in (params_0, fine_tuned)
    )
    best, name, place = alone, None, None
    if search.index is not None:
        index = int(scored[search.index])
        external = text_to_text.external_vector(base, others[index])
        added = task_vectors.apply(fine_tuned, external, search.coef)
        best, name = accuracy_of(base, task, added, "test"), config.external[index]
        place = 1 + int(np.sum(cosines > cosines[index]))
    return {
        "task": task.name,
        "seed": task.seed,
        "external": name,
        "coef": search.coef,
        "rank by cosine": place,
        "scored": [config.external[i] for i in scored],
        "validation": search.scores.tolist(),
        **dict(zip(ROWS, (zero_shot, alone, best), strict=True)),
    }


def kept(searches: list[dict], count: int) -> list[dict]:
    """Counts how often the N vectors with the largest cosine include the chosen one.

    Args:
      searches: results of `measure`, with all vectors scored.
      count: number of vectors.
    """
    ranks = [s["rank by cosine"] for s in searches if s["rank by cosine"] is not None]
    sizes = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n < count]
    return [
        {"N": n, "holds the chosen vector": sum(rank <= n for rank in ranks)}
        | {"of": len(ranks)}
        for n in sizes
    ]


def row(name: str, searches: list[dict]) -> dict:
    """Returns a row of the table, in percent."""
    of_task = [
        100 * float(np.mean([s[name] for s in searches if s["task"] == task]))
        for task in TASKS
    ]
    line = dict(zip(TASKS, of_task, strict=True))
    return {"method": name, **line, "average": float(np.mean(of_task))}


if __name__ == "__main__":
    script.run(Config, main)
