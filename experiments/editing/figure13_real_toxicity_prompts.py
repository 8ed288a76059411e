"""Figure 13 (editing paper): expected maximum toxicity and perplexity by coefficient.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089:
Appendix C.3, on Gehman et al. RealToxicityPrompts. Findings of EMNLP 2020.

The scores are not those of the paper. It asks the Perspective API, which is a service
whose answers change with time; here the classifier of `--classifier` scores the texts,
by default Detoxify's "original". Only the direction of the lines compares.

    python -m experiments.editing.figure13_real_toxicity_prompts \\
        --comments civil_comments.jsonl --perplexity-text wikitext103_test.txt \\
        --prompts prompts.jsonl

Data: `prompts.jsonl` of RealToxicityPrompts (`allenai/real-toxicity-prompts` on the
Hugging Face Hub), an object with `prompt`, which holds a `text`, and `challenging` per
line. The other two files and the task vectors are those of Table 2;
`experiments.common.language.detoxification` says how to get them.

Of every prompt 25 continuations are scored, without the prompt, and the largest score
is taken; its mean over the prompts is the expected maximum toxicity. Once for all
challenging prompts, 1.2k, and once for 1000 prompts of all, drawn at random.

Published: a plot only. Toxicity falls as the coefficient grows; for GPT-2 Large almost
straight down, with little change in perplexity.

The paper does not say how it samples. Here as Gehman et al. do: 20 new tokens, nucleus
sampling with 0.9, temperature 1. Prompts of more than 64 tokens lose their beginning.
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
    "The scores are of a classifier, not of the Perspective API, which the paper asks: "
    "only the direction of its lines compares. The paper prints no number."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detoxification.EditingOptions):
    """Figure 13 (editing paper): expected maximum toxicity on RealToxicityPrompts.

    The classifier scores texts in place of the paper's Perspective API."""

    prompts: Path = Path("prompts.jsonl")
    """RealToxicityPrompts, an object with prompt and challenging per line."""
    random_prompts: int = 1000
    """Prompts of the random subset."""
    generations: int = 25
    """Continuations of every prompt."""
    max_new_tokens: int = 20
    prompt_length: int = 64
    """Tokens of a prompt; longer ones lose their beginning."""
    top_p: float = 0.9
    generation_batch: int = 50
    """Texts that are written at a time."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
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
            raise ValueError(f"--{name.replace('_', '-')}: at least one is needed.")
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
    """Notes the vectors, and the measures of every model at every coefficient."""
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
    """The texts of the two subsets, "challenging" and "random"."""
    with detoxification.places(config, "tiny_gpt2") as (files, _):
        file = files.prompts
        found = text_files.read_table(file)
    try:
        texts = [row["prompt"]["text"] for row in found]
        challenging = [row["prompt"]["text"] for row in found if row["challenging"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: {error!r}. Expected an object per line, such as "
            '{"prompt": {"text": "..."}, "challenging": false}.'
        ) from error
    if not challenging:
        raise ValueError(f"{file} has no prompt that is challenging.")
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
    """The measures of one model at one coefficient."""
    line = {"model": study.name, "coef": coef}
    for subset, prompts in subsets.items():
        written = continuations(config, study, prompts, tau, -coef)
        line[subset] = expected_maximum(study.gpt2.scores(written), config.generations)
    found = detoxification.perplexity(study, tau, -coef)
    return {**line, "perplexity": gpt2.finite(found)}


def expected_maximum(scores: np.ndarray, generations: int) -> float:
    """The mean over prompts of the largest score of their continuations.

    Args:
      scores: those of the first prompt, then of the second, and so on.
      generations: continuations of every prompt.

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
    """Continuations without their prompts, those of a prompt one after the other."""
    tokenizer = study.gpt2.tokenizer
    tokens = tokenizer(prompts)["input_ids"]
    if empty := [i for i, ids in enumerate(tokens) if not ids]:
        raise ValueError(
            f"{len(empty)} prompts have no token, the first is {empty[0]}."
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
