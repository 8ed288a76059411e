"""Files in GGUF, llama.cpp's format, through its own package `gguf`.

The package unpacks the blocks and has the names of tensors. llama.cpp also changes
values: it turns the rows of Llama's queries and keys around, and adds one to the norms
of Gemma.
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
_TURNED = ("llama",)  # and Mistral, which llama.cpp calls so
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
ARCHITECTURES = (*_TURNED, "qwen2", "qwen3", *_NORMS_PLUS_ONE)
# The modules of these architectures in transformers.
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_INSIDE = (
    *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"self_attn.{x}" for x in ("q_norm", "k_norm")),
    *(f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")),
    *(f"{x}_layernorm" for x in ("input", "post_attention")),
    *(f"{x}_feedforward_layernorm" for x in ("pre", "post")),
)
_COMPUTED = ("rope_freqs.weight",)  # by the model, from its configuration


class _Tensor(NamedTuple):
    """Where a tensor lies in a file, and how it is packed."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    packing: Any
    row_bytes: int


def find(place: Path) -> Path | None:
    """The GGUF file that a path is, or that is all a folder has of weights.

    Raises:
      ValueError: the folder has several.
    """
    if place.is_file():
        with place.open("rb") as file:
            return place if file.read(4) == _MAGIC else None
    found = folders.weight_files(place) if place.is_dir() else []
    found = [file for file in found if file.suffix == ".gguf"]
    if len(found) > 1:
        few = ", ".join(tree.first_few([file.name for file in found], most=4))
        raise ValueError(
            f"{place} holds {len(found)} files in GGUF ({few}); name one of them. "
            "Parts of one model become a file by `llama-gguf-split --merge`."
        )
    return found[0] if found else None


def turned_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as transformers has them.

    llama.cpp puts the two halves of a head, which are rotated together, beside each
    other.

    Args:
      rows: the rows of whole heads, as in the file.
      heads: how many heads they are.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read(file: Path, dtype: DTypeLike) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors of a file by the names of transformers, not read yet, and notes.

    Args:
      file: the file.
      dtype: dtype of all of them: a file has norms in float32 whatever the model had.

    Raises:
      ImportError: the package gguf is not installed.
      ValueError: the file is corrupt, of an architecture that is not known here, or
        has tensors that are not.
    """
    library, dtype = _library(file), np.dtype(dtype)
    try:
        reader = library.GGUFReader(file)
    # The package raises whatever comes of bytes that are not its own.
    except Exception as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}.") from error
    kind = _field(reader, "general.architecture")
    if kind not in ARCHITECTURES or getattr(reader, "byte_order", "I") != "I":
        raise ValueError(
            f"{file} is of the architecture {kind}; known here are "
            f"{', '.join(ARCHITECTURES)}, in the byte order of this machine. "
            "transformers may load it (gguf_file=...), and save a folder."
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
            f"{file} is in GGUF, which the package gguf reads: pip install "
            "'jaxarith[gguf]'."
        ) from error


def _field(reader, key):
    if (field := reader.get_field(key)) is None:
        raise ValueError(f"the file has no {key}.")
    return field.contents()


def _names(library, kind, blocks):
    """Modules of transformers by those of the file."""
    [arch] = [a for a, name in library.MODEL_ARCH_NAMES.items() if name == kind]
    table = library.get_tensor_name_map(arch, blocks)
    modules = [*_OUTSIDE]
    modules += [f"model.layers.{i}.{x}" for i in range(blocks) for x in _INSIDE]
    return {table.get_name(module): module for module in modules}


def _place(library, file, tensor):
    """A tensor whose packing the package knows."""
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
    """How many heads the rows of a module are; None where they are not turned."""
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
