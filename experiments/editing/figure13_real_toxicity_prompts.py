"""Figure 13 (S4): expected maximum toxicity and perplexity as the coefficient grows.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089:
Appendix C.3, on Gehman et al. RealToxicityPrompts. Findings of EMNLP 2020.

The scores are not those of the paper. It asks the Perspective API, which is a service
whose answers change with time; here the classifier of `--classifier` scores the texts,
by default Detoxify's "original". Only the direction of the lines compares.

    python -m experiments.editing.figure13_real_toxicity_prompts \\
        --comments civil_comments.jsonl --perplexity-text wikitext103_test.txt \\
        --prompts prompts.jsonl
    python -m experiments.editing.figure13_real_toxicity_prompts --smoke --out runs/s

Data: `prompts.jsonl` of RealToxicityPrompts (`allenai/real-toxicity-prompts` on the
Hugging Face Hub), an object with `prompt`, which holds a `text`, and `challenging` per
line. The other two files and the task vectors are those of Table 2; `detoxification`
beside this file says how to get them.

Of every prompt 25 continuations are scored, without the prompt, and the largest score
is taken; its mean over the prompts is the expected maximum toxicity. Once for all
challenging prompts, 1.2k, and once for 1000 prompts of all, drawn at random.

Published: a plot only. Toxicity falls as the coefficient grows; for GPT-2 Large almost
straight down, with little change in perplexity.

The paper does not say how it samples. Here as Gehman et al. do: 20 new tokens, nucleus
sampling with 0.9, temperature 1. Prompts of more than 64 tokens lose their beginning.

Not run at full scale yet.
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments import detoxify
from experiments.common import runs, tables
from experiments.common.language import tiny_text
from experiments.editing import detoxification
from jaxarith import plots
from jaxarith.data import text
from jaxarith.models import generate
from jaxarith.typing import Params

NOTE = (
    "The scores are of a classifier, not of the Perspective API, which the paper asks: "
    "only the direction of its lines compares. The paper prints no number."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detoxification.Options):
    """Figure 13 (S4): expected maximum toxicity on RealToxicityPrompts.

    The classifier scores texts in place of the paper's Perspective API."""

    out: Path = Path("runs/editing/figure13")
    """Folder for figure13_challenging.png, figure13_random.png, report.json, report.md
    and the logs of training."""
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


def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = detoxification.smoke(config)
    if config.smoke:
        small = dict(random_prompts=2, generations=3, max_new_tokens=8)
        small |= dict(prompt_length=16, generation_batch=6, coefs=(0.0, 1.0))
        config = dataclasses.replace(config, **small)
    for name in ("random_prompts", "generations", "generation_batch", "coefs"):
        value = getattr(config, name)
        if value == () or (isinstance(value, int) and value < 1):
            raise ValueError(f"{name} is {value}; at least one is needed.")
    subsets = read_prompts(config)
    studies = detoxification.start(
        config,
        ("toxic",),
        max_new_tokens=config.max_new_tokens,
        top_k=None,
        top_p=config.top_p,
    )
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
        shown = {caption: tables.markdown(lines, digits=3)}
        title = "Figure 13: RealToxicityPrompts"
        tables.write(config.out, title, shown, results, NOTE)
    return results


def read_prompts(config: Config) -> dict[str, list[str]]:
    """The texts of the two subsets, "challenging" and "random"."""
    with tempfile.TemporaryDirectory() as name:
        file = config.prompts
        if config.smoke:
            file = tiny_text.write_comments(Path(name))["prompts"]
        lines = [line for line in detoxify.read(file).split("\n") if line.strip()]
    try:
        found = [json.loads(line) for line in lines]
        texts = [row["prompt"]["text"] for row in found]
        challenging = [row["prompt"]["text"] for row in found if row["challenging"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: {error!r}. Expected an object per line, such as "
            '{"prompt": {"text": "..."}, "challenging": false}.'
        ) from error
    if not challenging:
        raise ValueError(f"{file} has no prompt that is challenging.")
    order = np.random.default_rng(config.seed).permutation(len(texts))
    chosen = [texts[i] for i in sorted(order[: config.random_prompts])]
    return {"challenging": challenging, "random": chosen}


def row(config: Config, study, subsets, tau: Params, coef: float) -> dict:
    """The measures of one model at one coefficient."""
    line = {"model": study.name, "coef": coef}
    for subset, prompts in subsets.items():
        written = continuations(config, study, prompts, tau, -coef)
        line[subset] = expected_maximum(study.toxic.scores(written), config.generations)
    found = detoxification.perplexity(study, tau, -coef)
    # Of a broken model it is infinite, which JSON cannot say.
    return {**line, "perplexity": found if np.isfinite(found) else None}


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
    config: Config, study, prompts: list[str], tau: Params, coef: float
) -> list[str]:
    """Continuations without their prompts, those of a prompt one after the other."""
    tokenizer, model = study.toxic.tokenizer, study.toxic.model
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
    size, written = config.generation_batch, []
    # The last batch is filled up with its texts again: no other shape is compiled.
    rows = np.resize(np.arange(len(ids)), math.ceil(len(ids) / size) * size)
    state, key = jax.device_put(model.moved(tau, coef)), jax.random.key(config.seed)
    batches = rows.reshape(-1, size)
    for i, batch in enumerate(tqdm(batches, desc="texts", unit="batch", leave=False)):
        new = generate.generate(
            model.decoder,
            state,
            *(ids[batch], mask[batch]),
            max_new_tokens=config.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            temperature=1.0,
            top_p=config.top_p,
            key=jax.random.fold_in(key, i),
        )
        written += tokenizer.batch_decode(np.asarray(new), skip_special_tokens=True)
    return written[: len(ids)]


if __name__ == "__main__":
    # Full float32 on accelerators too: a task vector is a small difference.
    with jax.default_matmul_precision("float32"):
        main(tyro.cli(Config))
