"""Unpacks the weights of a packed checkpoint, each when it is read."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxarith import tree
from jaxarith.hub import packed
from jaxarith.hub.quantised import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
)
from jaxarith.hub.quantised.unpacked import Unpacked
from jaxarith.hub.stored import Stored, short

Reader: TypeAlias = Callable[
    [Mapping[str, Stored], Mapping[str, Any], np.dtype], Unpacked
]

# One reader for each `quant_method`. `read(tensors, settings, dtype)` finds the packed
# weights among the tensors of a checkpoint, using its `quantization_config`.
READERS: dict[str, Reader] = {
    "fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
    "mxfp4": mxfp4.read,
    "bitsandbytes": bitsandbytes.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
# The reader for each label of `packed.found`, if the configuration names no format.
# Tensors of GPTQ and AWQ look alike, so they are not here.
_BY_TENSORS = {
    "bitsandbytes, 4 bits": "bitsandbytes",
    "bitsandbytes, 8 bits": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8 with scales": "fp8",
    "f8_e4m3 numbers": "fp8",
    "integers or fp8 with scales": "compressed-tensors",
    "MXFP4": "mxfp4",
}
# Some configurations name a format of compressed-tensors in place of a method.
_COMPRESSED = re.compile(r"(\w+-)*quantized|dense")
# Models of transformers whose layers are called Conv1D.
_IN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Scales of activations and of the cache. They do not belong to weights.
_OF_ACTIVATIONS = re.compile(
    r".*\.([kvq]|kv|kv_cache|prob|input|output|activation)(_activation|_global)?"
    r"_(scale|zero_point)"
)


def dequantised(
    place: Path,
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    dtype: DTypeLike = ml_dtypes.bfloat16,
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Returns the tensors of a checkpoint with packed weights as floating point.

    Each weight is unpacked when it is read, computed in float32 and rounded once. A
    checkpoint without packed weights is returned as it is.

    Args:
      place: the folder of the checkpoint, to name in notes and errors.
      tensors: the tensors by name.
      config: the content of its `config.json`.
      dtype: dtype of the weights that were packed.

    Returns:
      The tensors, and notes that say what was done.

    Raises:
      ValueError: the format is not supported, or its tensors do not fit together.

    Example:
      >>> folder = hub.find("openai/gpt-oss-20b")  # doctest: +SKIP
      >>> found = hub.open_checkpoint(folder)  # doctest: +SKIP
      >>> config = hub.read_json(folder)  # doctest: +SKIP
      >>> tensors, notes = dequantised(folder, found.tensors, config)  # doctest: +SKIP
    """
    if (sign := packed.found(tensors, config)) is None:
        return dict(tensors), ()
    label = sign[1]
    said = packed.stated_format(config) or ""
    said = "" if " " in said else said  # it has no name
    method = _method(label, said.lower())
    if method is None:
        raise ValueError(
            f"{place} is quantised ({said or label}), which --dequantize does not "
            f"read. It reads {', '.join(READERS)}, as the quantization_config in "
            "config.json states. Give the model in floating point."
        )
    if (kind := config.get("model_type")) in _IN_OUT:
        raise ValueError(
            f"{place} is a quantised {kind}. Its matrices are [in, out] and are packed "
            "transposed, which is not supported. Give the model in floating point."
        )
    dtype = np.dtype(dtype)
    with _named(str(place)):
        found = READERS[method](tensors, packed.settings(config) or {}, dtype)
    rest = {name: x for name, x in tensors.items() if name not in found.parts}
    dropped = [name for name in rest if _OF_ACTIVATIONS.fullmatch(name)]
    result = {name: x for name, x in rest.items() if name not in dropped}
    for name, leaf in found.weights.items():
        make = functools.partial(_read, f"{place}: {name}", leaf)
        result[name] = Stored.made(leaf.dtype, leaf.shape, make)
    if (sign := packed.found(result, {})) is not None:
        raise ValueError(
            f"{place}: {sign[0]} is {result[sign[0]]}, which is not part of a weight "
            f"in the supported form of {method}. Give the model in floating point."
        )
    return result, tuple(_notes(place, method, dtype, found, result, dropped))


def _read(label, leaf):
    with _named(label):
        return leaf.read()


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Turns errors about files that break their format into one that names them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    # These come from settings that are missing or have wrong types, and from parts of
    # wrong sizes.
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{label}: quantization_config and packed tensors do not go together "
            f"({error!r}). Download the model again."
        ) from error


def _method(label: str, said: str) -> str | None:
    """Returns the name of the reader for a checkpoint; None if there is no reader.

    Args:
      label: what `packed.found` calls the tensors.
      said: the format that the configuration names, or an empty text.
    """
    if said in READERS:
        return said
    if _COMPRESSED.fullmatch(said):
        return "compressed-tensors"
    return None if said else _BY_TENSORS.get(label)


def _notes(place, method, dtype, found, result, dropped):
    of = f"of the format {method}"
    are = tree.counted(len(found.weights), f"weight {of} is", f"weights {of} are")
    yield f"{place}: {are} dequantised to {short(dtype)}"
    stay = {
        name: short(x.dtype)
        for name, x in result.items()
        if name not in found.weights and x.is_floating and len(x.shape) > 1
    }
    if stay:
        kinds = " and ".join(sorted({*stay.values()}))
        few = ", ".join(tree.first_few(sorted(stay), most=3))
        were = tree.counted(
            len(stay),
            "matrix was not quantised, stays",
            "matrices were not quantised, stay",
        )
        yield f"{place}: {were} {kinds}: {few}"
    if dropped:
        few = ", ".join(tree.first_few(sorted(dropped), most=3))
        of = "of activations or of the cache"
        are = tree.counted(len(dropped), f"scale {of} is", f"scales {of} are")
        yield f"{place}: {are} left out: {few}"
