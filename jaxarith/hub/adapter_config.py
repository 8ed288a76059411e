"""What an `adapter_config.json` of PEFT says: kind, ranks, scales."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxarith.hub import folders, patterns

CONFIG = "adapter_config.json"

# What changes the meaning of a file and has no weights that could be merged.
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
# What may be given, beside nothing.
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
# Starts that leave the base's weights as they are; PiSSA and others subtract from them.
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


def read(folder: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the adapter is of a kind that cannot be read, or ranks or scales are
        not given as they should be.
    """
    config = folders.read_json(folder, CONFIG)
    problem = None
    start = config.get("init_lora_weights", True)
    if (kind := config.get("peft_type")) != "LORA":
        problem = f"its peft_type is {kind!r}, and only 'LORA' is supported"
    elif str(start).lower() not in _STARTS:
        problem = (
            f"init_lora_weights is {start!r}, which changes the base's weights as "
            "well. Save it in PEFT with path_initial_model_for_weight_conversion"
        )
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            problem = problem or f"{key} is set: {why}. Merge it into a model in PEFT"
    if problem:
        raise ValueError(f"{folder} is no adapter that jaxarith can read: {problem}.")
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
            f"{folder / CONFIG} must give r, a whole number above 0, and lora_alpha, a "
            "number, and by patterns of names the same in rank_pattern and "
            "alpha_pattern. Save the adapter again."
        )
    for key, kinds in _KINDS.items():
        found = config.get(key)
        good = not found or isinstance(found, kinds)
        if good and kinds is list:
            good = all(isinstance(name, str) for name in found or ())
        if not good:
            raise ValueError(
                f"{folder / CONFIG} says {key} is {str(found)[:60]!r}; expected "
                f"{_WORDS[kinds]}. Save the adapter again."
            )
    return config


def rank_and_scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    r"""The rank of a module and :math:`\alpha / r`, or :math:`\alpha / \sqrt r`.

    Args:
      config: the configuration, as `read` returns it.
      name: the module's name in the adapter; of a parameter its whole name.
    """
    rank = _matching(config.get("rank_pattern"), name, config["r"])
    alpha = _matching(config.get("alpha_pattern"), name, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(values, name, default):
    """PEFT's rule: the first pattern that fits whole words at the end of the name."""
    for pattern, value in (values or {}).items():
        if patterns.fits_end(pattern, name):
            return value
    return default
