"""Chooses the weight λ of τJp for GLUE with T5, by validation scores of the sum.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix B.1, "chosen on CoLA among 0.001, 0.01 and 0.1".

    python -m experiments.tau_jp.choose_glue_coef --out runs/glue_coef
    python -m experiments.tau_jp.choose_glue_coef --penalty-norm l2 --penalty-power 2 \\
        --penalty-coefs 1e-5 1e-4 1e-3 1e-2

For every candidate λ, the script trains a linearised vector of each of the four tasks
and adds them at coefficient 1. It chooses the λ with the best validation score of the
sum: on CoLA, as in the paper, or on all tasks with `--choose-on mean`. The first wins
if several are equal. No test data are used. Data and model are those of `table3_glue`,
which reads the chosen vectors from the bank when it gets the same --penalty-coef.
"""

import dataclasses
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.common import planning, script, tables, training
from experiments.common.language import t5_glue
from jaxarith import task_vectors

METHOD = "tau_jp_cyclic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(t5_glue.Options):
    """Choose λ of τJp for four GLUE tasks."""

    coefs: tuple[float, ...] = (1.0,)
    """The coefficient of the sum: one value, by default 1 as in Table 8."""
    penalty_coefs: tuple[float, ...] = (0.001, 0.01, 0.1)
    """Candidate values of λ."""
    choose_on: Literal["cola", "mrpc", "rte", "sst2", "mean"] = "cola"
    """The task whose validation score decides, or their mean."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    check(config)
    if planning.recorder():
        raise ValueError(
            "this script has no plan. For every candidate it costs as much as the row "
            "of τJp in table3_glue --plan."
        )
    study, rows = t5_glue.start(config), []
    for coef in tqdm(config.penalty_coefs, desc="λ", unit="candidate"):
        own = dataclasses.replace(study.config, penalty_coef=coef)
        folder = t5_glue.candidate(METHOD, coef)
        wanted = t5_glue.wanted(own, study.base, study.tasks, METHOD, folder)
        network = t5_glue.trainer(study, METHOD)
        taus = training.vectors(own, network, wanted)
        total = [task_vectors.add(taus)] * len(taus)
        found = t5_glue.token_scores(study, METHOD, total, "validation")(
            config.coefs[0]
        )
        alone = t5_glue.token_scores(study, METHOD, taus, "validation")(1.0)
        scores = dict(zip(t5_glue.TASKS, map(float, found), strict=True))
        mean = {"mean": float(np.mean(found)), "each alone": float(np.mean(alone))}
        rows.append({"λ": coef} | {k: 100 * v for k, v in (scores | mean).items()})
    best = max(rows, key=lambda row: row[config.choose_on])
    results = {"rows": rows, "chosen": {"--penalty-coef": best["λ"]}}
    caption = (
        f"Validation token scores of the sum at coefficient {config.coefs[0]:g}, in "
        f"percent. Chosen on {config.choose_on}: λ = {best['λ']:g}."
    )
    return tables.write(config.out, "λ of τJp for GLUE", {caption: rows}, results)


def check(config: Config):
    """Raises a ValueError if the candidates cannot be compared."""
    possible = all(0 < coef < float("inf") for coef in config.penalty_coefs)
    if not possible or len(set(config.penalty_coefs)) < len(config.penalty_coefs):
        raise ValueError(
            f"--penalty-coefs {config.penalty_coefs}: expected numbers above 0, each "
            "only once."
        )
    if len(config.coefs) != 1:
        raise ValueError(
            f"--coefs {config.coefs}: expected one coefficient of the sum. Give "
            "candidates of λ by --penalty-coefs."
        )


if __name__ == "__main__":
    script.run(Config, main)
