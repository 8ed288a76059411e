"""Adds image encoders that others have fine-tuned to the bank, as task vectors.

The checkpoints are OpenCLIP's or those of transformers: `CLIPModel`, or
`CLIPVisionModel` with or without its projection, as in the pools of fusion_bench.
Parameters that a checkpoint lacks keep the values of the pre-trained model.
"""

import dataclasses
from pathlib import Path

from experiments.common import external
from experiments.common.vision import setups, vectors
from jaxarith import hub, sharding, task_vectors, tree
from jaxarith.hub import layouts, open_clip
from jaxarith.models import clip
from jaxarith.typing import Params

METHOD = "nonlinear"
_PROJECTION = "visual_projection/kernel"
_TOWER = r"vision_model/.*"


def load(setup: setups.Setup, task: setups.Task, model: str) -> external.External:
    """Returns a fine-tuned checkpoint minus the pre-trained model.

    Args:
      setup: the pre-trained model.
      task: the task that the checkpoint was fine-tuned on.
      model: a folder, a hub id, or a file of OpenCLIP.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ImportError: its file needs PyTorch, which is not installed.
      ValueError: it is a pickled model, has another architecture, or is not a
        fine-tuned copy of this pre-trained model.
    """
    place = _place(model)
    _check_config(_place(setup.model), place, model)
    params_0 = sharding.to_host(setup.params_0)
    params, lacks = _image_encoder(place, params_0)
    tau = task_vectors.difference({**params_0, **params}, params_0)
    external.check_near(tau, params_0, f"{model} and {setup.model}")
    notes = [f"{model} has no {path}: that of {setup.model} stays" for path in lacks]
    configuration = external.configuration(model, params, METHOD, setup.identity)
    configuration |= {
        "from the base": lacks,
        "heads": vectors.identity(setup, METHOD, [task])["heads"],
    }
    return external.External(tau, configuration, notes)


def _place(model: str) -> Path:
    path = Path(model).expanduser()
    return path if path.is_file() else hub.find(model)


def _image_encoder(place: Path, params_0: Params) -> tuple[dict, list[str]]:
    """Returns the image encoder of a checkpoint, and the paths that it lacks."""
    if (file := open_clip.weights_of(place)) is not None:
        tensors = open_clip.open_file(file).tensors
    else:
        found = hub.open_checkpoint(place)
        tensors, file = found.tensors, found.file
    paths = set(tree.flatten(params_0))
    has_projection = _PROJECTION in layouts.to_flax(tensors, paths)
    select = clip.IMAGE_ENCODER if has_projection else _TOWER
    params = hub.filled(params_0, tensors, file, select=select)
    return params, [] if has_projection else [_PROJECTION]


def _check_config(base: Path, own: Path, model: str) -> None:
    """Raises a ValueError if the image towers have different configurations."""
    if open_clip.weights_of(own) is not None:
        return  # only its sizes are known, and loading compares the tensors' shapes
    ours, theirs = (dataclasses.asdict(_vision_config(x)) for x in (base, own))
    different = [
        f"{key} is {theirs[key]}, expected {ours[key]}"
        for key in ours
        if theirs[key] != ours[key]
    ]
    if different:
        raise ValueError(
            f"{model} is no fine-tuned copy of the pre-trained model: "
            f"{'; '.join(different)}. Set --model to the model that it started from."
        )


def _vision_config(place: Path) -> clip.VisionConfig:
    if (file := open_clip.weights_of(place)) is not None:
        config = open_clip.read_config(open_clip.open_file(file))
    else:
        config = hub.read_json(place)
    if "vision_config" not in config:  # the checkpoint has only the image tower
        config = {"vision_config": config, "text_config": {}}
    return clip.CLIPConfig.from_json(config).vision
