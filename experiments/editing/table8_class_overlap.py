"""Table 8: forgetting, with a control that shares no class with the task.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: Appendix B.5.

    python -m experiments.editing.table8_class_overlap --data-dir DATA

Data: Cars, SUN397 and ImageNet. The vectors in the bank are used. WordNet 3.0 decides
which classes are left out: for Cars those below "wheeled vehicle", for SUN397 those
below "structure" or "geological formation". This needs `pip install nltk` and `python
-m nltk.downloader wordnet`. Alternatively, --excluded names a JSON file with names of
the control's classes, {"stanford_cars": ["minivan", ...], ...}.

Published, accuracy on the target / on the control, in percent:

    filtering  task           method                ViT-L-14
    no         stanford_cars  Pre-trained           77.8 / 75.5
    no         stanford_cars  Fine-tuned            92.8 / 73.1
    no         stanford_cars  Negative task vector  32.0 / 72.4
    no         sun397         Pre-trained           68.3 / 75.5
    no         sun397         Fine-tuned            82.4 / 72.7
    no         sun397         Negative task vector  50.8 / 72.6
    yes        stanford_cars  Pre-trained           77.8 / 75.5
    yes        stanford_cars  Fine-tuned            92.8 / 73.3
    yes        stanford_cars  Negative task vector  32.0 / 72.5
    yes        sun397         Pre-trained           68.3 / 76.1
    yes        sun397         Fine-tuned            82.4 / 73.1
    yes        sun397         Negative task vector  48.1 / 72.4

The paper says "We measure accuracy on a subset of classes". We leave out the images of
the other classes, and their names among the options. The coefficient is chosen again
with the filtered control; the two target accuracies of SUN397 show that the paper does
so too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import script, tables
from experiments.common.vision import options, raw_tasks, setups, vectors
from experiments.editing import custom, forgetting
from jaxarith.data import task_info

# WordNet nodes by task; classes of the control below them are left out.
NODES = {
    "stanford_cars": ("wheeled_vehicle.n.01",),
    "sun397": ("structure.n.01", "geological_formation.n.01"),
}
PUBLISHED = tables.published_by_column(__doc__, "filtering", "task", "method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.LargeModel):
    tasks: tuple[str, ...] = ("stanford_cars", "sun397")
    """The tasks that are forgotten."""
    excluded: Path | None = None
    """JSON file with the control's classes that each task leaves out; by default
    WordNet decides."""


def below(nodes: Sequence[str]) -> set[str]:
    """Returns the ids (for example n04285008) of WordNet's nouns at or below nodes.

    Raises:
      ValueError: NLTK or its copy of WordNet is not installed.
    """
    try:
        from nltk.corpus import wordnet

        roots: list[Any] = [wordnet.synset(node) for node in nodes]
    except (ImportError, LookupError) as error:
        raise ValueError(
            "WordNet is not installed. Run pip install nltk && python -m "
            "nltk.downloader wordnet, or name the classes by --excluded."
        ) from error
    found = {s for root in roots for s in root.closure(lambda s: s.hyponyms())}
    return {f"n{synset.offset():08d}" for synset in {*found, *roots}}


def read(file: Path) -> Mapping[str, Sequence[str]]:
    """Reads the classes of --excluded by task.

    Raises:
      ValueError: the file is not a JSON object.
    """
    text = file.read_text(encoding="utf-8")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'{file}: expected JSON, {{"task": ["class", ...], ...}}; {error}.'
        ) from error


def excluded_classes(config: Config, classes: Sequence[str]) -> dict[str, set[int]]:
    """Returns for every task the labels of the control that are left out.

    Raises:
      ValueError: a task leaves out no class or all classes, or a name is unknown.
    """
    tasks = [spec.partition("=")[0] for spec in config.tasks]
    if config.smoke:
        return {task: {1, 3} for task in tasks}
    if config.excluded is None:
        unknown = [task for task in tasks if task not in NODES]
        if unknown or config.control != "imagenet":
            raise ValueError(
                f"the classes that {config.control} shares with {unknown or tasks} "
                "are not known. Name them by --excluded."
            )
        ids = [labels[0] for labels in task_info.TASKS["imagenet"].labels]
        theirs = {task: below(NODES[task]) for task in tasks}
        found = {
            task: {i for i, own in enumerate(ids) if own in nodes}
            for task, nodes in theirs.items()
        }
    else:
        raw = read(config.excluded)
        names = {name for task in tasks for name in raw.get(task, [])}
        if wrong := sorted(names - set(classes)):
            raise ValueError(
                f"{config.excluded}: {config.control} has no classes {wrong}. Use "
                "names of its classes."
            )
        found = {
            task: {classes.index(name) for name in raw.get(task, [])} for task in tasks
        }
    for task, labels in found.items():
        if not 0 < len(labels) < len(classes):
            raise ValueError(
                f"{task} leaves out {len(labels)} of {len(classes)} classes; expected "
                "at least one, and not all."
            )
    return found


def filtered(
    setup: setups.Setup, split: setups.Dataset, excluded: set[int]
) -> setups.Dataset:
    """Returns a split without some classes, in its images and in its options."""
    kept = [i for i in range(len(split.head)) if i not in excluded]
    source = custom.some_classes(split.source, kept)
    head = split.head[np.array(kept)]
    return setups.dataset(source, head, setup.preprocess, setup.options)


def rows_of(setup: setups.Setup, excluded: Mapping[str, set[int]]) -> list[dict]:
    """Returns the rows: first without filtering, then with it."""
    taus = vectors.vectors(setup, "nonlinear")
    rows = []
    for filtering in ("no", "yes"):
        for task, tau in zip(setup.tasks, taus, strict=True):
            control = setup.required_control
            out = excluded[task.name] if filtering == "yes" else set()
            if out:
                control = control._replace(
                    validation=filtered(setup, control.validation, out),
                    test=filtered(setup, control.test, out),
                )
            own = setup._replace(tasks=[task], control=control)
            for method, found in forgetting.models(own, [tau]).items():
                [[target, control]], [coef] = found[0].tolist(), found[1]
                row = {"model": setup.title, "filtering": filtering}
                row |= {"classes left out": len(out), "task": task.name}
                row |= {"method": method, "coefficient": coef}
                rows.append(row | {"target": target, "control": control})
    return rows


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config, tasks=options.SMOKE[:2])
    raw = raw_tasks.named(config.control, config)
    excluded = excluded_classes(config, list(raw.classes))
    setup = setups.load(config, config.model)
    rows = rows_of(setup, excluded)
    return tables.compared(
        config.out,
        "Class overlap (editing paper, Table 8)",
        "Test accuracy on the target and on the control, percent.",
        rows,
        PUBLISHED,
        keys=["model", "filtering", "classes left out", "task", "method"],
        published_keys=["model", "filtering", "task", "method"],
        values=["target", "control"],
        results={
            "excluded": {
                task: [raw.classes[i] for i in sorted(labels)]
                for task, labels in excluded.items()
            }
        },
    )


if __name__ == "__main__":
    script.run(Config, main)
