"""Figure 12: forgetting to read text (OCR), and to recognise persons.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: Appendix B.8.

    python -m experiments.editing.figure12_more_tasks --persons persons=FOLDER \\
        --data-dir DATA

Data: SUN397 for OCR: names of other classes are written on its images, to be read.
ImageNet is the control. Persons come from a folder, FOLDER/<split>/<person>/. The paper
uses the Celebrity Face Recognition data set with around a thousand persons, split in
0.8, 0.1 and 0.1. Without --persons that half is left out.

Coefficients are chosen as in `table1_forgetting`. The paper states neither the fonts,
places and colours of the text nor the prompts; they are ours.

Published, as bars only: "especially for the larger CLIP models, negating the task
vectors leads to large drops in performance with little change in accuracy on ImageNet";
for persons "forgetting is less effective".
"""

import dataclasses

from experiments.common import runs, script, tables
from experiments.common.vision import options, raw_tasks, setups, vectors
from experiments.editing import custom, forgetting, ocr
from jaxarith import plots
from jaxarith.models import clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    tasks: tuple[str, ...] = ("sun397",)
    """Tasks for OCR: names of their classes are written on their images."""
    persons: str | None = None
    """A task of persons, NAME=FOLDER."""


def with_tasks(setup: setups.Setup, config: Config) -> setups.Setup:
    """Returns the setup with the OCR tasks and the persons as its tasks."""
    checkpoint = clip.load(setup.model)
    raw = [ocr.reading(raw_tasks.named(spec, config)) for spec in config.tasks]
    if config.persons:
        raw.append(raw_tasks.named(config.persons, config))
    tasks = [custom.prepared(setup, checkpoint, task) for task in raw]
    return setup._replace(tasks=tasks)


def rows_of(setup: setups.Setup) -> list[dict]:
    """Returns the rows of one model."""
    models = forgetting.models(setup, vectors.vectors(setup, "nonlinear"))
    rows = []
    for i, title in enumerate(setup.titles):
        for method, (pairs, coefs) in models.items():
            target, control = pairs[i].tolist()
            row = {"model": setup.title, "task": title, "method": method}
            row |= {"target": target, "control": control, "coefficient": coefs[i]}
            rows.append(row)
    return rows


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.smoke(  # a smoke run has no persons, but another small task
        config, tasks=("inverted_digits",), control="uci_digits", persons="mnist"
    )
    if config.persons:  # raises if it is missing, before anything is written
        raw_tasks.named(config.persons, config)
    runs.start(config)
    rows = setups.rows(config, lambda setup: rows_of(with_tasks(setup, config)))
    if runs.is_first():
        for task in dict.fromkeys(row["task"] for row in rows):
            own = [row for row in rows if row["task"] == task]
            models = list(dict.fromkeys(row["model"] for row in own))
            plots.bars(
                config.out / f"figure12_{task}.png",
                {
                    f"{method}, {part}": [
                        row[part] for row in own if row["method"] == method
                    ]
                    for method in dict.fromkeys(row["method"] for row in own)
                    for part in ("target", "control")
                },
                models,
                y=f"accuracy on {task} and on the control, percent",
            )
    caption = "Test accuracy on the target and on the control, percent."
    title = "OCR and persons (editing paper, Figure 12)"
    return tables.write(config.out, title, {caption: rows}, {"rows": rows}, digits=2)


if __name__ == "__main__":
    script.run(Config, main)
