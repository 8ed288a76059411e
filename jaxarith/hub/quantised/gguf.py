"""Reads files in GGUF, llama.cpp's format, with its own package `gguf`.

The package unpacks the blocks and knows the names of tensors. llama.cpp also changes
values, which is undone here: it reorders the rows of Llama's queries and keys, and adds
one to the norms of Gemma.
"""

import collections
import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxarith import tree
from jaxarith.hub import folders
from jaxarith.hub.quantised import bits
from jaxarith.hub.stored import Stored, short

_MAGIC = b"GGUF"
_TURNED = ("llama",)  # llama.cpp uses this name for Mistral too
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
ARCHITECTURES = (*_TURNED, "qwen2", "qwen3", *_NORMS_PLUS_ONE)
# Modules of these architectures in transformers that lie outside the layers.
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_INSIDE = (
    *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"self_attn.{x}" for x in ("q_norm", "k_norm")),
    *(f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")),
    *(f"{x}_layernorm" for x in ("input", "post_attention")),
    *(f"{x}_feedforward_layernorm" for x in ("pre", "post")),
)
_COMPUTED = ("rope_freqs.weight",)  # transformers computes it from the configuration


class _Tensor(NamedTuple):
    """Where a tensor lies in a file, and how it is packed."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    packing: Any
    row_bytes: int


def find(place: Path) -> Path | None:
    """Returns a GGUF file: the path, or the one in a folder without other weights.

    Raises:
      ValueError: the folder has several GGUF files.
    """
    if place.is_file():
        with place.open("rb") as file:
            return place if file.read(4) == _MAGIC else None
    found = folders.weight_files(place) if place.is_dir() else []
    found = [file for file in found if file.suffix == ".gguf"]
    if len(found) > 1:
        few = ", ".join(tree.first_few([file.name for file in found], most=4))
        raise ValueError(
            f"{place} holds {len(found)} files in GGUF ({few}). Name one of them. To "
            "join the parts of one model, run `llama-gguf-split --merge`."
        )
    return found[0] if found else None


def turned_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys in the order of transformers.

    The two halves of a head are rotated together. llama.cpp interleaves their rows.

    Args:
      rows: the rows of whole heads, as in the file.
      heads: the number of these heads.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read(file: Path, dtype: DTypeLike) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Finds the tensors of a file, under the names of transformers.

    Args:
      file: the file.
      dtype: dtype of all tensors. A file has norms in float32, whatever the model had.

    Returns:
      The tensors, not read yet, and notes that say what was done.

    Raises:
      ImportError: the package gguf is not installed.
      ValueError: the file is corrupt, or its architecture or one of its tensors is
        unknown.
    """
    library, dtype = _library(file), np.dtype(dtype)
    try:
        reader = library.GGUFReader(file)
    # On other bytes, the package raises many unrelated exceptions.
    except Exception as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}.") from error
    kind = _field(reader, "general.architecture")
    if kind not in ARCHITECTURES or getattr(reader, "byte_order", "I") != "I":
        raise ValueError(
            f"{file} has the architecture {kind}; supported are "
            f"{', '.join(ARCHITECTURES)}, in the byte order of this machine. Try to "
            "load it with transformers (gguf_file=...) and save a folder."
        )
    names = _names(library, kind, _field(reader, f"{kind}.block_count"))
    tensors, packings = {}, collections.Counter()
    for tensor in reader.tensors:
        module, _, end = tensor.name.rpartition(".")
        if tensor.name in _COMPUTED:
            continue
        if module not in names:
            raise ValueError(f"{file}: {tensor.name} has no place in {kind}.")
        packings[tensor.tensor_type.name] += 1
        place = _place(library, file, tensor)
        heads = _heads(reader, kind, module) if kind in _TURNED else None
        less = kind in _NORMS_PLUS_ONE and module.endswith("norm")
        make = functools.partial(_made, library, place, heads, less, dtype)
        leaf = Stored.made(dtype, place.shape, make)
        tensors[f"{names[module]}.{end}"] = leaf
    counts = ", ".join(f"{count} {name}" for name, count in packings.most_common())
    note = f"{file}: tensors of GGUF ({counts}) are dequantised to {short(dtype)}"
    return tensors, (note,)


def _library(file):
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f"{file} is in GGUF. The package gguf, which reads it, is not installed: "
            "pip install 'jaxarith[gguf]'."
        ) from error


def _field(reader, key):
    if (field := reader.get_field(key)) is None:
        raise ValueError(f"the file has no {key}.")
    return field.contents()


def _names(library, kind, blocks):
    """Returns the modules of transformers by the file's names for them."""
    [arch] = [a for a, name in library.MODEL_ARCH_NAMES.items() if name == kind]
    table = library.get_tensor_name_map(arch, blocks)
    modules = [*_OUTSIDE]
    modules += [f"model.layers.{i}.{x}" for i in range(blocks) for x in _INSIDE]
    return {table.get_name(module): module for module in modules}


def _place(library, file, tensor):
    """Returns the place of a tensor, if the package knows its packing."""
    shape = tuple(reversed([int(n) for n in tensor.shape]))
    entries, size = library.GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        library.quants.dequantize(np.zeros(size, np.uint8), tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{file}: {tensor.name}: {error}.") from error
    columns = shape[-1] if len(shape) > 1 else 1
    row_bytes = columns // entries * size
    return _Tensor(file, tensor.data_offset, shape, tensor.tensor_type, row_bytes)


def _heads(reader, kind, module):
    """Returns the number of heads in a module's rows; None if their order is kept."""
    ends = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    if (end := ends.get(module.rpartition(".")[2])) is None:
        return None
    key = f"{kind}.attention.{end}"
    found = reader.get_field(key) is not None
    return int(_field(reader, key if found else f"{kind}.attention.head_count"))


def _made(library, place, heads, less, dtype):
    size = 1 if heads is None else place.shape[0] // heads

    def rows(at):
        count = at.stop - at.start
        packed = np.fromfile(
            place.file,
            np.uint8,
            count=count * place.row_bytes,
            offset=place.offset + at.start * place.row_bytes,
        )
        if packed.size != count * place.row_bytes:
            raise ValueError(f"{place.file} was cut short while it was read.")
        packed = packed.reshape(count, -1)
        values = library.quants.dequantize(packed, place.packing)
        values = values.reshape(count, *place.shape[1:])
        if heads is not None:
            values = turned_back(values, count // size)
        return values - 1 if less else values

    return bits.rounded(place.shape, dtype, rows, multiple=size)
