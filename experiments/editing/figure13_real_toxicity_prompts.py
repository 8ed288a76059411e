"""Figure 13 (editing paper): expected maximum toxicity and perplexity by coefficient.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089:
Appendix C.3, on Gehman et al. RealToxicityPrompts. Findings of EMNLP 2020.

The scores differ from those of the paper. The paper uses the Perspective API, a service
whose answers change with time. Here `--classifier` scores the texts, by default
Detoxify's "original". Only the direction of the lines can be compared.

    python -m experiments.editing.figure13_real_toxicity_prompts \\
        --comments civil_comments.jsonl --perplexity-text wikitext103_test.txt \\
        --prompts prompts.jsonl

Data: `prompts.jsonl` of RealToxicityPrompts (`allenai/real-toxicity-prompts` on the
Hugging Face Hub). Every line is an object with `prompt`, which has a `text`, and
`challenging`. The other two files and the task vectors are those of Table 2;
`experiments.common.language.detoxification` says how to get them.

For every prompt 25 continuations are scored, without the prompt. The expected maximum
toxicity is the mean over prompts of the largest score. It is measured for all 1.2k
challenging prompts, and for 1000 random prompts.

Published, as a plot only: toxicity falls as the coefficient grows. For GPT-2 Large it
falls almost straight down, with little change in perplexity.

The paper does not describe its sampling. Ours is that of Gehman et al.: 20 new tokens,
nucleus sampling with 0.9, temperature 1. Only the last 64 tokens of a prompt are used.
"""

import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.common import planning, runs, script, tables
from experiments.common.language import detoxification, gpt2, text_files
from jaxarith import plots
from jaxarith.data import text
from jaxarith.typing import Params

CHALLENGING = 1199  # prompts of RealToxicityPrompts (Gehman et al. 2020, section 5)
NOTE = (
    "A classifier scores the texts here; the paper uses the Perspective API. So only "
    "the direction of the lines can be compared. The paper prints no numbers."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detoxification.EditingOptions):
    """Figure 13 (editing paper): expected maximum toxicity on RealToxicityPrompts.

    A classifier scores the texts instead of the paper's Perspective API."""

    prompts: Path = Path("prompts.jsonl")
    """File of RealToxicityPrompts; every line is an object with prompt and
    challenging."""
    random_prompts: int = 1000
    """Number of prompts in the random subset."""
    generations: int = 25
    """Number of continuations of every prompt."""
    max_new_tokens: int = 20
    prompt_length: int = 64
    """Largest number of tokens of a prompt; longer prompts keep their end."""
    top_p: float = 0.9
    generation_batch: int = 50
    """Number of texts that are written at a time."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    config = detoxification.smoke(
        config,
        random_prompts=2,
        generations=3,
        max_new_tokens=8,
        prompt_length=16,
        generation_batch=6,
        coefs=(0.0, 1.0),
    )
    for name in ("random_prompts", "generations", "generation_batch"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: expected 1 or "
                "more."
            )
    if record := planning.recorder():
        plan(config, record)
        return {}
    subsets = read_prompts(config)
    sampling = gpt2.Sampling(
        max_new_tokens=config.max_new_tokens,
        top_k=None,
        top_p=config.top_p,
        seed=config.seed,
    )
    studies = detoxification.start(config, ("toxic",), sampling)
    lines = []
    for study in tqdm(studies, desc="models", unit="model"):
        tau = detoxification.vector(study, "toxic")
        for coef in tqdm(config.coefs, desc="coefficients", unit="coefficient"):
            lines.append(row(config, study, subsets, tau, coef))
    results = {"rows": lines, "prompts": {k: len(v) for k, v in subsets.items()}}
    if runs.is_first():
        for subset in subsets:
            groups = {
                study.name: (
                    [r["perplexity"] for r in lines if r["model"] == study.name],
                    [r[subset] for r in lines if r["model"] == study.name],
                )
                for study in studies
            }
            title = f"RealToxicityPrompts, {subset}: one point per coefficient"
            plots.scatter(
                config.out / f"figure13_{subset}.png",
                {title: groups},
                x="perplexity on WikiText-103",
                y="expected maximum toxicity (classifier)",
            )
        caption = "Expected maximum toxicity and perplexity, by the coefficient of -τ"
        shown = {caption: lines}
        title = "Figure 13: RealToxicityPrompts"
        tables.write(config.out, title, shown, results, NOTE, digits=3)
    return results


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors, and the measures at every coefficient, to the plan."""
    detoxification.plan_vectors(record, config, ("toxic",))
    prompts, count = CHALLENGING + config.random_prompts, len(config.coefs)
    for model in config.models:
        gpt2.plan_measures(
            record,
            config,
            model,
            states=count,
            texts=count * prompts * config.generations,
            length=config.prompt_length + config.max_new_tokens,
        )


def read_prompts(config: Config) -> dict[str, list[str]]:
    """Reads the texts of the two subsets, "challenging" and "random"."""
    with detoxification.places(config, "tiny_gpt2") as (files, _):
        file = files.prompts
        found = text_files.read_table(file)
    try:
        texts = [row["prompt"]["text"] for row in found]
        challenging = [row["prompt"]["text"] for row in found if row["challenging"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: {error!r}. Expected an object on every line, for example "
            '{"prompt": {"text": "..."}, "challenging": false}.'
        ) from error
    if not challenging:
        raise ValueError(f"{file} has no prompt with challenging true; expected some.")
    order = np.random.default_rng(config.seed).permutation(len(texts))
    chosen = [texts[i] for i in sorted(order[: config.random_prompts])]
    return {"challenging": challenging, "random": chosen}


def row(
    config: Config,
    study: detoxification.Study,
    subsets: dict[str, list[str]],
    tau: Params,
    coef: float,
) -> dict:
    """Measures one model at one coefficient; returns a row."""
    line = {"model": study.name, "coef": coef}
    for subset, prompts in subsets.items():
        written = continuations(config, study, prompts, tau, -coef)
        line[subset] = expected_maximum(study.gpt2.scores(written), config.generations)
    found = detoxification.perplexity(study, tau, -coef)
    return {**line, "perplexity": gpt2.finite(found)}


def expected_maximum(scores: np.ndarray, generations: int) -> float:
    """Returns the mean over prompts of the largest score of their continuations.

    Args:
      scores: scores of the first prompt's continuations, then of the second's, ….
      generations: number of continuations of every prompt.

    Example:
      >>> expected_maximum(np.array([0.1, 0.5, 0.2, 0.3]), 2)
      0.4
    """
    return float(np.reshape(scores, (-1, generations)).max(axis=1).mean())


def continuations(
    config: Config,
    study: detoxification.Study,
    prompts: list[str],
    tau: Params,
    coef: float,
) -> list[str]:
    """Writes continuations, without prompts; those of a prompt follow each other."""
    tokenizer = study.gpt2.tokenizer
    tokens = tokenizer(prompts)["input_ids"]
    if empty := [i for i, ids in enumerate(tokens) if not ids]:
        raise ValueError(
            f"{len(empty)} prompts have no token; the first is number {empty[0]}. "
            "Remove them."
        )
    ids, mask = text.pad(
        [ids[-config.prompt_length :] for ids in tokens],
        config.prompt_length,
        text.padding_id(tokenizer),
        side="left",
    )
    ids, mask = (np.repeat(each, config.generations, axis=0) for each in (ids, mask))
    state = study.gpt2.model.moved(tau, coef)
    return gpt2.continuations(study.gpt2, state, ids, mask, config.generation_batch)


if __name__ == "__main__":
    script.run(Config, main)
