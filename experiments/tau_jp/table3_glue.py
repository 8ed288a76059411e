"""Tables 3 and 8 (τJp paper): addition of four GLUE tasks with T5.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: section 4.2, Table 3; Appendix E.5, Table 8.

    python -m experiments.tau_jp.table3_glue --out runs/table3
    python -m experiments.tau_jp.table3_glue --coefficient one --out runs/table8

Data: `nyu-mll/glue`, and the model `google/flan-t5-small`: the paper says T5-small, but
its code uses this one. Both are fetched from the Hugging Face Hub, so nothing needs to
be prepared (`pip install -e '.[text]'` installs the readers). The protocol is described
in `experiments.common.language.t5_glue`.

In Table 3 one coefficient for all tasks is searched among 0, 0.05, …, 1, by the mean
normalised score on validation data. In Table 8 (`--coefficient one`) it is 1, with the
same task vectors from the bank. Published, Abs. / Norm.:

    Table 3      MRPC         RTE          CoLA         SST-2        average
    Pre-trained  31.8 / -     5.0 / -      7.3 / -      32.3 / -     19.1 / -
    Individual, Non-lin. FT  93.5 / -  93.7 / -  76.8 / -  94.6 / -  89.7 / -
    Non-lin. FT  76.7 / 82.0  78.1 / 83.3  75.8 / 98.7  66.0 / 69.8  74.2 / 83.5
    Linear FT    79.1 / 89.8  81.3 / 89.0  74.0 / 96.4  57.6 / 61.3  73.0 / 84.1
    TIES         79.0 / 84.9  60.1 / 68.2  73.2 / 95.4  69.7 / 73.9  70.5 / 80.6
    Ours         79.1 / 87.5  82.8 / 90.6  76.5 / 99.6  92.5 / 98.5  82.7 / 94.0

    Table 8      MRPC         RTE          CoLA         SST-2        average
    Pre-trained  31.8 / -     5.0 / -      7.3 / -      32.3 / -     19.1 / -
    Non-lin. FT  72.2 / 77.2  90.2 / 96.3  70.3 / 91.6  57.1 / 60.4  72.5 / 81.4
    Linear FT    79.1 / 89.8  81.7 / 89.4  74.7 / 97.4  56.2 / 59.8  72.9 / 84.1
    TIES         79.0 / 84.9  60.1 / 68.2  73.2 / 95.4  69.7 / 73.9  70.5 / 80.6
    Ours         79.1 / 87.5  82.8 / 90.6  76.5 / 99.6  92.5 / 98.5  82.7 / 94.0

The columns above have the right order. In some rows the paper prints CoLA first, below
a header that says MRPC: TIES in Table 3, and all rows except Pre-trained in Table 8.
Only with CoLA first is Abs. / Norm. the score of a single-task model: 76.8 on CoLA,
93.5 on MRPC and 93.7 on RTE. For TIES we assume the order of the other rows of Table 8.
That is not certain for MRPC and RTE: there Abs. / Norm. is 93.0 and 88.1. No
single-task model of another row has 88.1 on RTE, but that of Linear FT has it on MRPC.

Norm. is the score divided by the score of the method's own single-task models. The
paper does the same, though its row Individual has only Non-lin. FT: for Linear FT on
MRPC, 79.1 / 0.898 is 88.1, not 93.5.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import bank, planning, runs, script, tables
from experiments.common.language import planned, t5_glue, tau_jp, text_to_text
from experiments.common.language.t5_glue import TASKS, Scores
from experiments.common.language.tau_jp import METHODS
from jaxarith import evaluate
from jaxarith.typing import Taus

VALUES = [f"{task} {kind}" for task in (*TASKS, "avg") for kind in ("abs", "norm")]
TABLES = {"searched": "Table 3", "one": "Table 8"}
PUBLISHED = {
    coefficient: tables.published(__doc__, table)
    for coefficient, table in TABLES.items()
}
NOTE = (
    "Some rows of the paper have CoLA first, below a header that says MRPC. Here all "
    "published columns have the right order. Norm. is relative to the single-task "
    "models of the same method; for TIES, to those of Non-lin. FT."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(t5_glue.Options):
    """Tables 3 and 8 (τJp paper): add four GLUE tasks to a T5."""

    coefs: tuple[float, ...] = tuple(i / 20 for i in range(21))
    """Candidate values of the coefficient."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    config = runs.smaller(config, coefs=(0.0, 0.5, 1.0))
    if record := planning.recorder():
        plan(config, record)
        return {}
    study = t5_glue.start(config)
    taus = {method: t5_glue.vectors(study, method) for method in METHODS}
    single = {method: individual(study, method, taus[method]) for method in METHODS}

    nothing = t5_glue.scores(study, "nonlinear", taus["nonlinear"], 0.0)
    lines = rows("Pre-trained", 0.0, nothing, None)
    for method, name in METHODS.items():
        lines += rows(f"Individual, {name}", 1.0, single[method].test, None)
    searches = {}
    merged = tau_jp.merged(study.base.checkpoint.params, taus, config.ties_density)
    for name, (method, tau) in tqdm(merged.items(), desc="rows", unit="method"):
        alone, added, coef = single[method], [tau] * len(TASKS), 1.0
        if config.coefficient == "searched":
            found = search(study, method, added, alone.validation, config.coefs)
            coef, curve = found.coef, found.normalized.tolist()
            searches[name] = {"coefs": found.coefs.tolist(), "normalized": curve}
        found = t5_glue.scores(study, method, added, coef)
        lines += rows(name, coef, found, alone.test)
    return report(config, lines, searches)


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and the forward passes of all rows to the plan."""
    length, answer = config.max_length, planned.ANSWER
    full = planned.t5_model(config.model, length, (answer,), mask=t5_glue.FIRST)
    for method in METHODS:
        recipe = tau_jp.recipe(config, method, steps=config.steps)
        folder = (config.bank, config.model, method)
        files = {name: bank.vector_file(*folder, name) for name in TASKS}
        wanted = [planned.wanted(*item, recipe) for item in files.items()]
        planned.vectors(record, full, method, text_to_text.loss, wanted)
    # A pass of a tangent-space model costs as much as three of the network.
    passes = dict.fromkeys(METHODS, 3 if config.tangent_scores else 1)
    passes["nonlinear"] = 1
    single = sum(passes.values())
    merged = single + passes["nonlinear"]  # TIES is an ordinary network
    searched = len(config.coefs) if config.coefficient == "searched" else 0
    tested = 1 + single + merged
    texts = sum(planned.glue_parts(name)[1] for name in TASKS)
    record.evaluate(full, (tested + single + searched * merged) * texts)
    ranks = planned.t5_model(config.model, length, (2, answer))
    record.evaluate(ranks, tested * texts)
    record.note(planned.ANSWERS)


class Individual(NamedTuple):
    """Scores of a method's single-task models, for normalisation.

    Attributes:
      validation: token scores.
      test: scores by both metrics.
    """

    validation: list[float]
    test: Scores


def individual(study: t5_glue.Study, method: str, taus: Taus) -> Individual:
    """Scores every task's own vector on its own data; adds the scores to the bank."""
    found = Individual(
        t5_glue.token_scores(study, method, taus, "validation")(1.0),
        t5_glue.scores(study, method, taus, 1.0),
    )
    if runs.is_first():
        for one, tokens, ranked in zip(study.wanted[method], *found.test, strict=True):
            measured = {"token score": tokens, "rank score": ranked}
            bank.add_metrics(one.file, measured)
    return found


def search(study, method, added, single, coefs) -> evaluate.Search:
    """Finds the coefficient with the best mean normalised token score on validation.

    If a single-task model scores 0 or less, scores are not normalised.
    """
    scores_at = t5_glue.token_scores(study, method, added, "validation")
    usable = min(single) > 0
    return evaluate.search(scores_at, single if usable else [1.0] * len(TASKS), coefs)


def rows(name: str, coef: float, found: Scores, single: Scores | None) -> list[dict]:
    """Returns a row for each of the two metrics, in percent.

    Args:
      name: the paper's name of the model.
      coef: its coefficient.
      found: its scores.
      single: scores for normalisation; a score of 0 or less normalises nothing.
    """
    lines = []
    for metric in Scores._fields:
        absolute, normalized = getattr(found, metric), [None] * len(TASKS)
        if single is not None:
            pairs = zip(absolute, getattr(single, metric), strict=True)
            normalized = [a / alone if alone > 0 else None for a, alone in pairs]
        usable = [norm for norm in normalized if norm is not None]
        average = np.mean(usable) if len(usable) == len(TASKS) else None
        line = {"method": name, "metric": metric, "coef": coef}
        for task, a, norm in zip(
            (*TASKS, "avg"),
            (*absolute, np.mean(absolute)),
            (*normalized, average),
            strict=True,
        ):
            line[f"{task} abs"] = 100 * float(a)
            line[f"{task} norm"] = None if norm is None else 100 * float(norm)
        lines.append(line)
    return lines


def report(config: Config, lines: list[dict], searches: dict) -> dict:
    """Writes the report; returns the content of report.json."""

    def table(metric, kind, theirs):
        chosen = [i for i, name in enumerate(VALUES) if name.endswith(kind)]
        shown = [line for line in lines if line["metric"] == metric]
        beside = tables.beside(
            [{**line, "coef": f"{line['coef']:.2f}"} for line in shown],
            {method: [values[i] for i in chosen] for method, values in theirs.items()},
            keys=["method", "coef"],
            values=[VALUES[i] for i in chosen],
            published_keys=["method"],
        )
        return tables.markdown(beside)

    published = PUBLISHED[config.coefficient]
    captions = {
        "Token scores, as in the paper: Abs.": table("tokens", "abs", published),
        "The same scores: Norm.": table("tokens", "norm", published),
        "GLUE's metrics by rank classification: Abs.": table("rank", "abs", {}),
        "The same metrics: Norm.": table("rank", "norm", {}),
    }
    title = (
        f"{TABLES[config.coefficient]}: addition of four GLUE tasks, coefficient "
        f"{config.coefficient}"
    )
    results = {"rows": lines, "searches": searches}
    return tables.write(config.out, title, captions, results, NOTE)


if __name__ == "__main__":
    script.run(Config, main)
