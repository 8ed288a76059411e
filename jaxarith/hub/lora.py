"""Reads LoRA adapters in the folders of PEFT as task vectors, and writes them.

`adapter_config` reads the configuration of an adapter and `adapter_tensors` its file.
`adapter_reading` computes from both what the adapter adds to a base.
"""

import json
import os
from pathlib import Path

import numpy as np

from jaxarith import tree
from jaxarith.hub import adapter_names, download, folders, places, writing
from jaxarith.hub.adapter_config import CONFIG as CONFIG
from jaxarith.hub.adapter_reading import Adapter as Adapter
from jaxarith.hub.adapter_reading import read_adapter as read_adapter
from jaxarith.hub.adapter_tensors import PREFIX
from jaxarith.typing import Tree

# Names of the factors beside a kernel in a parameter tree, see `models.lora`.
FACTOR_A, FACTOR_B = "lora_a", "lora_b"


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model.

    Args:
      folder: the path of a folder, which need not exist.
    """
    return (Path(folder) / CONFIG).is_file()


def save_adapter(
    folder: str | os.PathLike, factors: Tree, base: str | os.PathLike, *, alpha: float
) -> None:
    """Writes factors as a LoRA adapter that PEFT loads on top of a checkpoint.

    `peft.PeftModel.from_pretrained(model, folder)` finds the layers by name, so `model`
    must have the class that the checkpoint's config.json states. For example, names
    begin with `bert.encoder.` in a model with a head, and with `encoder.` otherwise.

    Args:
      folder: a folder that does not exist yet. It appears whole or not at all.
      factors: pairs of leaves `lora_a` `[in, r]` and `lora_b` `[r, out]`, with or
        without their kernels, as `models.lora` makes them; other leaves are left out.
      base: the checkpoint that was adapted: a folder, or an id on the Hugging Face Hub.
        The adapter uses its tensors' names, and PEFT's config names it.
      alpha: the scale α. The rank is that of the factors.

    Raises:
      FileExistsError: the folder exists.
      ValueError: there are no factors, they differ in rank, or do not fit the base.

    Example:
      >>> save_adapter("my_lora", params, base, alpha=16)  # doctest: +SKIP
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Name a new folder.")
    pairs = _factors_by_module(factors)
    ranks = {a.shape[-1] for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise ValueError(
            f"the factors have the ranks {sorted(ranks)}; expected lora_a and lora_b "
            "of one rank, as `models.lora.init` makes them."
        )
    base_folder = download.find(base)
    _, tensors = folders.open_tensors(base_folder)
    names, _ = adapter_names.fit(
        folder, {f"{module}.weight" for module in pairs}, tensors
    )
    outer = _outer_name(folders.read_json(base_folder))
    targets, found = [], {}
    for module, pair in pairs.items():
        target = names[f"{module}.weight"].removesuffix(".weight").removeprefix(outer)
        targets.append(target)
        for side, factor in zip("AB", pair, strict=True):
            # PyTorch's matrices are [out, in].
            found[f"{PREFIX}{target}.lora_{side}.weight"] = factor.T
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with places.staging(folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        text = json.dumps(config, indent=2) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        writing.save_tree(new / folders.ADAPTER, found, {"format": "pt"})
        read_adapter(new, tensors)  # shapes are checked before anything appears
        places.publish(new, folder, None, temporary / "old")


def _outer_name(config):
    """Returns the prefix that files may add to the names of a base model's modules.

    A `BertModel` has a module `encoder`. In the file it is named `bert.encoder` if a
    model with a head, or `save`, wrote the file.
    """
    [architecture, *_] = config.get("architectures") or [""]
    return f"{config.get('model_type')}." if architecture.endswith("Model") else ""


def _factors_by_module(factors):
    """Returns A and B by the module's name, with dots."""
    leaves = tree.flatten(factors)
    return {
        path.removesuffix(f"/{FACTOR_A}").replace("/", "."): (
            np.asarray(a),
            np.asarray(leaves[path.removesuffix(FACTOR_A) + FACTOR_B]),
        )
        for path, a in leaves.items()
        if path.endswith(f"/{FACTOR_A}")
    }
