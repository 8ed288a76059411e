"""Reads and checks an `adapter_config.json` of PEFT: kind, ranks, scales."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxarith.hub import folders, patterns

CONFIG = "adapter_config.json"

# Keys that change the meaning of a file so that it cannot be merged, and why.
_UNSUPPORTED = {
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "arrow_config": "the adapter is chosen by the input",
    "kasa_config": "KaSA truncates the base's weights",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "the factors are random",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the factors see averaged inputs",
    "velora_config": "VeLoRA is not LoRA",
}
# Optional keys and the types of their values.
_KINDS: dict[str, Any] = {
    "base_model_name_or_path": str,
    "task_type": str,
    "target_parameters": list,
    "modules_to_save": list,
    "trainable_token_indices": list | dict,
}
_WORDS: dict[Any, str] = {
    str: "a name",
    list: "a list of names",
    list | dict: "a list of indices, or lists by names",
}
# Initialisations that do not change the base's weights. PiSSA and others subtract from
# them.
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


def read(folder: Path) -> dict[str, Any]:
    """Reads the configuration of a LoRA adapter.

    Raises:
      FileNotFoundError: the folder has no configuration.
      ValueError: this kind of adapter is not supported, or ranks or scales are missing
        or malformed.
    """
    config = folders.read_json(folder, CONFIG)
    problem = None
    start = config.get("init_lora_weights", True)
    if (kind := config.get("peft_type")) != "LORA":
        problem = f"its peft_type is {kind!r}, but only 'LORA' is supported"
    elif str(start).lower() not in _STARTS:
        problem = (
            f"init_lora_weights is {start!r}, which changes the base's weights as "
            "well. Save it in PEFT with path_initial_model_for_weight_conversion"
        )
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            problem = problem or f"{key} is set: {why}. Merge it into a model in PEFT"
    if problem:
        raise ValueError(f"jaxarith cannot read the adapter {folder}: {problem}.")
    try:
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        good = all(isinstance(rank, int) and rank > 0 for rank in ranks)
        good = good and all(isinstance(alpha, int | float) for alpha in alphas)
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in config.get(key) or {}:
                re.compile(pattern)
    except (KeyError, AttributeError, re.error):
        good = False
    if not good:
        raise ValueError(
            f"{folder / CONFIG} must state r as a whole number above 0 and lora_alpha "
            "as a number. rank_pattern and alpha_pattern must map patterns of names to "
            "such numbers. Save the adapter again."
        )
    for key, kinds in _KINDS.items():
        found = config.get(key)
        good = not found or isinstance(found, kinds)
        if good and kinds is list:
            good = all(isinstance(name, str) for name in found or ())
        if not good:
            raise ValueError(
                f"{folder / CONFIG} states {key} as {str(found)[:60]!r}; expected "
                f"{_WORDS[kinds]}. Save the adapter again."
            )
    return config


def rank_and_scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    r"""Returns a module's rank and :math:`\alpha / r`, or :math:`\alpha / \sqrt r`.

    Args:
      config: the configuration, as `read` returns it.
      name: the module's name in the adapter, or the whole name of a parameter.
    """
    rank = _matching(config.get("rank_pattern"), name, config["r"])
    alpha = _matching(config.get("alpha_pattern"), name, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(values, name, default):
    """Returns the value of the first pattern that fits a name's end, as in PEFT."""
    for pattern, value in (values or {}).items():
        if patterns.fits_end(pattern, name):
            return value
    return default
