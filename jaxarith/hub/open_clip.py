"""Opens OpenCLIP's checkpoints, whose tensors have the names of OpenAI's code.

The tensors are returned under the names and in the orientations of transformers'
`CLIPModel`, and the configuration as its `config.json`. Ilharco et al. OpenCLIP. 2021.
doi:10.5281/zenodo.5143773.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from jaxarith.hub import checks, folders, pickles, safetensors
from jaxarith.hub.stored import Stored

HiddenAct: TypeAlias = Literal["quick_gelu", "gelu"]
HIDDEN_ACTS: tuple[HiddenAct, ...] = get_args(HiddenAct)

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"

# transformers' names by OpenCLIP's: first of modules, then of single parameters.
_MODULES = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_PARAMETERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
# These matrices are [in, out]; transformers has linear layers instead.
_PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_FUSED = "attn.in_proj"  # rows of queries, keys and values
_FIRST = "visual.conv1.weight"
_POSITIONS = "embeddings.position_embedding.weight"
# Only OpenAI's own files store these three numbers as tensors.
_OF_OPENAI = {"input_resolution", "context_length", "vocab_size"}
_NOT_WEIGHTS = {"attn_mask", *_OF_OPENAI}

# Keys of a configuration that change nothing in the architecture except sizes.
_KNOWN = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {
        *("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"),
        "patch_dropout",  # used in training only
    },
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
# All published CLIPs of these widths have heads of 64. ViT-H, g and G have others.
_HEADS_OF_64 = (512, 768, 1024)


def weights_of(place: Path) -> Path | None:
    """Returns the file of OpenCLIP's weights in a folder; a file is returned as it is.

    Returns None if a folder has no such file, or also holds transformers' format.
    """
    if place.is_file():
        return place
    held = {path.name for path in place.iterdir() if path.is_file()}
    file = next((place / name for name in WEIGHTS if name in held), None)
    if file is None or not held & {folders.WEIGHTS, folders.INDEX, folders.MSGPACK}:
        return file
    # A model.safetensors without model_type is timm's image tower.
    of_transformers = folders.CONFIG in held and "model_type" in folders.read_json(
        place
    )
    return None if of_transformers else file


class File(NamedTuple):
    """A file of OpenCLIP.

    Attributes:
      path: path of the file.
      tensors: the tensors under transformers' names.
      is_openai: whether it is one of OpenAI's own files, which store sizes as tensors.
    """

    path: Path
    tensors: dict[str, Stored]
    is_openai: bool


def open_file(path: Path) -> File:
    """Opens a file of OpenCLIP's weights; safetensors are not read yet.

    The file may hold only the image tower, and all names may begin with `model.` or
    `module.`. Names that OpenCLIP does not have are kept.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: the file is PyTorch's, and PyTorch is not installed.
      ValueError: the file cannot be read as tensors, or has another architecture.
    """
    stored = _opened(path)
    return File(path, _renamed(stored, path), stored.keys() >= _OF_OPENAI)


def read_config(file: File, hidden_act: HiddenAct | None = None) -> dict[str, Any]:
    """Returns the content of transformers' `config.json` for the model in a file.

    Sizes come from the tensors. The tensors do not show the number of heads or the
    activation. They are read from `open_clip_config.json` beside the file; as in
    OpenCLIP, the activation is `gelu` there unless `quick_gelu` is true. Without that
    file, heads are 64 wide (only in widths where this holds for all models), OpenAI's
    own files have `quick_gelu`, and for other files `hidden_act` must be given.

    Args:
      file: the result of `open_file`.
      hidden_act: the activation, if nothing states it.

    Raises:
      ValueError: the file lacks one of the two towers; or nothing states the activation
        or the number of heads; or a stated value contradicts `hidden_act` or is not
        supported.
    """
    stated = _stated(file.path)
    act = _activation(file, stated, hidden_act)
    vision, text = stated.get("vision_cfg", {}), stated.get("text_cfg", {})
    shared = _size(file, "visual_projection.weight", 0)
    patches = _size(file, f"vision_model.{_POSITIONS}", 0) - 1
    patch = _size(file, "vision_model.embeddings.patch_embedding.weight", 2)
    width = _size(file, f"vision_model.{_POSITIONS}", 1)
    of_images = width // vision.get("head_width", 64) if vision else None
    of_texts = text.get("heads", 8) if text else None
    common = {"hidden_act": act, "projection_dim": shared}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": shared,
        "text_config": {
            **common,
            **_tower(file, "text_model", of_texts),
            "max_position_embeddings": _size(file, f"text_model.{_POSITIONS}", 0),
            "vocab_size": _size(
                file, "text_model.embeddings.token_embedding.weight", 0
            ),
            # With this id, transformers does what OpenCLIP does: the largest id ends a
            # text.
            "eos_token_id": 2,
        },
        "vision_config": {
            **common,
            **_tower(file, "vision_model", of_images),
            "image_size": math.isqrt(patches) * patch,
            "patch_size": patch,
        },
    }


def _tower(file: File, name: str, heads: int | None) -> dict[str, Any]:
    """Returns the sizes of a tower; `heads` is None if nothing states their number."""
    width, layers = _size(file, f"{name}.{_POSITIONS}", 1), 0
    while f"{name}.encoder.layers.{layers}.mlp.fc1.weight" in file.tensors:
        layers += 1
    if heads is None and width not in _HEADS_OF_64:
        raise ValueError(
            f"nothing states how many heads the model in {file.path} has; its width is "
            f"{width}. Put the model's {CONFIG} beside the file."
        )
    return {
        "hidden_size": width,
        "intermediate_size": _size(file, f"{name}.encoder.layers.0.mlp.fc1.weight", 0),
        "num_attention_heads": heads or width // 64,
        "num_hidden_layers": layers,
    }


def _size(file: File, name: str, axis: int) -> int:
    shape = file.tensors[name].shape if name in file.tensors else ()
    if len(shape) <= axis:
        raise ValueError(
            f"{file.path} has no {name} with {axis + 1} or more dimensions, so it is "
            "not a whole CLIP. Give a file with both towers."
        )
    return shape[axis]


def preprocessing(folder: Path, image_size: int | None = None) -> dict[str, Any]:
    """Returns the content of transformers' `preprocessor_config.json` for a model.

    Means and deviations are those of `open_clip_config.json`, or else OpenAI's.

    Args:
      folder: the folder of the model.
      image_size: pixels of an edge; by default the size in `open_clip_config.json`.

    Raises:
      KeyError: nothing states the size.
      ValueError: the model resizes images in a way that jaxarith does not support.
    """
    config = folder / CONFIG
    raw = folders.read_json(folder, CONFIG) if config.is_file() else {}
    if image_size is None:
        image_size = raw["model_cfg"]["vision_cfg"]["image_size"]
    stated = raw.get("preprocess_cfg", {})
    ways = {"interpolation": "bicubic", "resize_mode": "shortest"}
    for key, value in ways.items():
        if stated.get(key, value) != value:
            raise ValueError(
                f"{config} states {key} {stated[key]!r}; jaxarith supports only "
                f"{value!r}."
            )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "resample": 3,  # bicubic
        "image_mean": stated.get("mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": stated.get("std", [0.26862954, 0.26130258, 0.27577711]),
    }


def _opened(path):
    pickled = path.suffix in pickles.SUFFIXES
    stored = pickles.open_file(path) if pickled else safetensors.open_file(path)[0]
    checks.check_numeric(stored)
    first = min((name for name in stored if name.endswith(_FIRST)), key=len, default="")
    if not first:
        raise ValueError(
            f"{path} has no {_FIRST}: it is not a CLIP with a vision transformer in "
            "OpenCLIP's format. For a model of transformers, name its folder."
        )
    prefix = first.removesuffix(_FIRST)
    return {name.removeprefix(prefix): leaf for name, leaf in stored.items()}


def _renamed(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, leaf in stored.items():
        if name in _NOT_WEIGHTS:
            continue
        for new, part in _parts(name, leaf):
            if new in found:
                raise ValueError(f"{path} has two tensors that would both be {new}.")
            found[new] = part
    return found


def _parts(name, leaf):
    """Returns a tensor under its new name, or its parts under theirs."""
    module, _, last = name.rpartition(".")
    if name in _PARAMETERS:
        return [(_PARAMETERS[name], leaf)]
    if name in _PROJECTIONS and len(leaf.shape) == 2:
        return [(_PROJECTIONS[name], _transposed(leaf))]
    if module in _MODULES:
        return [(f"{_MODULES[module]}.{last}", leaf)]
    if block := _BLOCK.fullmatch(name):
        tower = "vision_model" if block[1] else "text_model"
        place, inner, last = f"{tower}.encoder.layers.{block[2]}", block[3], block[4]
        if inner in _IN_BLOCKS:
            return [(f"{place}.{_IN_BLOCKS[inner]}.{last}", leaf)]
        if inner == _FUSED and leaf.shape and leaf.shape[0] % 3 == 0:
            return [
                (f"{place}.self_attn.{role}_proj.{last}", _third(leaf, i))
                for i, role in enumerate("qkv")
            ]
    return [(name, leaf)]


def _transposed(leaf):
    return Stored.made(leaf.dtype, leaf.shape[::-1], lambda: leaf.read().T)


def _third(leaf, i):
    rows = leaf.shape[0] // 3
    part = slice(i * rows, (i + 1) * rows)
    return Stored.made(leaf.dtype, (rows, *leaf.shape[1:]), lambda: leaf.read()[part])


def _stated(path: Path) -> Mapping[str, Any]:
    """Returns the model's part of `open_clip_config.json`; empty without that file."""
    place = path.parent / CONFIG
    if not place.is_file():
        return {}
    model = folders.read_json(path.parent, CONFIG).get("model_cfg")
    for part, known in _KNOWN.items():
        stated = model if part == "model_cfg" else (model or {}).get(part)
        if not isinstance(stated, Mapping):
            raise ValueError(
                f"{place} has no {part}, so it does not describe a CLIP of OpenCLIP."
            )
        other = sorted(key for key, value in stated.items() if value)
        if other := [key for key in other if key not in known]:
            raise ValueError(
                f"{place} states {', '.join(other)} in {part}, which jaxarith's CLIP "
                "does not support."
            )
    return model or {}


def _activation(file: File, stated, given: HiddenAct | None) -> HiddenAct:
    if stated:
        found, where = "quick_gelu" if stated.get("quick_gelu") else "gelu", CONFIG
    elif file.is_openai:
        found, where = "quick_gelu", "its tensors, as all of OpenAI's,"
    elif given is None:
        raise ValueError(
            f"nothing states the activation of the model in {file.path}. OpenAI's "
            "models and those that OpenCLIP calls quickgelu have quick_gelu, the "
            "others gelu. The wrong one costs accuracy without an error. Put the "
            f"model's {CONFIG} beside the file, or give hidden_act (jaxarith convert "
            "--hidden-act)."
        )
    else:
        return given
    if given not in (None, found):
        raise ValueError(
            f"{file.path} has {found} according to {where}, but hidden_act is {given}."
        )
    return found
