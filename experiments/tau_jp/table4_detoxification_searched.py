"""Table 4: a less toxic GPT-2 by negation, at the coefficient that is searched.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: section 4.2, Table 4.

    python -m experiments.tau_jp.table4_detoxification_searched --out runs/table4 \\
        --toxic civil_comments.jsonl \\
        --perplexity-text wikitext103_test.txt --penalty-text wikitext103_train.txt
    python -m experiments.tau_jp.table4_detoxification_searched --out runs/smoke --smoke

Data: Civil Comments and WikiText-103; `detoxification` beside this file says how to get
the three files, and what the protocol is. Table 9 takes the same vectors from the bank.

The coefficient is the largest of 0, 0.1, …, 3 (App. B.2) at which the perplexity is at
most 0.5 above that of the pre-trained model. Their code has candidates up to 1 and
stops at the first that is not allowed, which differs where the perplexity comes back.
Published:

                   toxic %   mean score   perplexity
    Pre-trained    1.3       0.03         29.4
    Non-lin. FT    1.1       0.02         29.7
    Linear FT      0.9       0.02         29.6
    TIES           1.0       0.02         29.6
    Ours           0.4       0.01         29.9

It was not run at full scale; no time is known.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments.tau_jp import detoxification
from jaxarith import evaluate

PUBLISHED = {
    "Pre-trained": [1.3, 0.03, 29.4],
    "Non-lin. FT": [1.1, 0.02, 29.7],
    "Linear FT": [0.9, 0.02, 29.6],
    "TIES": [1.0, 0.02, 29.6],
    "Ours": [0.4, 0.01, 29.9],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detoxification.Config):
    """Make a GPT-2 less toxic, as far as its perplexity allows."""

    out: Path = Path("runs/tau_jp/table4")
    """Folder for report.json, report.md and the logs of training."""

    coefs: tuple[float, ...] = tuple(i / 10 for i in range(31))
    """The candidates of the coefficient."""
    allowance: float = 0.5
    """How much the perplexity may rise."""


def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    if config.smoke:
        config = dataclasses.replace(config, coefs=(0.0, 0.1, 1.0))
    study = detoxification.start(config)
    methods = detoxification.METHODS
    taus = {method: detoxification.vector(study, method) for method in methods}

    rows, curves = [detoxification.pre_trained(study)], {}
    limit = rows[0]["perplexity"] + config.allowance
    negations = detoxification.negations(study, taus)
    for negated in tqdm(negations, desc="search", unit="method"):
        perplexity_at = detoxification.perplexity_at(study, negated)
        search = evaluate.search_negation(
            perplexity_at, lambda found: found <= limit, config.coefs
        )
        rows.append(detoxification.row(study, negated, search.coef))
        # Of a broken model it is infinite, which JSON cannot say.
        found = [p if np.isfinite(p) else None for p in search.controls.tolist()]
        curves[negated.name] = {"coefs": list(config.coefs), "perplexities": found}
    title = "Table 4: toxic text of GPT-2, coefficient searched"
    return detoxification.report(study, title, rows, PUBLISHED, curves)


if __name__ == "__main__":
    # Full float32 on accelerators too: a task vector is a small difference.
    with jax.default_matmul_precision("float32"):
        main(tyro.cli(Config))
