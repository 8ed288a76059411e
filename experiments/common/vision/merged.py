"""Saves the best merged network of a table for transformers: `--save-merged`.

    OUT/merged/            the CLIP with the merged image encoder
    OUT/heads.safetensors  the zero-shot heads by task; its metadata name the classes

A script on several models writes to OUT/<model>/ instead of OUT. The folder is an
ordinary network, θ0 + λ Σ τ. With linearised vectors it is not the linearised model
that the other rows of the table measure. So every candidate is measured as a network,
on validation data at every λ, and the best mean accuracy wins.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.common import bank, runs
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import hub, report, sharding, task_vectors, tree
from jaxarith.hub import open_clip
from jaxarith.models import clip
from jaxarith.typing import Params, Tree

NOTE = (
    '"Saved" is the network in the folder `merged`, θ0 + λ Σ τ. All methods were run '
    "as a network; it has the method and the λ with the best mean validation accuracy. "
    "With linearised vectors it is not the linearised model of the other rows."
)


def note(config: options.Addition) -> str:
    """Returns the note on the row of the saved network; "" without --save-merged."""
    return NOTE if config.save_merged else ""


def rows(
    setup: setups.Setup,
    methods: Mapping[str, vectors.Method],
    merges: Mapping[str, Tree] | None = None,
) -> list[dict]:
    """Writes the best network, and returns its row of the table.

    Without --save-merged it writes nothing and returns no row.

    Args:
      setup: the model and the tasks.
      methods: dict from labels to methods; the vectors of a method are added.
      merges: dict from labels to merged vectors, to be added at λ = 1.
    """
    config = setup.options
    if not (isinstance(config, options.Addition) and config.save_merged):
        return []
    sums = {
        label: task_vectors.add(vectors.vectors(setup, method))
        for label, method in methods.items()
    }
    candidates = sums | dict(merges or {})
    label, coef = best(setup, candidates)
    total = candidates[label]
    accuracies = scores.on_all(setup, [total], "test", [[coef]])[0]
    if not config.plan:
        write(setup, task_vectors.apply(setup.params_0, total, coef))
    return [
        {
            "model": setup.title,
            "method": f"Saved: {label}",
            "coefficient": f"{coef:.2f}",
            "found": coef,
            "abs": scores.means(accuracies),
            "norm": None,
            "per_task": setup.by_task(accuracies),
        }
    ]


def best(setup: setups.Setup, candidates: Mapping[str, Tree]) -> tuple[str, float]:
    """Returns the label and the λ with the best mean validation accuracy.

    The first wins if several are equal.
    """
    coefs = scores.coefs_of(setup.options, scores.COEFS)
    totals = list(candidates.values())
    grid = np.kron(np.eye(len(totals)), coefs[:, None])  # [methods · λ, methods]
    found = scores.on_all(setup, totals, "validation", grid).mean(axis=1)
    number, at = divmod(int(found.argmax()), len(coefs))
    return list(candidates)[number], float(coefs[at])


def write(setup: setups.Setup, params: Params) -> None:
    """Writes a CLIP with a merged image encoder, and the heads."""
    params = sharding.to_host(params)
    if not runs.is_first():
        return
    folder = folder_of(setup)
    model = clip.load(setup.model)
    config, preprocessing = described(setup.model)
    hub.save(
        folder / "merged",
        tree.update(model.params, params),
        config,
        copy_from=model.folder,
        overwrite=True,  # an earlier run may have written to this folder
    )
    if preprocessing is not None:
        report.write_json(folder / "merged" / "preprocessor_config.json", preprocessing)
    heads = {task.name: np.asarray(task.test.head) for task in setup.tasks}
    names = {task.name: json.dumps(classes_of(setup, task)) for task in setup.tasks}
    hub.save_tree(folder / "heads.safetensors", heads, names)
    print(f"merged model and heads: {folder}")


def folder_of(setup: setups.Setup) -> Path:
    """Returns the folder for the network: that of the run, or one folder per model."""
    config = setup.options
    several = isinstance(config, options.Models) and len(config.models) > 1
    return config.out / setup.title if several else config.out


def described(model: str) -> tuple[dict, dict | None]:
    """Returns the config.json of a CLIP, and for OpenCLIP also the preprocessing."""
    path = Path(model).expanduser()
    place = path if path.is_file() else hub.find(model)
    if (file := open_clip.weights_of(place)) is None:
        return hub.read_json(place), None
    config = open_clip.read_config(open_clip.open_file(file))
    size = config["vision_config"]["image_size"]
    return config, open_clip.preprocessing(file.parent, size)


def classes_of(setup: setups.Setup, task: setups.Task) -> list[str]:
    """Returns the names of a task's classes, which the bank stores with its head."""
    file = bank.vector_file(setup.options.bank, setup.model, "heads", task.name)
    classes, _ = json.loads(hub.load_tree(file)[1]["prompts"])
    return classes
