"""Table 16 (bases paper): do vectors resemble by task, or by the form of the prompt?

Zeng et al. Efficient Model Editing with Task Vector Bases: A Theoretical Framework and
Scalable Approach. arXiv:2502.01015: Appendix D.4.

    python -m experiments.bases.table16_prompt_robustness --data-dir DATA

The prompt of SST-2 has one sentence. Here it is trained with a prompt of two, which has
the sentence before and after the mask: "[S1] It was [MASK]. [S1]". CR and MNLI keep
their own prompts, with one and with two sentences.
`experiments.common.language.prompted` describes the fine-tuning of RoBERTa-base. The
vectors of CR and MNLI are shared with the other scripts.

Data: GLUE from the Hugging Face Hub; CR as a file of LM-BFF's datasets.tar, unpacked in
DATA; or any files, see --help.

Published (SST2Adv is the adversarial prompt):

    first  second   cosine
    MNLI   SST2Adv  0.0075
    MNLI   CR       0.0080
    CR     SST2Adv  0.0627

The rows of SST-2 with its own prompt are ours. The paper's text prints the template
with a full stop after the second sentence, which may only end the text; here the
template has none.
"""

import dataclasses

import numpy as np

from experiments.common import planning, script, tables
from experiments.common.language import prompted, prompted_plan
from jaxarith import task_vectors

TEMPLATE = "{text} It was {mask}. {text}"
PUBLISHED = tables.published(__doc__, "first", "second")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompted.Options):
    """Table 16 (bases paper): cosines of vectors, one with an adversarial prompt."""

    tasks: tuple[str, ...] = ("MNLI", "CR", "SST2")
    """Three tasks: one with two sentences, one with one sentence, and the one whose
    prompt is changed. Names of the paper's list (Appendix D.3), or NAME=FILE."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    config = prompted.smoke(config, ("QNLI", "CR", "SST2"))
    if len(config.tasks) != 3:
        raise ValueError(f"--tasks names {config.tasks}; expected three tasks.")
    if record := planning.recorder():
        plan(config, record)
        return {}
    last = config.tasks[2]
    adversarial = f"{last.partition('=')[0]}Adv"
    setup = prompted.load(config, changed={adversarial: (last, TEMPLATE)})
    taus = prompted.vectors(setup)
    cosines = np.asarray(task_vectors.cosine_matrix(taus), float)
    pairs, one, changed, _ = setup.names
    index = {name: i for i, name in enumerate(setup.names)}
    rows = [
        {"first": a, "second": b, "cosine": float(cosines[index[a], index[b]])}
        for a, b in (
            (pairs, adversarial),
            (pairs, one),
            (one, adversarial),
            (pairs, changed),
            (one, changed),
            (changed, adversarial),
        )
    ]
    results = {"tasks": setup.names, "cosines": cosines.tolist(), "rows": rows}
    beside = tables.beside(rows, PUBLISHED, keys=["first", "second"], values=["cosine"])
    captions = {"Cosines of task vectors.": beside}
    note = f"{adversarial} is {changed} with the prompt “{TEMPLATE}”."
    title = "Prompts and task vectors (bases, Table 16)"
    return tables.write(config.out, title, captions, results, note, digits=4)


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors to the plan; the last task has two prompts."""
    prompted_plan.vectors(record, config, again=config.tasks[2:])


if __name__ == "__main__":
    script.run(Config, main)
