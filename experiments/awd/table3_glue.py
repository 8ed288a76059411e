"""Tables 3, 8 and 9 (AWD paper), and Figure 2 for RoBERTa: merges eight GLUE tasks.

Xiong et al. Multi-Task Model Merging via Adaptive Weight Disentanglement.
arXiv:2411.18729: section 4.4, Table 3; 8.3, Tables 8 and 9; 4.2, Figure 2.

    python -m experiments.awd.table3_glue --models FacebookAI/roberta-base
    python -m experiments.awd.table3_glue --data-dir GLUE --tasks cola mrpc stsb
    python -m experiments.awd.table3_glue --models FacebookAI/roberta-base \\
        --from cola=FINE_TUNED_1 mrpc=FINE_TUNED_2

Data: `nyu-mll/glue` from the Hugging Face Hub, or GLUE's own files in a folder.
`experiments.common.language.roberta_glue` describes the fine-tuning of RoBERTa.

Published, the score divided by the score of the task's own model, in percent. Table 3
has only the means, Tables 8 and 9 have all values:

    RoBERTa-Base               CoLA  SST-2  MRPC  STS-B  QQP   QNLI  MNLI  RTE   Avg
    Pre-trained                0.0   53.8   85.0  4.0    37.5  53.1  37.1  71.2  41.7
    Individual  100.0  100.0  100.0  100.0  100.0  100.0  100.0  100.0  100.0
    Weight Averaging           0.0   59.2   85.8  47.0   45.4  63.9  48.0  71.2  52.6
    Task Arithmetic            8.4   88.3   89.6  32.8   82.0  85.4  75.5  80.4  67.8
    Ties-Merging               31.8  88.9   86.2  10.9   61.1  85.9  83.0  69.6  64.7
    Task Arithmetic (w/ DARE)  0.0   88.1   86.6  30.2   84.3  79.1  64.0  77.2  63.7
    Ties-Merging (w/ DARE)     11.8  95.5   85.8  9.4    86.8  88.7  83.1  63.6  65.6
    AWD Task Arithmetic        11.8  88.3   89.1  33.2   80.8  85.7  76.1  81.5  68.3

    RoBERTa-Large              CoLA  SST-2  MRPC  STS-B  QQP   QNLI  MNLI  RTE   Avg
    Pre-trained                0.0   51.5   40.9  20.9   36.4  56.0  37.6  62.4  38.2
    Individual  100.0  100.0  100.0  100.0  100.0  100.0  100.0  100.0  100.0
    Weight Averaging           7.4   55.1   84.2  46.3   56.7  73.8  35.8  66.7  53.3
    Task Arithmetic            7.4   86.1   86.8  78.0   90.7  77.0  73.3  67.6  70.9
    Ties-Merging               42.7  78.1   85.2  51.7   89.9  81.9  79.7  70.0  72.4
    Task Arithmetic (w/ DARE)  4.1   85.2   85.8  71.6   91.3  85.6  75.2  68.1  70.9
    Ties-Merging (w/ DARE)     2.9   90.4   86.8  75.4   92.4  86.4  79.0  69.1  72.8
    AWD Task Arithmetic        10.4  90.8   86.5  87.1   91.8  87.1  78.1  63.8  74.5

The eight scores of the pre-trained RoBERTa-base have the mean 42.7, not 41.7; all other
means are correct.

Figure 2 compares three models of every task: the whole single-task model; the model
with only the linear weights of the blocks in its task vector; and the latter after AWD.
It is a plot only; the text says that nothing is lost.

The paper leaves the following open; our choices are:

- λ is searched in 0.3, 0.4, …, 1 and AWD's α in 1e-2 to 1e-6, as for the image models,
  by the mean normalised score on validation samples. The other methods search the same
  λ. AWD's β and number of steps are those of `jaxarith.merge.awd`.
- TIES keeps a fifth of the entries, DARE a tenth. TIES sums the entries of the elected
  sign, as for image models (`table1_addition`), because λ is at most 1. Its authors
  take the mean, and search λ from 0.8 to 2.5.
- If the score of a task's own model is 0 or less, the task has no normalised score.

"Cosine with sum" and "effective λ" compare AWD's vector with the plain sum of the same
weights, see `experiments.awd.solving`. A second table has rows that the paper lacks
(`--no-beyond-paper` leaves it out): TSV-M, Iso-C, Iso-CTS, WUDI and PCB-Merging at the
coefficients of `experiments.awd.beyond`, with scores normalised in the same way; the
plain sum of the linear weights; and one coefficient per task for these weights. The
latter are found by coordinate ascent over the same candidates, starting from the best
common one (`evaluate.search_per_task`). No published scores of these methods on these
models are known.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments.awd import beyond, solving
from experiments.common import planning, runs, script, tables
from experiments.common.language import roberta_glue
from jaxarith import evaluate, merge, plots, task_vectors, tree
from jaxarith.models import bert
from jaxarith.typing import Tree

BASE, LARGE = roberta_glue.MODELS.values()
COLUMNS = (*roberta_glue.TITLES.values(), "Avg")
AWD = "AWD Task Arithmetic"
PUBLISHED = {
    (model, method): values
    for model in (BASE, LARGE)
    for method, values in tables.published(__doc__, model).items()
}
VARIANTS = ("full", "linear weights only", "AWD, linear weights only")  # of Figure 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, roberta_glue.Options):
    """Tables 3, 8 and 9 (AWD paper), Figure 2 for RoBERTa: merge eight GLUE tasks."""

    coefs: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Candidate values of the coefficient λ."""
    alphas: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Candidate values of AWD's α."""
    drop_rate: float = 0.9
    """Share of the entries that DARE drops."""
    density: float = 0.2
    """Share of the entries that TIES keeps."""
    beyond_paper: bool = True
    """Also measure rows that the paper's tables lack, see above."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    config = roberta_glue.smoke(config, coefs=(0.3, 1.0), alphas=(1e-2, 1e-4))
    if record := planning.recorder():
        plan(config, record)
        return {}
    rows, variants, more = [], [], []
    for setup in roberta_glue.setups(config):
        taus = roberta_glue.vectors(setup)
        encoders = roberta_glue.encoders(taus)
        own = roberta_glue.scores_at(setup, taus, encoders, "validation")(1.0)
        at = roberta_glue.scores_at(setup, taus, encoders, "test")
        single = at(1.0)
        rows += [
            row(setup, "Pre-trained", at(0.0), single),
            row(setup, "Individual", single, single),
        ]
        for name, (vector, coefs) in merged(setup, taus, config).items():
            coef = coefs[0]
            if len(coefs) > 1:
                coef, _ = search(setup, taus, vector, own, coefs)
            found = scores_at(setup, taus, vector, "test")(coef)
            rows.append(row(setup, name, found, single) | {"coefficient": coef})
        alpha, coef, vector = disentangled(setup, taus, own, config)
        found = scores_at(setup, taus, vector, "test")(coef)
        total = task_vectors.add(linear_weights(taus))
        chosen = {"coefficient": coef, "alpha": alpha}
        chosen |= solving.beside_sum(vector, total, coef)
        rows.append(row(setup, AWD, found, single) | chosen)
        variants += single_models(setup, taus, config, alpha, single)
        if config.beyond_paper:
            more += beyond_rows(setup, taus, config, own, single)
        if runs.is_first():
            figure(config.out, setup, variants)
    return write(config, {"rows": rows, "beyond": more, "figure 2": variants})


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and the forward passes of all rows to the plan."""
    coefs = len(config.coefs)
    # Searched: four merges, and AWD at every α. Not searched: two rows, and averaging.
    validated, tested = 1 + (4 + len(config.alphas)) * coefs, 2 + 5 + 1
    tested += 2  # Figure 2
    if config.beyond_paper:
        own = [len(found) for _, found in beyond.MERGES.values() if len(found) > 1]
        weights = (1 + beyond.SWEEPS * len(config.tasks)) * coefs
        validated += sum(own) + coefs + weights
        tested += len(beyond.MERGES) + 2
    for texts in roberta_glue.plan_vectors(record, config):
        passes = validated * texts.validation + tested * texts.test
        record.evaluate(texts.full, passes)


def scores_at(
    setup: roberta_glue.Setup, taus: dict[str, Tree], vector: Tree, split: str
) -> Callable[[float], list[float]]:
    """Returns the scores of all tasks with one vector, as a function of λ."""
    return roberta_glue.scores_at(setup, taus, [vector] * len(taus), split)


def titles(names: Iterable[str]) -> list[str]:
    return [roberta_glue.TITLES[name] for name in names]


def row(setup: roberta_glue.Setup, method: str, found, single) -> dict:
    """Returns a row in percent: normalised scores with their mean, and scores."""
    named = titles(setup.tasks)
    pairs = zip(found, single, strict=True)
    normalized = [100 * a / b if b > 0 else None for a, b in pairs]
    usable = [value for value in normalized if value is not None]
    average = float(np.mean(usable)) if len(usable) == len(named) else None
    line = {"model": setup.title, "method": method}
    line |= dict(zip(named, normalized, strict=True)) | {"Avg": average}
    scores = {f"{n}, score": 100 * s for n, s in zip(named, found, strict=True)}
    line |= scores | {"coefficient": None, "alpha": None}
    return line | {"cosine with sum": None, "effective λ": None}


def merged(setup: roberta_glue.Setup, taus, config: Config) -> dict[str, tuple]:
    """Returns for all merges except AWD a vector, and candidates of its coefficient."""
    params_0, parts = setup.params_0, roberta_glue.encoders(taus)
    key = jax.random.key(config.seed)
    dropped = merge.drop(parts, drop_rate=config.drop_rate, key=key)

    def ties(parts):
        given = {"density": config.density, "preset": "adamerging"}
        return merge.ties(params_0, parts, coef=1.0, **given)

    models = {
        "Weight Averaging": merge.average(params_0, parts),
        "Ties-Merging": ties(parts),
        "Task Arithmetic (w/ DARE)": merge.task_arithmetic(params_0, dropped),
        "Ties-Merging (w/ DARE)": ties(dropped),
    }
    paths = [path for part in parts[:1] for path in tree.flatten(part)]
    vectors = {
        name: tree.restrict(task_vectors.difference(model, params_0), paths)
        for name, model in models.items()
    }
    vectors["Task Arithmetic"] = task_vectors.add(parts)
    order = [method for model, method in PUBLISHED if model == BASE]
    return {
        name: (vectors[name], (1.0,) if name == "Weight Averaging" else config.coefs)
        for name in order
        if name in vectors
    }


def search(
    setup: roberta_glue.Setup, taus, vector, single, coefs
) -> tuple[float, float]:
    """Returns the coefficient with the best mean normalised validation score.

    Also returns that score. If a single model scores 0 or less, scores are not
    normalised.
    """
    scores = scores_at(setup, taus, vector, "validation")
    usable = min(single) > 0
    found = evaluate.search(scores, single if usable else np.ones(len(taus)), coefs)
    return found.coef, float(found.normalized.max())


def disentangled(
    setup: roberta_glue.Setup, taus, single, config: Config
) -> tuple[float, float, Tree]:
    """Returns AWD's best α and λ on validation data, and its vector."""
    found = []
    for alpha in tqdm(config.alphas, desc="AWD", unit="α"):
        vector = awd(setup, taus, config, np.ones(len(taus)), alpha)
        coef, value = search(setup, taus, vector, single, config.coefs)
        found.append((value, alpha, coef, vector))
    _, alpha, coef, vector = max(found, key=lambda entry: entry[0])
    return alpha, coef, vector


def linear_weights(taus) -> list[Tree]:
    """Returns the part of the task vectors that AWD merges."""
    return [tree.select(tau, bert.BLOCK_LINEAR_WEIGHTS) for tau in taus.values()]


def awd(
    setup: roberta_glue.Setup, taus, how: solving.Options, weights, alpha: float
) -> Tree:
    """Returns the weighted sum of the disentangled vectors."""
    parts, coef = linear_weights(taus), np.asarray(weights, np.float32)
    return solving.merged(setup.params_0, parts, how, alpha=alpha, coef=coef)


def beyond_rows(
    setup: roberta_glue.Setup, taus, config: Config, own, single
) -> list[dict]:
    """Returns the rows that the paper's tables lack, see the module's docstring."""
    encoders, rows = roberta_glue.encoders(taus), []

    def add(name, vector, coefs):
        coef = coefs[0]
        if len(coefs) > 1:
            coef, _ = search(setup, taus, vector, own, coefs)
        found = scores_at(setup, taus, vector, "test")(coef)
        rows.append(row(setup, name, found, single) | {"coefficient": coef})

    for name, (method, coefs) in beyond.MERGES.items():
        model = method(setup.params_0, encoders, coef=1.0)
        difference = task_vectors.difference(model, setup.params_0)
        add(name, tree.restrict(difference, tree.flatten(encoders[0])), coefs)
    parts = linear_weights(taus)
    total = task_vectors.add(parts)
    add(beyond.PLAIN, total, config.coefs)
    rows[-1] |= solving.beside_sum(total, total, rows[-1]["coefficient"])

    def scores(weights):
        vector = solving.weighted_sum(parts, weights)
        return scores_at(setup, taus, vector, "validation")(1.0)

    norms = own if min(own) > 0 else np.ones(len(taus))
    chosen = evaluate.search_per_task(scores, norms, config.coefs, sweeps=beyond.SWEEPS)
    vector = solving.weighted_sum(parts, chosen.coefs)
    add(beyond.SEARCHED, vector, (1.0,))
    weights = " ".join(f"{weight:g}" for weight in chosen.coefs)
    rows[-1] |= solving.beside_sum(vector, total) | {"coefficient": weights}
    return rows


def single_models(
    setup: roberta_glue.Setup, taus, how: solving.Options, alpha: float, full
) -> list[dict]:
    """Returns the rows of Figure 2: scores of whole and reduced single models."""
    units = np.eye(len(taus))
    rebuilt = [awd(setup, taus, how, unit, alpha) for unit in units]
    found = (
        full,
        roberta_glue.scores_at(setup, taus, linear_weights(taus), "test")(1.0),
        roberta_glue.scores_at(setup, taus, rebuilt, "test")(1.0),
    )
    rows = []
    for variant, scores in zip(VARIANTS, found, strict=True):
        values = {n: 100 * s for n, s in zip(titles(setup.tasks), scores, strict=True)}
        mean = 100 * float(np.mean(scores))
        rows.append({"model": setup.title, "variant": variant, **values, "Avg": mean})
    return rows


def figure(out: Path, setup: roberta_glue.Setup, variants: list[dict]):
    names = [*titles(setup.tasks), "Avg"]
    groups = {
        line["variant"]: [line[name] for name in names]
        for line in variants
        if line["model"] == setup.title
    }
    path = out / f"figure2_{setup.title}.png"
    plots.bars(path, groups, names, y=f"score of single {setup.title}, percent")


def write(config: Config, results: dict) -> dict:
    """Writes report.json and report.md; returns the results."""
    columns = [*titles(config.tasks), "Avg"]
    # The paper's mean is shown only if all tasks are present.
    mean = "Avg" if tuple(config.tasks) == tuple(roberta_glue.TITLES) else None
    names = (*COLUMNS[:-1], mean)
    captions, half = {}, -(-len(columns) // 2)
    for model in dict.fromkeys(line["model"] for line in results["rows"]):
        lines = [line for line in results["rows"] if line["model"] == model]
        number = {BASE: "Table 8, ", LARGE: "Table 9, "}.get(model, "")
        for part in (columns[:half], columns[half:]):
            published = {
                key: [dict(zip(names, values, strict=True)).get(name) for name in part]
                for key, values in PUBLISHED.items()
            }
            beside = tables.beside(
                lines, published, keys=["model", "method"], values=part
            )
            caption = f"{number}{model}: normalised score, percent: {', '.join(part)}."
            captions[caption] = beside
    scores = [
        {"model": line["model"], "method": line["method"]}
        | {name: line[f"{name}, score"] for name in columns[:-1]}
        for line in results["rows"] + results["beyond"]
    ]
    if results["beyond"]:
        names = ("model", "method", *columns)
        lines = [{name: line[name] for name in names} for line in results["beyond"]]
        captions["Not in the AWD paper: normalised score, percent."] = lines
    captions["Scores in percent."] = scores
    names = (
        "model",
        "method",
        "coefficient",
        "alpha",
        "cosine with sum",
        "effective λ",
    )
    chosen = [
        {name: line[name] for name in names}
        for line in results["rows"] + results["beyond"]
        if line["coefficient"] is not None
    ]
    captions["Searched values."] = tables.markdown(chosen, digits=6)
    captions["Figure 2: scores of single models, percent."] = results["figure 2"]
    title = "Eight GLUE tasks with RoBERTa (AWD, Tables 3, 8 and 9, Figure 2)"
    note = "Table 3 is the column Avg."
    return tables.write(config.out, title, captions, results, note)


if __name__ == "__main__":
    script.run(Config, main)
