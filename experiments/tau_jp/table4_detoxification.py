r"""Tables 4 and 9 (τJp paper): makes a GPT-2 less toxic by negation.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: section 4.2, Table 4; Appendix E.5, Table 9.

    python -m experiments.tau_jp.table4_detoxification --out runs/table4
    python -m experiments.tau_jp.table4_detoxification --coefficient one \
        --out runs/table9

Table 4 uses the largest coefficient out of 0, 0.1, …, 3 (App. B.2) with a perplexity at
most 0.5 above that of the pre-trained model. Table 9 (`--coefficient one`) uses θ0 - τ,
with the same task vectors from the bank.

GPT-2 small is fine-tuned on toxic comments in three ways: ordinary, linearised, and
linearised with the τJp penalty on WikiText-103. The vectors are subtracted; TIES trims
the ordinary one. `experiments.common.language.detoxification` says how to get the
texts. Published:

    Table 4      toxic %  mean score  perplexity
    Pre-trained  1.3      0.03        29.4
    Non-lin. FT  1.1      0.02        29.7
    Linear FT    0.9      0.02        29.6
    TIES         1.0      0.02        29.6
    Ours         0.4      0.01        29.9

    Table 9      toxic %  mean score  perplexity
    Pre-trained  1.3      0.03        29.4
    Non-lin. FT  0.0      0.01        95.7
    Linear FT    0.0      0.00        66.7
    TIES         0.6      0.02        87.7
    Ours         0.5      0.01        30.7

Where the paper leaves something open, its code decides. The code differs in part from
the paper, and from the editing paper, which `experiments.detoxify` follows:

- The code stops after 2.5 epochs; the paper says 5 (`--epochs 5`). The learning rate is
  constant, with weight decay and without clipping.
- The padding of a text counts in the loss, so the model learns to write padding after
  the end; with `--no-padding-counts` only real tokens count.
- Perplexity is measured in blocks of 1024 tokens that do not overlap.
- The penalty is the L2 norm over the vocabulary at every token. In the code it begins
  after 500 steps (`--penalty-start 500`), here with the first step. Its texts have 128
  tokens here, as the toxic ones, because both are in one batch; the code uses blocks of
  1024.
- Texts are 50 tokens long with the prompt, sampled among the 50 most likely tokens.
- The code's candidate coefficients go up to 1, and it stops at the first one that is
  not allowed. That differs from our search if the perplexity falls again.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.common import bank, planning, runs, script, tables, training
from experiments.common.language import (
    detoxification,
    gpt2,
    planned,
    tau_jp,
    text_files,
)
from experiments.common.language.tau_jp import METHODS
from jaxarith import fingerprint, train
from jaxarith.typing import Params, Tree

TABLES = {"searched": "Table 4", "one": "Table 9"}
PUBLISHED = {
    coefficient: tables.published(__doc__, table)
    for coefficient, table in TABLES.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tau_jp.Options, detoxification.Options):
    """Tables 4 and 9 (τJp paper): make a GPT-2 less toxic by its negated vectors."""

    model: str = "openai-community/gpt2"
    """A GPT-2: a folder, or an id of the Hugging Face Hub."""
    perplexity_text: Path = Path("wikitext103_test_lines.txt")
    """The text file whose perplexity is measured."""
    stride: int | None = 1024
    """Number of tokens from one perplexity window to the next; by default blocks do not
    overlap."""
    penalty_text: Path = Path("wikitext103_train.txt")
    """The text on which the penalty keeps the model's outputs."""
    epochs: float = 2.5
    weight_decay: float = 0.1
    padding_counts: bool = True
    """Whether the padding of texts counts in the loss."""
    penalty_coef: float = 0.01
    """Weight λ of the τJp penalty."""
    coefs: tuple[float, ...] = tuple(i / 10 for i in range(31))
    """Candidate values of the coefficient."""
    allowance: float = 0.5
    """Largest rise of the perplexity."""
    samples: int = 1000
    """Number of continuations of the prompt for every row."""
    max_new_tokens: int = 42
    """Number of tokens of a continuation; 50 with the 8 of the prompt."""


class Study(NamedTuple):
    """The GPT-2 and the vectors of every method.

    Attributes:
      config: the options.
      ordinary: the GPT-2 and its measures.
      linearized: its linearisation.
      networks: the network that is trained, by method.
      wanted: the description of the vector, by method.
    """

    config: Config
    ordinary: gpt2.Study
    linearized: gpt2.Study
    networks: dict[str, training.Network]
    wanted: dict[str, training.Wanted]

    @property
    def params_0(self) -> Params:
        return self.ordinary.checkpoint.params

    def of(self, method: str) -> gpt2.Study:
        return self.ordinary if method == "nonlinear" else self.linearized


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    if record := planning.recorder():
        plan(config, record)
        return {}
    study = start(config)
    config = study.config
    taus = {method: vectors(study, method) for method in METHODS}
    nothing = gpt2.nothing(study.ordinary)
    rows = [{"method": "Pre-trained"} | gpt2.row(study.ordinary, nothing, 0.0)]
    negated, searches = tau_jp.merged(study.params_0, taus, config.ties_density), {}
    for name, (method, tau) in tqdm(negated.items(), desc="rows", unit="method"):
        model, coef = study.of(method), 1.0
        if config.coefficient == "searched":
            found = gpt2.search(model, tau, config.coefs, config.allowance)
            coef, _, searches[name] = found
        rows.append({"method": name} | gpt2.row(model, tau, -coef) | {"coef": coef})
        if name in METHODS.values() and runs.is_first():
            measured = {f"{k} at -{coef:g}": rows[-1][k] for k in gpt2.VALUES}
            bank.add_metrics(study.wanted[method].file, measured)
    return tables.compared(
        config.out,
        f"{TABLES[config.coefficient]}: less toxic text from GPT-2, "
        f"coefficient {config.coefficient}",
        "Toxic texts in percent, mean score, and perplexity on WikiText-103",
        rows,
        PUBLISHED[config.coefficient],
        keys=["method", "coef"],
        values=gpt2.VALUES,
        published_keys=["method"],
        digits=2,
        results={"searches": searches},
    )


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and the measures of all rows to the plan."""
    comments = detoxification.planned_comments(record, config.comments)
    full = planned.gpt2_model(config.model, config.max_length)
    for method in METHODS:
        recipe = recipe_of(config, method, comments)
        file = bank.vector_file(config.bank, config.model, method, "toxic")
        wanted = [planned.wanted("toxic", file, recipe)]
        planned.vectors(record, full, method, gpt2.loss, wanted)
    searched = len(config.coefs) if config.coefficient == "searched" else 0
    # Rows: pre-trained, ordinary and TIES; then both linearised methods.
    for linear, rows, searches in ((False, 3, 2), (True, 2, 2)):
        gpt2.plan_measures(
            record,
            config,
            config.model,
            states=rows + searches * searched,
            texts=rows * config.samples,
            length=gpt2.PROMPT_TOKENS + config.max_new_tokens,
            linear=linear,
        )


def recipe_of(config: Config, method: str, texts: int) -> train.TrainConfig:
    """Returns the recipe of a method for `texts` texts."""
    steps = max(int(config.epochs * (texts // config.batch_size)), 1)
    return tau_jp.recipe(config, method, steps=steps, weight_decay=config.weight_decay)


def start(config: Config) -> Study:
    """Loads and checks everything, and claims the output folder."""
    script.needs("demo", "transformers")
    config = runs.smaller(
        config,
        model="tiny_gpt2",
        epochs=1,
        batch_size=8,
        learning_rate=1e-2,
        max_length=24,
        stride=64,
        coefs=(0.0, 0.1, 1.0),
        samples=8,
        max_new_tokens=8,
    )
    mesh = runs.start(config)
    sampling = gpt2.Sampling(
        samples=config.samples, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    with detoxification.places(config, config.model) as (files, checkpoint):
        texts = text_files.kept_texts(files.comments, detoxification.TOXIC)
        penalty = text_files.read(files.penalty_text)
        ordinary = gpt2.load(files, checkpoint, sampling)
    linear = ordinary._replace(model=gpt2.linearized(ordinary.checkpoint))
    source = gpt2.texts_as_tokens(ordinary, texts, config.max_length)
    if config.padding_counts:
        source = [sample | {"labels": sample["input_ids"]} for sample in source]
    others = gpt2.blocks(ordinary, penalty, config.max_length)
    base = fingerprint.combined(ordinary.checkpoint.params)
    networks, wanted = {}, {}
    for method in METHODS:
        recipe = recipe_of(config, method, len(source))
        networks[method] = gpt2.network(ordinary, method, mesh)
        wanted[method] = training.Wanted(
            name="toxic",
            file=bank.vector_file(config.bank, config.model, method, "toxic"),
            recipe=recipe,
            identity={
                "method": method,
                "others": bank.checksum(others) if recipe.penalty else None,
                "params_0": base,
                "max_length": config.max_length,
                "padding_counts": config.padding_counts,
                "samples": bank.checksum(source),
            },
            source=source,
            others={"wikitext103": others} if recipe.penalty else {},
        )
        training.check(networks[method], [wanted[method]])
    runs.claim(config)
    return Study(config, ordinary, linear, networks, wanted)


def vectors(study: Study, method: str) -> list[Tree]:
    """Returns the one task vector of a method; trains it if the bank lacks it."""
    wanted = [study.wanted[method]]
    return training.vectors(study.config, study.networks[method], wanted)


if __name__ == "__main__":
    script.run(Config, main)
