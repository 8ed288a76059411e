"""Table 8: addition of four GLUE tasks with T5, every coefficient 1.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix E.5, Table 8.

    python -m experiments.tau_jp.table8_glue_at_one --out runs/table8
    python -m experiments.tau_jp.table8_glue_at_one --out runs/smoke --smoke

Data, model and protocol are those of `table3_glue_searched`, whose task vectors are
taken from the bank where they are there.

Published, Abs. / Norm.:

                   MRPC         RTE          CoLA         SST-2        average
    Pre-trained    31.8         5.0          7.3          32.3         19.1
    Non-lin. FT    72.2 / 77.2  90.2 / 96.3  70.3 / 91.6  57.1 / 60.4  72.5 / 81.4
    Linear FT      79.1 / 89.8  81.7 / 89.4  74.7 / 97.4  56.2 / 59.8  72.9 / 84.1
    TIES           79.0 / 84.9  60.1 / 68.2  73.2 / 95.4  69.7 / 73.9  70.5 / 80.6
    Ours           79.1 / 87.5  82.8 / 90.6  76.5 / 99.6  92.5 / 98.5  82.7 / 94.0

The paper's header says MRPC, RTE, CoLA, SST-2, and all rows but Pre-trained have CoLA
first: Abs. / Norm. of Non-lin. FT is 76.7, 93.5, 93.7, 94.5 there, and Table 3 has 76.8
for a single-task model on CoLA, 93.5 on MRPC and 93.7 on RTE. It is put right here. The
rows of TIES and Ours are those of Table 3.

It was not run at full scale; no time is known.
"""

import dataclasses
from pathlib import Path

import jax
import tyro

from experiments.common.language import t5_glue

PUBLISHED = {
    "Pre-trained": [31.8, None, 5.0, None, 7.3, None, 32.3, None, 19.1, None],
    "Non-lin. FT": [72.2, 77.2, 90.2, 96.3, 70.3, 91.6, 57.1, 60.4, 72.5, 81.4],
    "Linear FT": [79.1, 89.8, 81.7, 89.4, 74.7, 97.4, 56.2, 59.8, 72.9, 84.1],
    "TIES": [79.0, 84.9, 60.1, 68.2, 73.2, 95.4, 69.7, 73.9, 70.5, 80.6],
    "Ours": [79.1, 87.5, 82.8, 90.6, 76.5, 99.6, 92.5, 98.5, 82.7, 94.0],
}
NOTE = (
    "The paper prints all rows but the first with CoLA first, below a header that says "
    "MRPC; its columns are in order here. Norm. is relative to the single-task models "
    "of the same method, of TIES to those of Non-lin. FT."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(t5_glue.Config):
    """Add four GLUE tasks to a T5, with coefficient 1."""

    out: Path = Path("runs/tau_jp/table8")
    """Folder for report.json, report.md and the logs of training."""


def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    study = t5_glue.start(config)
    taus = {method: t5_glue.vectors(study, method) for method in t5_glue.METHODS}
    single = {
        method: t5_glue.individual(study, method, taus[method])
        for method in t5_glue.METHODS
    }

    nothing = t5_glue.scores(study, "nonlinear", taus["nonlinear"], 0.0)
    lines = t5_glue.rows("Pre-trained", 0.0, nothing, None)
    for method, name in t5_glue.METHODS.items():
        lines += t5_glue.rows(f"Individual, {name}", 1.0, single[method].test, None)
    for merged in t5_glue.merges(study, taus):
        added = [merged.tau] * len(t5_glue.TASKS)
        found = t5_glue.scores(study, merged.method, added, 1.0)
        lines += t5_glue.rows(merged.name, 1.0, found, single[merged.method].test)
    title = "Table 8: addition of four GLUE tasks, coefficient 1"
    return t5_glue.report(study, title, lines, PUBLISHED, NOTE)


if __name__ == "__main__":
    # Full float32 on accelerators too: a task vector is a small difference.
    with jax.default_matmul_precision("float32"):
        main(tyro.cli(Config))
