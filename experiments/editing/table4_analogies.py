"""Table 4 (editing paper): sentiment in a domain without labels, by analogy.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089: section
5, Appendix E.1.

    python -m experiments.editing.table4_analogies --learning-rates 3e-5
    python -m experiments.editing.table4_analogies --models google-t5/t5-small \\
        --yelp yelp_train.csv,yelp_test.csv --amazon amazon_train.csv,amazon_test.csv

Data: `fancyzhx/yelp_polarity` and `fancyzhx/amazon_polarity` of the Hugging Face Hub;
or files with labelled texts, in a format of `jaxarith.data.text.read`. The first of
their two sorted labels is the negative one.

The vector of a target domain is λ1 times the auxiliary domain's sentiment vector, plus
λ2 times the difference of both domains' language-modelling vectors. Language modelling
predicts the next 128 tokens of the training texts from 128 tokens. Both coefficients
are searched in 0, 0.1, …, 1. Answers are ranked. Published, accuracy in percent on the
target:

    model     method                   yelp  amazon
    T5-small  Fine-tuned on auxiliary  88.6  87.9
    T5-small  Task analogies           89.9  89.0
    T5-small  Fine-tuned on target     91.1  90.2
    T5-base   Fine-tuned on auxiliary  92.3  90.8
    T5-base   Task analogies           93.0  92.7
    T5-base   Fine-tuned on target     93.4  93.2
    T5-large  Fine-tuned on auxiliary  95.0  94.8
    T5-large  Task analogies           95.1  95.2
    T5-large  Fine-tuned on target     95.5  95.5

The paper leaves the following open; our choices are:

- Coefficients are chosen on 2000 texts of the target domain's training split. No vector
  is trained on them, but their labels are used.
- The paper chooses, for every size, the largest learning rate of 1e-5, 3e-5, 5e-5 and
  8e-4 that does not diverge, and does not name it; see --learning-rates.
- The prompt is T5's for SST-2, "sst2 sentence: …", with negative and positive.
- Amazon's reviews are used without their titles.
- If two pairs of coefficients are equally good, the smaller λ1 wins, then the smaller
  λ2.

One epoch on all labelled texts has 35,000 steps for Yelp and 225,000 for Amazon;
--train-samples reduces them.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import bank, planning, runs, script, tables, training
from experiments.common.language import planned, text_to_text, tiny_text
from jaxarith import evaluate, hub, task_vectors
from jaxarith.data import glue, language, splits, text
from jaxarith.typing import Tree

DOMAINS = ("yelp", "amazon")
SAMPLES = {"yelp": (560_000, 38_000), "amazon": (3_600_000, 400_000)}  # train, test
WORDS = ("negative", "positive")
SIZES = {f"google-t5/t5-{size}": f"T5-{size}" for size in ("small", "base", "large")}
METHODS = ("Fine-tuned on auxiliary", "Task analogies", "Fine-tuned on target")
PUBLISHED = tables.published_by_column(__doc__, "model", "method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(text_to_text.Options):
    """Table 4 (editing paper): sentiment of Yelp and Amazon by analogies of T5s."""

    models: tuple[str, ...] = tuple(SIZES)
    """T5s: folders, or ids of the Hugging Face Hub."""
    learning_rates: tuple[float, ...] = (5e-5,)
    """Learning rates, one for every model, or one for all."""
    yelp: str = "fancyzhx/yelp_polarity"
    """A dataset of the Hub, or the files TRAIN,TEST."""
    amazon: str = "fancyzhx/amazon_polarity"
    """A dataset of the Hub, or the files TRAIN,TEST."""
    train_samples: int | None = None
    """Number of training texts of a domain, drawn at random; by default all."""
    validation_samples: int = 2000
    """Number of texts of a training split that choose the coefficients."""
    test_samples: int | None = None
    """Number of test texts of a domain, drawn at random; by default all."""
    coefs: tuple[float, ...] = tuple(i / 10 for i in range(11))
    """Candidate values of both coefficients."""
    epochs: float = 1
    batch_size: int = 16
    """Number of texts per step; the paper accumulates 8 batches of 2."""
    micro_batches: int = 1
    """Number of parts of a batch that are computed one after another. More parts need
    less memory; the paper has 8."""
    seed: int = 0


class Domain(NamedTuple):
    """The records `{"text", "label"}` of a domain; label 1 is positive."""

    train: list[dict]
    validation: list[dict]
    test: list[dict]


class Study(NamedTuple):
    """One T5, and the two domains as tokens.

    Attributes:
      config: the options.
      name: name of the model.
      base: the T5.
      wanted: descriptions of the task vectors, by name.
      parts: batches for evaluation, by domain and "validation" or "test".
      candidates: the possible answers as tokens.
    """

    config: Config
    name: str
    base: text_to_text.Base
    wanted: dict[str, training.Wanted]
    parts: dict[str, dict[str, list[dict]]]
    candidates: np.ndarray


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    script.needs("text", "transformers")
    files = "," in config.yelp and "," in config.amazon
    if not (config.smoke or files):
        script.needs("text", "datasets")
    config = runs.smaller(
        config,
        models=("tiny_t5",),
        learning_rates=(1e-2,),
        coefs=(0.5, 1.0),
        batch_size=8,
        max_length=12,
        validation_samples=12,
        epochs=1,
    )
    if len(config.learning_rates) not in (1, len(config.models)):
        raise ValueError(
            f"{len(config.learning_rates)} --learning-rates for {len(config.models)} "
            "models; give one for all, or one for each."
        )
    if config.validation_samples < 1:
        raise ValueError(
            f"--validation-samples {config.validation_samples}: expected 1 or more."
        )
    if record := planning.recorder():
        plan(config, record)
        return {}
    mesh = runs.start(config)
    domains = {name: read(config, name) for name in DOMAINS}
    rates = config.learning_rates * (len(config.models) // len(config.learning_rates))
    for model in () if config.smoke else config.models[1:]:
        hub.find(model)  # report a missing one before hours of training
    lines, searches = [], {}
    models = zip(config.models, rates, strict=True)
    for model, rate in tqdm(models, "models", len(rates), unit="model"):
        study = prepare(config, mesh, model, rate, domains)
        if not lines:
            runs.claim(config)
        own, curves = of_model(study)
        lines += own
        searches |= curves
        del study  # Amazon's tokens take gigabytes: keep those of one model only
    lines.sort(key=lambda line: DOMAINS.index(line["target"]))
    results = {"rows": lines, "searches": searches}
    keys = ["target", "model", "method"]
    beside = tables.beside(lines, PUBLISHED, keys=keys, values=["accuracy"])
    chosen = [
        {"vector": name, "λ1": f"{curve['coef'][0]:g}", "λ2": f"{curve['coef'][1]:g}"}
        for name, curve in searches.items()
    ]
    shown = {
        "Accuracy in percent on the target's test part": beside,
        "Coefficients of the analogies": chosen,
    }
    return tables.write(config.out, "Table 4: task analogies", shown, results)


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and the passes of the searches and all rows to the plan."""
    answer = planned.ANSWER
    recipe = functools.partial(
        text_to_text.recipe,
        config,
        learning_rate=1.0,
        micro_batches=config.micro_batches,
    )
    for model in config.models:
        shapes = {"sentiment": answer, "language": config.max_length}
        for kind, target in shapes.items():
            full = planned.t5_model(model, config.max_length, (target,))
            wanted = [
                planned.wanted(
                    f"{name}_{kind}",
                    bank.vector_file(
                        config.bank, model, text_to_text.METHOD, f"{name}_{kind}"
                    ),
                    recipe(trained_texts(config, name)),
                )
                for name in DOMAINS
            ]
            planned.vectors(record, full, kind, text_to_text.loss, wanted, together=1)
        ranks = planned.t5_model(model, config.max_length, (len(WORDS), answer))
        for name in DOMAINS:
            test = min(config.test_samples or SAMPLES[name][1], SAMPLES[name][1])
            searched = len(config.coefs) ** 2 * config.validation_samples
            record.evaluate(ranks, searched + len(METHODS) * test)
    record.note(planned.ANSWERS)
    record.note(
        "The plan does not read texts, so it does not know their number of blocks: "
        "language modelling counts one sample per text. The plan always uses the sizes "
        "of Yelp and Amazon on the Hub, also if files are named."
    )


def trained_texts(config: Config, name: str) -> int:
    """Returns the number of training texts of a domain of the Hub."""
    kept = SAMPLES[name][0] - config.validation_samples
    return min(config.train_samples or kept, kept)


def of_model(study: Study) -> tuple[list[dict], dict]:
    """Returns the rows of a model, and its searches by model and target."""
    network, wanted = text_to_text.network(study.base), study.wanted
    found = training.vectors(study.config, network, list(wanted.values()), together=1)
    taus = dict(zip(wanted, found, strict=True))
    lines, searches = [], {}
    for target in DOMAINS:
        own, curve = rows(study, taus, target)
        lines += own
        searches[f"{study.name}, {target}"] = curve
    return lines, searches


def read(config: Config, name: str) -> Domain:
    """Reads the texts and labels of a domain."""
    option = getattr(config, name)
    if config.smoke:
        task, seed = glue.TASKS["sst2"], DOMAINS.index(name)
        train_split, test = (
            tiny_text.glue_records(task, count, count + seed) for count in (60, 24)
        )
    elif "," in option:
        train_split, test = from_files(name, option)
    else:
        train_split, test = (from_hub(option, part) for part in ("train", "test"))
    if len(train_split) <= config.validation_samples:
        raise ValueError(
            f"{name} has {len(train_split)} training texts, but "
            f"{config.validation_samples} are held out for validation. Give fewer "
            "--validation-samples."
        )
    order = splits.torch_permutation(len(train_split), config.seed)
    held_out, kept = np.split(order, [config.validation_samples])
    chosen = splits.torch_permutation(len(test), config.seed)[: config.test_samples]
    return Domain(
        [train_split[i] for i in kept[: config.train_samples]],
        [train_split[i] for i in held_out],
        [test[i] for i in chosen],
    )


def from_files(name: str, option: str) -> list[list[dict]]:
    """Reads the records of both splits from files, with labels 0 and 1."""
    files = option.split(",")
    if len(files) != 2:
        raise ValueError(f"--{name} {option!r}: expected TRAIN,TEST, two files.")
    parts = [text.read(file) for file in files]
    classes = sorted({record["label"] for part in parts for record in part})
    if len(classes) != 2:
        found = ", ".join(classes)
        raise ValueError(f"--{name} {option!r} has the labels {found}; expected two.")
    return [
        [{**record, "label": classes.index(record["label"])} for record in part]
        for part in parts
    ]


def from_hub(dataset: str, split: str) -> list[dict]:
    """Loads the records of a split by Hugging Face `datasets`."""
    import datasets

    found = datasets.load_dataset(dataset, split=split)
    column = "text" if "text" in found.column_names else "content"
    pairs = zip(found[column], found["label"], strict=True)
    return [{"text": content, "label": label} for content, label in pairs]


def prepare(config: Config, mesh, model: str, rate: float, domains) -> Study:
    """Loads a T5, and converts the domains to tokens."""
    base = text_to_text.load(config, mesh, model)
    candidates = language.candidates(base.tokenizer, WORDS)
    sources, parts = {}, {}
    for name, domain in domains.items():
        inputs = {part: prompted(getattr(domain, part)) for part in domain._fields}
        sources[f"{name}_sentiment"] = text_to_text.training_source(
            base, inputs["train"], candidates.shape[1]
        )
        stream = language.stream(base.tokenizer, [r["text"] for r in domain.train])
        sources[f"{name}_language"] = text_to_text.with_decoder_inputs(
            base, language.consecutive_blocks(stream, config.max_length)
        )
        parts[name] = {
            part: text_to_text.batches(base, inputs[part])
            for part in ("validation", "test")
        }
    own = {"learning_rate": rate, "seed": config.seed}
    own |= {"micro_batches": config.micro_batches}
    wanted = {
        name: text_to_text.wanted(
            base, name, source, text_to_text.recipe(config, len(source), **own)
        )
        for name, source in sources.items()
    }
    training.check(text_to_text.network(base), wanted.values(), together=1)
    label = SIZES.get(model, model)
    return Study(config, label, base, wanted, parts, candidates)


def prompted(records: list[dict]) -> list[dict]:
    """Returns records in T5's format for SST-2."""
    found = glue.text_to_text(glue.TASKS["sst2"], records)
    return [{**row, "target": WORDS[row["label"]]} for row in found]


def rows(study: Study, taus: dict[str, Tree], target: str):
    """Returns the rows of a target domain, and the search of its coefficients."""
    [auxiliary] = [name for name in DOMAINS if name != target]
    config, params_0 = study.config, study.base.checkpoint.params
    auxiliary_tau = taus[f"{auxiliary}_sentiment"]

    def accuracy(tau, part):
        found = study.parts[target][part]
        predicted = text_to_text.ranked(
            study.base, task_vectors.apply(params_0, tau), found, study.candidates
        )
        return float(np.mean(predicted == evaluate.labels(found)))

    def analogy(coefs):
        return task_vectors.analogy(
            taus[f"{auxiliary}_language"],
            taus[f"{target}_language"],
            auxiliary_tau,
            coefs,
        )

    grid = list(itertools.product(config.coefs, repeat=2))
    progress = tqdm(grid, desc=f"analogies for {target}", unit="pair", leave=False)
    validation = [accuracy(analogy(coefs), "validation") for coefs in progress]
    best = grid[int(np.argmax(validation))]
    models = (auxiliary_tau, analogy(best), taus[f"{target}_sentiment"])
    lines = [
        {
            "target": target,
            "model": study.name,
            "method": method,
            "accuracy": 100 * accuracy(tau, "test"),
        }
        for method, tau in zip(METHODS, models, strict=True)
    ]
    shape = (len(config.coefs),) * 2
    curve = {
        "coef": list(best),
        "coefs": list(config.coefs),
        "validation": np.reshape(validation, shape).tolist(),
    }
    return lines, curve


if __name__ == "__main__":
    script.run(Config, main)
