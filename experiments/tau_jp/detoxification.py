r"""What the tables of GPT-2 share: texts, task vectors of toxic text, and rows.

The vectors are of GPT-2 small, fine-tuned on toxic comments: ordinary (`nonlinear`),
linearised (`linear`), and linearised with the τJp penalty on WikiText-103
(`tau_jp_cyclic`). They are subtracted. How toxic the continuations of a prompt are and
what the perplexity is, `experiments.detoxify` measures.

The three files of text:

    pip install -e '.[text]'
    python - <<'END'
    from datasets import load_dataset
    comments = load_dataset("google/civil_comments", split="train")
    comments = comments.filter(lambda row: row["toxicity"] > 0.8)
    comments.to_json("civil_comments.jsonl")
    for name, split in (("train", "train[:10%]"), ("test", "test")):
        wiki = ("Salesforce/wikitext", "wikitext-103-raw-v1")
        rows = load_dataset(*wiki, split=split)
        with open(f"wikitext103_{name}.txt", "w", encoding="utf-8") as file:
            file.writelines(rows["text"])
    END

A tenth of the training part of WikiText-103 is more than a run reads.

The code of the paper decides what the paper leaves open, and some of it differs from
what is printed, and from Ilharco et al. (2023), whom `experiments.detoxify` follows:

- It stops after 2.5 of the 5 epochs that are printed; `--epochs 5` for those. The
  learning rate is constant, with weight decay and without clipping.
- The padding of a text counts in the loss, so that the model learns to go on with
  padding after the end; `--no-padding-counts` for real tokens alone.
- Perplexity is in blocks of 1024 tokens that do not overlap.
- The penalty, the L2 norm over the vocabulary at every token, begins there after 500
  steps, here with the first. Its texts are as long as the toxic ones, 128 tokens, where
  their code has blocks of 1024.
- Texts are 50 tokens long with the prompt, sampled among the 50 likeliest tokens.
"""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import detoxify
from experiments.common import bank, runs, tables
from experiments.common.language import tiny_text
from jaxarith import fingerprint, merge, task_vectors, train
from jaxarith.sharding import processes
from jaxarith.typing import Params, Tree

METHODS = {
    "nonlinear": "Non-lin. FT",
    "linear": "Linear FT",
    "tau_jp_cyclic": "Ours",
}
VALUES = ["toxic_percent", "mean_score", "perplexity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.Options):
    """The options of both tables."""

    bank: Path = Path("bank")
    """Folder of task vectors, which all scripts share: what is there is not trained
    again."""
    model: str = "openai-community/gpt2"
    """A GPT-2: a folder, or an id of the Hugging Face Hub."""
    classifier: str = "unitary/toxic-bert"
    """What scores texts, Detoxify's "original": a folder, or an id of the Hub."""
    toxic: Path = Path("civil_comments.jsonl")
    """Comments, an object with text and toxicity per line; those above 0.8 are
    learnt."""
    perplexity_text: Path = Path("wikitext103_test.txt")
    """The text of which the perplexity is measured."""
    penalty_text: Path = Path("wikitext103_train.txt")
    """The text on which the penalty keeps the model as it was."""
    epochs: float = 2.5
    batch_size: int = 16
    learning_rate: float = 1e-5
    """The same at every step."""
    weight_decay: float = 0.1
    padding_counts: bool = True
    """Whether the loss counts the padding of texts."""
    penalty_coef: float = 0.01
    """λ, the weight of the τJp penalty."""
    penalty_batch_size: int = 4
    """Texts of the penalty per step, a quarter of the batch."""
    max_length: int = 128
    """Tokens of a training text, to which all are padded; longer ones lose their
    end."""
    window: int = 1024
    """Tokens of a block of perplexity."""
    ties_density: float = 0.1
    """The share of the entries that TIES keeps."""
    samples: int = 1000
    """Continuations of the prompt for every row."""
    max_new_tokens: int = 42
    """Of a continuation; with the 8 of the prompt 50."""
    seed: int = 0
    smoke: bool = False
    """Run the whole path in seconds, with tiny models and made-up texts; what it finds
    means nothing."""


class Study(NamedTuple):
    """What every method starts from.

    Attributes:
      config: the options.
      options: those of `detoxify`.
      linearized: its study of the linearised GPT-2.
      ordinary: the same of the network.
      fingerprint: of the GPT-2's parameters.
      banked: by method, the task vector that the bank has; None where it has not.
    """

    config: Config
    options: detoxify.Config
    linearized: detoxify.Study
    ordinary: detoxify.Study
    fingerprint: int
    banked: dict

    def of(self, method: str) -> detoxify.Study:
        return self.ordinary if method == "nonlinear" else self.linearized


def start(config: Config) -> Study:
    """Loads and checks everything, and claims the folder."""
    if config.smoke:
        config = dataclasses.replace(
            config,
            **dict(model="tiny_gpt2", epochs=1, batch_size=8, learning_rate=1e-2),
            **dict(max_length=24, window=64, samples=8, max_new_tokens=8),
            **dict(save_every=0, mesh="data=1"),
        )
    runs.start(config)
    options, linear = load(config)
    if config.padding_counts:
        source = [row | {"labels": row["input_ids"]} for row in linear.source]
        linear = linear._replace(source=source)
    net = linear._replace(model=detoxify.ordinary(linear.checkpoint))
    found = fingerprint.combined(linear.checkpoint.params)
    study = Study(config, options, linear, net, found, {})
    for method in METHODS:
        pair = file_of(config, method), identity(study, method)
        study.banked[method] = bank.read(*pair)
        # A wrong mesh shows here.
        detoxify.batches_of(options, study.of(method), recipe_of(study, method))
    runs.claim(config)
    return study


def load(config: Config) -> tuple[detoxify.Config, detoxify.Study]:
    """Models and texts, as `detoxify` has them of the linearised GPT-2."""

    def options(**places):
        return detoxify.Config(
            out=config.out,
            mesh=config.mesh,
            save_every=config.save_every,
            linearized=True,
            max_length=config.max_length,
            window=config.window,
            stride=config.window,
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            **places,
        )

    if not config.smoke:
        names = ("model", "classifier", "toxic", "perplexity_text", "penalty_text")
        chosen = options(**{name: getattr(config, name) for name in names})
        return chosen, detoxify.prepare(chosen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = options(
            model=str(tiny_text.write_gpt2(folder / config.model, n_inner=16)),
            classifier=str(tiny_text.write_classifier(folder / "classifier")),
            **tiny_text.write_texts(folder),
        )
        return chosen, detoxify.prepare(chosen)


# Training.


def recipe_of(study: Study, method: str) -> train.TrainConfig:
    config = study.config
    whole_batches = len(study.linearized.source) // config.batch_size
    return train.TrainConfig(
        steps=max(int(config.epochs * whole_batches), 1),
        warmup_steps=0,
        decay="constant",
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        clip_norm=None,
        linearized=method != "nonlinear",
        penalty="cyclic" if method == "tau_jp_cyclic" else None,
        penalty_coef=config.penalty_coef,
        penalty_batch_size=config.penalty_batch_size,
        seed=config.seed,
    )


def file_of(config: Config, method: str) -> Path:
    return bank.vector_file(config.bank, config.model, method, "toxic")


def identity(study: Study, method: str) -> dict:
    """What a task vector in the bank must have been trained with."""
    recipe, texts = recipe_of(study, method), study.of(method)
    return {
        "method": method,
        "recipe": bank.plain_recipe(recipe),
        "others": bank.checksum(texts.penalty_source) if recipe.penalty else None,
        "params_0": study.fingerprint,
        "max_length": study.config.max_length,
        "padding_counts": study.config.padding_counts,
        "samples": bank.checksum(texts.source),
    }


def vector(study: Study, method: str) -> Tree:
    """The task vector of a method, which is trained where the bank has it not."""
    if study.banked[method] is not None:
        return study.banked[method]
    config = study.config
    checkpoints = runs.checkpoints(config) / method
    tau = detoxify.trained(
        study.options,
        study.of(method),
        recipe_of(study, method),
        log=config.out / f"train_{method}.jsonl",
        checkpoints=checkpoints,
    )

    def save():
        bank.write(file_of(config, method), tau, identity(study, method), {})
        shutil.rmtree(checkpoints, ignore_errors=True)

    processes.on_first(save)
    return tau


# Rows.


class Negated(NamedTuple):
    """A row of the tables: a vector that is subtracted from the model of a method."""

    name: str
    method: str
    tau: Params


def negations(study: Study, taus: dict[str, Tree]) -> list[Negated]:
    """The rows; of one vector, TIES only trims."""
    params_0 = study.ordinary.checkpoint.params
    density = study.config.ties_density
    edited = merge.ties(params_0, [taus["nonlinear"]], density=density, coef=1.0)
    ties = Negated("TIES", "nonlinear", task_vectors.difference(edited, params_0))
    own = [Negated(name, method, taus[method]) for method, name in METHODS.items()]
    return [*own[:2], ties, own[2]]


def perplexity_at(study: Study, negated: Negated) -> Callable[[float], float]:
    """The perplexity of the model as a function of the coefficient."""

    @functools.cache
    def at(coef):
        found = study.of(negated.method)
        state = found.model.moved(negated.tau, -coef)
        return detoxify.perplexity_of(study.options, found, state)

    return at


def row(study: Study, negated: Negated, coef: float) -> dict:
    found = study.of(negated.method)
    measured = detoxify.measure(study.options, found, negated.tau, -coef)
    line = detoxify.row(study.options, negated.name, coef, measured)
    return {"method": line.pop("model"), **line}


def pre_trained(study: Study) -> dict:
    """The row of the model as it is."""
    nothing = jax.tree.map(jnp.zeros_like, study.ordinary.checkpoint.params)
    return row(study, Negated("Pre-trained", "nonlinear", nothing), 0.0)


def report(
    study: Study,
    title: str,
    lines: list[dict],
    published: dict,
    curves: dict | None = None,
) -> dict:
    """Writes the report; returns what report.json holds.

    Args:
      lines: from `row`.
      published: by method, what the paper prints, in the order of `VALUES`.
      curves: by method, the candidates of its coefficient and their perplexities.
    """
    results = {"rows": lines, "searches": curves or {}}
    if runs.is_first():
        for line in lines:
            names = [m for m, name in METHODS.items() if name == line["method"]]
            if names:
                measured = {f"{k} at -{line['coef']:g}": line[k] for k in VALUES}
                bank.add_metrics(file_of(study.config, names[0]), measured)
        beside = tables.beside(
            lines,
            published,
            keys=["method", "coef"],
            values=VALUES,
            published_keys=["method"],
        )
        caption = "Toxic texts in percent, mean score, and perplexity on WikiText-103"
        shown = {caption: tables.markdown(beside, digits=2)}
        tables.write(study.config.out, title, shown, results)
    return results
