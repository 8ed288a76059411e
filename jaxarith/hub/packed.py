"""Recognises packed (quantised) weights by names of tensors and by configuration.

Packed numbers must not be merged: their mean has no meaning, whatever their dtype.
bitsandbytes, for example, can store four of them in one bfloat16 number.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxarith.hub.config import parts
from jaxarith.hub.stored import NUMERIC, Stored, short

# Keys under which configurations describe packed weights.
KEYS = ("quantization_config", "compression_config")
# Endings of the names of packed tensors or of their scales.
_ENDS = {
    "bitsandbytes, 4 bits": r"\.(absmax|quant_map|nested_absmax|nested_quant_map)|"
    r"\.quant_state\.bitsandbytes__\w+",
    "bitsandbytes, 8 bits": r"\.(SCB|weight_format)",
    "compressed-tensors": r"\.weight_(packed|zero_point|global_scale)",
    "fp8 with scales": r"[._]\w*scale_inv",
    "integers or fp8 with scales": r"\.weight_scales?",
    "GPTQ": r"\.g_idx",
    "HQQ": r"\.W_q",
    "quanto": r"\.weight\._(data|scale|shift)",
    "torchao": r"\._?weight_(qdata|scale)",
}
_FORMATS = {label: re.compile(rf".+({end})") for label, end in _ENDS.items()}
_ANY_FORMAT = re.compile(rf".+({'|'.join(_ENDS.values())})")
# Endings that are a sign only together: other models have tensors called scales.
_PAIRS = {
    "MXFP4": ("_blocks", "_scales"),
    "GPTQ or AWQ": (".qweight", ".scales"),
    "AQLM": (".codes", ".codebooks"),
    "VPTQ": (".indices", ".centroids.weight"),
}


def check(
    place: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> None:
    """Raises a ValueError that names the format if weights are packed.

    A `quantization_config` alone is not a sign, because conversions back to floating
    point often leave it behind. It is used only to name the format.

    Args:
      place: the file or folder that holds the tensors.
      tensors: the tensors by name.
      config: the content of its `config.json`.
    """
    said = stated_format(config)
    for name, label in _signs(tensors, said):
        raise ValueError(
            f"{place} is quantised ({said or label}): {name} is {tensors[name]}, part "
            "of packed weights, which cannot be merged. Let `jaxarith merge` unpack "
            "them (--dequantize), or give the model in floating point: the original, "
            "or this one dequantised (`model.dequantize()` in transformers) and saved "
            "again."
        )


def found(
    tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Returns the first part of packed weights and its format; None without any.

    Args:
      tensors: the tensors by name.
      config: the content of `config.json`.
    """
    return next(_signs(tensors, stated_format(config)), None)


def stated_format(config: Mapping[str, Any]) -> str | None:
    """Returns the format of packed weights that a configuration or its part names."""
    if (found := settings(config)) is None:
        return None
    method = found.get("quant_method") or found.get("format")
    return str(method or "of a format without a name")[:40]


def settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the `quantization_config` of a configuration or of a part of it."""
    for part in (config, *parts(config).values()):
        for key in KEYS:
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def _signs(
    tensors: Mapping[str, Stored], said: str | None
) -> Iterator[tuple[str, str]]:
    """Yields names of tensors that are packed or belong to packed ones, and formats."""
    # Each name is matched once; in most checkpoints none remains.
    ending = [name for name in tensors if _ANY_FORMAT.fullmatch(name)]
    for label, pattern in _FORMATS.items():
        yield from ((name, label) for name in ending if pattern.fullmatch(name))
    for label, (one, other) in _PAIRS.items():
        for name in tensors:
            if name.endswith(one) and name.removesuffix(one) + other in tensors:
                yield name, label
    for name, tensor in tensors.items():
        is_weight = name.endswith(".weight") and tensor.shape != ()
        if tensor.dtype not in NUMERIC:
            yield name, f"{short(tensor.dtype)} numbers"
        elif is_weight and tensor.dtype.kind in "iu":  # flat ones as well
            yield name, f"packed in {short(tensor.dtype)} numbers"
        elif is_weight and said == "bitsandbytes" and tensor.shape[1:] == (1,):
            yield name, said
