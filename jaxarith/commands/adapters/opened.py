"""Opens PEFT adapters of one base, to merge them to one adapter."""

import dataclasses
import filecmp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxarith import hub, report
from jaxarith.hub import Stored, adapter_config, adapter_tensors, lora
from jaxarith.hub.adapter_tensors import Factors, Parts

# Keys in which the adapters must agree, because the new adapter has one value.
_SHARED = ("task_type", "revision", "auto_mapping", "ensure_weight_tying")
# Features that a merged adapter cannot have, and why.
_NO_FACTORS = {
    "use_dora": "DoRA's lengths depend on the base's weights",
    "lora_bias": "its factors have biases",
    "target_parameters": "its factors are of parameters rather than modules",
    "trainable_token_indices": "it replaces rows of an embedding",
}


class Product(NamedTuple):
    """A delta in PyTorch's orientation: `left @ right`; `left` contains the scale.

    Attributes:
      left: `[out, r]`.
      right: `[r, in]`.
    """

    left: np.ndarray
    right: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.right)


class Layer(NamedTuple):
    """Facts about a layer that are the same in all adapters.

    Attributes:
      embedding: whether it is an embedding; its delta is then transposed.
      a: the shape of A without its rank, `[in, *window]`.
      b: the shape of B without its rank, `[out, *ones]`.
    """

    embedding: bool
    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of one base; their tensors are not read yet.

    Attributes:
      folders: the folders of the adapters.
      configs: the configurations of the adapters.
      parts: the tensors of the adapters.
      layers: the layers that at least one adapter moves, by module.
    """

    folders: list[Path]
    configs: list[dict[str, Any]]
    parts: list[Parts]
    layers: dict[str, Layer]

    @property
    def base(self) -> str | None:
        """The name of the base."""
        return self.configs[0].get("base_model_name_or_path")

    @property
    def shared(self) -> dict[str, Any]:
        """Further keys of the configuration, which all adapters share."""
        return {key: self.configs[0].get(key) for key in _SHARED}

    def ranks(self, module: str) -> list[int]:
        """Returns the ranks of a module's factors in the adapters that have some."""
        found = [parts.factors.get(module) for parts in self.parts]
        return [pair.rank for pair in found if pair is not None]

    def products(self, module: str) -> list[Product | None]:
        """Reads the delta of a module in each adapter, in float64."""
        return [
            None
            if (pair := parts.factors.get(module)) is None
            else _read(pair, adapter_config.rank_and_scaling(config, module)[1])
            for config, parts in zip(self.configs, self.parts, strict=True)
        ]


def _read(pair: Factors, scaling: float) -> Product:
    a = pair.a.read().astype(np.float64).reshape(pair.rank, -1)
    b = pair.b.read().astype(np.float64).reshape(-1, pair.rank)
    return Product(scaling * a.T, b.T) if pair.embedding else Product(scaling * b, a)


def stored(layer: Layer, product: Product) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B in the form of a file."""
    left, right = product
    a, b = (left.T, right.T) if layer.embedding else (right, left)
    return (
        a.reshape(product.rank, *layer.a),
        b.reshape(layer.b[0], product.rank, *layer.b[1:]),
    )


def stated_base(name: str) -> str | None:
    """Returns the base that the configuration of an adapter names."""
    config = adapter_config.read(_folder(name))
    return config.get("base_model_name_or_path")


def open_adapters(names: Sequence[str], base: str | None) -> Adapters:
    """Opens adapters that will be merged to one.

    Args:
      names: folders or hub ids.
      base: the base that the user named, which must be the adapters'; None allows any.

    Raises:
      FileNotFoundError: a folder or one of its files does not exist.
      ValueError: a model is not an adapter, or is an adapter that factors cannot
        express, or the adapters have different bases.
    """
    folders = [_folder(name) for name in names]
    configs = [adapter_config.read(folder) for folder in folders]
    _check_bases(folders, configs, base)
    for key in _SHARED:
        if len({str(config.get(key) or None) for config in configs}) > 1:
            raise ValueError(
                f"the adapters differ in {key}: {_each(folders, configs, key)}. The "
                f"new adapter has one value: make it the same in each {lora.CONFIG}."
            )
    for folder, config in zip(folders, configs, strict=True):
        for key, why in _NO_FACTORS.items():
            if config.get(key):
                raise ValueError(
                    f"{folder} has {key}: {why}, so no LoRA adapter equals the merge. "
                    "Merge it into a model: leave out --to-adapter, and give the base."
                )
    parts = [
        adapter_tensors.read(folder, config)
        for folder, config in zip(folders, configs, strict=True)
    ]
    for folder, config, found in zip(folders, configs, parts, strict=True):
        _check_ranks(folder, config, found)
        if biases := [x for x in found.whole if _is_trained_bias(x, config)]:
            raise ValueError(
                f"{folder} has trained biases ({report.listed(biases, 2)}), and their "
                "original values are not in an adapter. Merge it into a model: leave "
                "out --to-adapter."
            )
    layers = _layers(folders, parts)
    _check_spellings(folders, parts)
    return Adapters(folders, configs, parts, layers)


def _folder(name: str) -> Path:
    folder = hub.find(name)
    if not lora.is_adapter(folder):
        raise ValueError(
            f"{name} is not a PEFT adapter: it has no {lora.CONFIG}. --to-adapter "
            "merges only adapters. Make one from a model with `jaxarith extract`."
        )
    return folder


def _each(folders, configs, key):
    stated = zip(folders, configs, strict=True)
    return ", ".join(f"{config.get(key)!r} in {folder}" for folder, config in stated)


def _check_bases(folders, configs, base):
    key = "base_model_name_or_path"
    stated = [config.get(key) for config in configs]
    if len({_place(name) for name in stated}) > 1:
        raise ValueError(
            f"the adapters have different bases: {_each(folders, configs, key)}. "
            f"Merge adapters of one base. If these are one, correct {lora.CONFIG}."
        )
    if base is not None and _place(base) != _place(stated[0]):
        raise ValueError(
            f"the base of the adapters is {stated[0]!r}, not {base!r}. Leave --base "
            f"out, or correct {lora.CONFIG} if both are one model."
        )


def _place(name):
    path = Path(str(name)).expanduser()
    # A configuration has a separate key for the revision.
    return str(path.resolve()) if path.is_dir() else str(name).partition("@")[0]


def _check_ranks(folder, config, parts):
    for module, pair in parts.factors.items():
        rank, _ = adapter_config.rank_and_scaling(config, module)
        a, b = pair.a.shape, pair.b.shape
        if len(a) < 2 or len(a) != len(b) or (a[0], b[1]) != (rank, rank):
            raise ValueError(
                f"{folder}: {module} has A {list(a)} and B {list(b)}, but "
                f"{lora.CONFIG} states the rank {rank}. Save the adapter again."
            )


def _is_trained_bias(name, config):
    module = name.rpartition(".")[0]
    saved = config.get("modules_to_save") or ()
    inside = any(f".{module}.".find(f".{key}.") >= 0 for key in saved)
    return name.endswith(".bias") and not inside


def _layers(folders, parts):
    layers: dict[str, Layer] = {}
    for folder, found in zip(folders, parts, strict=True):
        for module, pair in found.factors.items():
            b = (pair.b.shape[0], *pair.b.shape[2:])
            layer = Layer(pair.embedding, pair.a.shape[1:], b)
            if layers.setdefault(module, layer) != layer:
                raise ValueError(
                    f"{module} has A {list(pair.a.shape)} and B {list(pair.b.shape)} "
                    f"in {folder} and other shapes in an earlier adapter: they belong "
                    "to different models."
                )
    if not layers:
        raise ValueError("the adapters have no factors, so there is nothing to merge.")
    return layers


def _check_spellings(folders, parts):
    """Raises a ValueError if one layer seems to have two names."""
    for folder, found in zip(folders, parts, strict=True):
        others = {x for p in parts if p is not found for x in p.factors}
        for module in others - found.factors.keys():
            pieces = module.split(".")
            ends = (".".join(pieces[i:]) for i in range(1, len(pieces) - 1))
            if end := next((end for end in ends if end in found.factors), None):
                raise ValueError(
                    f"{folder} calls a layer {end}, but another adapter {module}: they "
                    "were trained on different classes of the base."
                )


def side_files(folders: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Returns files beside the adapters, such as tokenizers, and notes on others.

    A file is copied if it is the same in all adapters that have it.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for file in hub.side_files(folder):
            found.setdefault(str(file.relative_to(folder)), []).append(file)
    same = {
        name: files[0]
        for name, files in found.items()
        if all(filecmp.cmp(files[0], other, shallow=False) for other in files[1:])
    }
    differing = sorted(found.keys() - same.keys())
    return same, [
        f"these files differ between the adapters and are not copied: "
        f"{report.listed(differing)}"
    ] * bool(differing)


def replaced(adapters: Adapters) -> dict[str, list[Stored | None]]:
    """Returns, by name, the whole tensors with which adapters replace the base's."""
    names = dict.fromkeys(name for parts in adapters.parts for name in parts.whole)
    return {name: [parts.whole.get(name) for parts in adapters.parts] for name in names}


def copies(adapters: Adapters) -> Iterator[tuple[str, Stored]]:
    """Yields the base's own tensors that PEFT saved beside factors, with their names.

    Raises:
      ValueError: a tensor is not the same in all adapters.
    """
    inner = {name for parts in adapters.parts for name in parts.inner}
    for name, tensors in replaced(adapters).items():
        if name not in inner:
            continue
        first, *others = [tensor for tensor in tensors if tensor is not None]
        if any(not _same(first, other) for other in others):
            raise ValueError(
                f"{name} is saved beside its factors, but differs between adapters: "
                "they were trained on different weights."
            )
        yield name, first


def _same(one, other):
    return str(one) == str(other) and one.read().tobytes() == other.read().tobytes()


def modules_to_save(configs: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Returns the modules that at least one of the adapters replaces."""
    names = [name for config in configs for name in config.get("modules_to_save") or ()]
    return sorted(set(names)) or None
