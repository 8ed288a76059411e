"""Table 9: a less toxic GPT-2 by negation, the coefficient 1: θ0 - τ.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix E.5, Table 9.

    python -m experiments.tau_jp.table9_detoxification_at_one --out runs/table9 \\
        --toxic civil_comments.jsonl \\
        --perplexity-text wikitext103_test.txt --penalty-text wikitext103_train.txt
    python -m experiments.tau_jp.table9_detoxification_at_one --out runs/smoke --smoke

Data, models and protocol are those of `table4_detoxification_searched`, whose task
vectors are taken from the bank where they are there. Published:

                   toxic %   mean score   perplexity
    Pre-trained    1.3       0.03         29.4
    Non-lin. FT    0.0       0.01         95.7
    Linear FT      0.0       0.00         66.7
    TIES           0.6       0.02         87.7
    Ours           0.5       0.01         30.7

It was not run at full scale; no time is known.
"""

import dataclasses
from pathlib import Path

import jax
import tyro

from experiments.tau_jp import detoxification

PUBLISHED = {
    "Pre-trained": [1.3, 0.03, 29.4],
    "Non-lin. FT": [0.0, 0.01, 95.7],
    "Linear FT": [0.0, 0.00, 66.7],
    "TIES": [0.6, 0.02, 87.7],
    "Ours": [0.5, 0.01, 30.7],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detoxification.Config):
    """Make a GPT-2 less toxic by its whole task vector."""

    out: Path = Path("runs/tau_jp/table9")
    """Folder for report.json, report.md and the logs of training."""


def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    study = detoxification.start(config)
    methods = detoxification.METHODS
    taus = {method: detoxification.vector(study, method) for method in methods}

    rows = [detoxification.pre_trained(study)]
    for negated in detoxification.negations(study, taus):
        rows.append(detoxification.row(study, negated, 1.0))
    title = "Table 9: toxic text of GPT-2, coefficient 1"
    return detoxification.report(study, title, rows, PUBLISHED)


if __name__ == "__main__":
    # Full float32 on accelerators too: a task vector is a small difference.
    with jax.default_matmul_precision("float32"):
        main(tyro.cli(Config))
