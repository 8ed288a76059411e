"""Adds RoBERTa classifiers that others have fine-tuned on GLUE to the bank.

The head of such a model has one output per class of its task; the model may name their
order. Here a head has enough outputs for all tasks. A task uses the first ones, in
GLUE's order.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common import external
from jaxarith import hub, task_vectors, tree
from jaxarith.data import glue
from jaxarith.models import bert
from jaxarith.typing import Params

_OUTPUT = r"classifier/(out_proj/)?(kernel|bias)"  # RoBERTa's and BERT's
_HARMLESS = ("num_labels", "initializer_range")


def load(
    model: str,
    task: glue.Task,
    config: bert.BertConfig,
    params_0: Params,
    *,
    method: str,
    identity: int,
    encoder: str,
) -> external.External:
    """Returns a fine-tuned classifier minus the pre-trained model with its fresh head.

    Args:
      model: a folder, or a hub id, of a model with a classification head.
      task: the task that it was fine-tuned on.
      config: configuration of the pre-trained model.
      params_0: its parameters with the fresh head, on the host.
      method: the folder in the bank.
      identity: the fingerprint of `params_0`.
      encoder: pattern of the parameters that both models have.

    Raises:
      FileNotFoundError: the model does not exist.
      ValueError: it has no classification head, its classes differ from the task's, or
        it is not a fine-tuned copy of the pre-trained model.
    """
    found = bert.load(model, head="classifier")
    _check_config(found.config, config, model)
    raw = hub.read_json(found.folder)
    columns, notes = _columns(raw, found.config.num_labels, task, model)
    start = tree.flatten(params_0)
    theirs = tree.flatten(found.params)
    tuned = {}
    for path, leaf in start.items():
        if re.fullmatch(_OUTPUT, path):  # [D, outputs] or [outputs]
            leaf = np.array(leaf)
            leaf[..., : len(columns)] = theirs[path][..., columns]
            tuned[path] = leaf
        else:
            tuned[path] = theirs[path]
    params = tree.unflatten(tuned)
    tau = task_vectors.difference(params, params_0)
    external.check_near(
        tree.select(tau, encoder),
        tree.select(params_0, encoder),
        f"{model} and the pre-trained model",
    )
    return external.External(
        tau, external.configuration(model, params, method, identity), notes
    )


def _check_config(own: bert.BertConfig, base: bert.BertConfig, model: str) -> None:
    ours, theirs = (dataclasses.asdict(config) for config in (base, own))
    different = [
        f"{key} is {theirs[key]}, expected {ours[key]}"
        for key in ours
        if key not in _HARMLESS and theirs[key] != ours[key]
    ]
    if different:
        raise ValueError(
            f"{model} is no fine-tuned copy of the pre-trained model: "
            f"{'; '.join(different)}. Set --models to the model that it started from."
        )


def _columns(
    raw: Mapping[str, Any], count: int, task: glue.Task, model: str
) -> tuple[list[int], list[str]]:
    """Returns the output of the model for each of GLUE's classes, and notes."""
    expected = len(task.classes) or 1
    if count != expected:
        raise ValueError(
            f"{model} has {count} outputs, and {task.name} needs {expected}. Name a "
            "model that was fine-tuned on this task."
        )
    names = raw.get("id2label") or {}
    named = [_plain(names.get(str(i), f"label_{i}")) for i in range(count)]
    wanted = [_plain(name) for name in task.classes]
    if sorted(named) == sorted(wanted):
        return [named.index(name) for name in wanted], []
    if count == 1:
        return [0], []
    if named != [f"label_{i}" for i in range(count)]:
        raise ValueError(
            f"{model} has the classes {', '.join(named)}, and {task.name} has "
            f"{', '.join(wanted)}. Use the same names in id2label of its config.json."
        )
    note = (
        f"{model} does not name its classes; the order {', '.join(wanted)} is assumed"
    )
    return list(range(count)), [note]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower())
