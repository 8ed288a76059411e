"""Computes what LoRA adapters in the folders of PEFT add to a base.

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
arXiv:2106.09685. Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning
with LoRA. 2023. arXiv:2312.03732 (`use_rslora`). Liu et al. DoRA: Weight-Decomposed
Low-Rank Adaptation. ICML 2024. arXiv:2402.09353 (`use_dora`).
"""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxarith import report, tree
from jaxarith.hub import (
    adapter_config,
    adapter_names,
    adapter_parameters,
    adapter_tensors,
    fused_experts,
    orientation,
)
from jaxarith.hub.adapter_config import CONFIG
from jaxarith.hub.adapter_tensors import Factors
from jaxarith.hub.stored import Stored

_OF_STACK = re.compile(r"(.*?)(encoder|decoder)\.embed_tokens\.weight")


class Adapter(NamedTuple):
    """The changes that an adapter makes to a base.

    A tensor may be both replaced and moved; it is replaced first.

    Attributes:
      deltas: what is added to each tensor, in float32, by its name in the base.
      replaced: new tensors, by the names of the base's tensors that they replace.
      notes: how names were matched that differ from the base's.
    """

    deltas: dict[str, Stored]
    replaced: dict[str, Stored]
    notes: tuple[str, ...] = ()


def read_adapter(folder: str | os.PathLike, base: Mapping[str, Stored]) -> Adapter:
    r"""Finds what a LoRA adapter adds to a base; the tensors are read when used.

    A delta is :math:`s B A` with :math:`s = \alpha / r`, or :math:`\alpha / \sqrt r`
    for rank-stabilised adapters. It is computed in float32, whatever the adapter's
    dtype. With DoRA's magnitudes :math:`m`, and norms over the inputs of each output,
    the delta is

    .. math:: \frac{m}{\lVert W_0 + s B A \rVert} (W_0 + s B A) - W_0.

    Trained tokens (`trainable_token_indices`) replace rows of an embedding.

    The names of the base may have a prefix that those of the adapter lack, or the other
    way round.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      base: the tensors of the model that the adapter was trained on, by name.

    Raises:
      FileNotFoundError: one of the two files does not exist.
      ValueError: this kind of adapter has no weights to merge, or the adapter is
        corrupt or does not fit the base.

    Example:
      >>> adapter = read_adapter("my_lora", base)  # doctest: +SKIP
      >>> adapter.deltas["model.layers.0.mlp.up_proj.weight"].read()  # doctest: +SKIP
    """
    folder = Path(folder)
    config = adapter_config.read(folder)
    parts = adapter_tensors.read(folder, config)
    parts = parts._replace(whole=_without_copies(parts.whole, base))
    targets = config.get("target_parameters")
    fused = fused_experts.find(base) if targets else {}
    places = {**base, **{name: found.leaf for name, found in fused.items()}}
    groups = adapter_parameters.groups(parts.factors, targets, places)
    if targets and not groups:
        raise ValueError(
            f"{folder} states target_parameters, but has no factors of parameters "
            f"{report.listed(targets)} that the base has."
        )
    of_groups = {name for module in groups for name, _ in _pairs(module, parts)}
    modules = {m: pair for m, pair in parts.factors.items() if m not in of_groups}
    wanted = {f"{module}.weight" for module in (*modules, *parts.tokens)}
    wanted |= {f"{m}.bias" for m, pair in modules.items() if pair.bias is not None}
    wanted |= {name for group in groups.values() for name in group}
    wanted |= parts.whole.keys()
    names, notes = adapter_names.fit(folder, wanted, places)
    replaced = {names[name]: tensor for name, tensor in parts.whole.items()}
    start = {name: replaced.get(name, places[name]) for name in names.values()}
    lines = [
        f"! {name}: {base[name]} in the base is replaced by {tensor}"
        for name, tensor in replaced.items()
        if tensor.shape != base[name].shape or not tensor.is_floating
    ]
    deltas, more = _of_modules(config, modules, names, start, orientation.known(base))
    lines += more
    for module, group in groups.items():
        pairs = [pair for _, pair in _pairs(module, parts)]
        given = {name: names[name] for name in group}
        for place, pair, scaling in _assigned(config, module, pairs, given, places):
            if place in fused:
                deltas |= fused_experts.deltas(fused[place], pair, scaling)
            else:
                deltas[place] = _of_parameter(place, pair, scaling, places)
    for module, rows in parts.tokens.items():
        name = names[f"{module}.weight"]
        indices = _token_indices(config, module)
        lines += _misfit_tokens(module, rows, indices, base[name], name in deltas)
        deltas[name] = _of_tokens(rows, indices, start[name])
    if lines:
        raise ValueError(adapter_names.unfit(folder, lines))
    _check_tied(folder, config, parts, names, base)
    return Adapter(deltas, replaced, notes)


def _without_copies(
    whole: Mapping[str, Stored], base: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Removes additional names of an embedding that two stacks share.

    A file of T5 holds the matrix once, but the model's class has it under three names.
    """

    def is_copy(name: str) -> bool:
        found = _OF_STACK.fullmatch(name)
        shared = whole.get(f"{found[1]}shared.weight") if found else None
        if name in base or shared is None or str(shared) != str(whole[name]):
            return False
        return shared.read().tobytes() == whole[name].read().tobytes()

    return {name: tensor for name, tensor in whole.items() if not is_copy(name)}


def _pairs(module, parts):
    return adapter_parameters.pairs(module, parts.factors)


def _of_modules(
    config: Mapping[str, Any],
    modules: Mapping[str, Factors],
    names: Mapping[str, str],
    start: Mapping[str, Stored],
    known: Mapping[str, bool],
) -> tuple[dict[str, Stored], list[str]]:
    """Returns the deltas of modules by the base's names, and a line for each misfit."""
    deltas: dict[str, Stored] = {}
    lines: list[str] = []
    flag = bool(config.get("fan_in_fan_out"))
    for module, pair in modules.items():
        name = names[f"{module}.weight"]
        leaf = start[name]
        turn = pair.embedding or orientation.in_out(name, leaf.shape, known, flag)
        rank, scaling = adapter_config.rank_and_scaling(config, module)
        lines += _misfit(module, pair, rank, turn, name, leaf)
        read = functools.partial(_product, pair, scaling, turn, leaf.shape)
        if pair.magnitude is not None:
            read = functools.partial(_dora, read, pair.magnitude, turn, leaf)
        deltas[name] = Stored.made(np.float32, leaf.shape, read)
        if pair.bias is not None:
            bias = names[f"{module}.bias"]
            if pair.bias.shape != start[bias].shape:
                lines.append(f"! {bias} is {start[bias]}, but has factor {pair.bias}")
            read = functools.partial(_scaled, pair.bias, scaling)
            deltas[bias] = Stored.made(np.float32, start[bias].shape, read)
    return deltas, lines


def _misfit(module, pair, rank, turned, name, leaf):
    """Returns a line that says how the factors' shapes are wrong; none if they fit."""
    a, b = pair.a.shape, pair.b.shape
    factors = f"! {module}: A {list(a)} and B {list(b)}"
    if len(a) < 2 or len(a) != len(b) or (a[0], b[1]) != (rank, rank):
        return [f"{factors}, but {CONFIG} states the rank {rank}"]
    product = (b[0], *a[1:])
    whole = math.prod(b[2:]) == 1 and (product[::-1] if turned else product)
    if whole != leaf.shape or not leaf.is_floating:
        return [f"{factors}, but {name} is {leaf}"]
    if pair.magnitude is not None and pair.magnitude.size != b[0]:
        return [f"{factors}, but the magnitudes are {pair.magnitude}"]
    return []


def _product(pair, scaling, turned, shape):
    a = pair.a.read().astype(np.float32).reshape(pair.rank, -1)
    b = pair.b.read().astype(np.float32).reshape(-1, pair.rank)
    product = a.T @ b.T if turned else b @ a
    product *= np.float32(scaling)  # in place: no second array of this size
    return product.reshape(shape)


def _dora(product, magnitude, turned, leaf):
    start = leaf.read().astype(np.float32)
    moved = start + product()
    axes = tuple(range(moved.ndim))[: -1 if turned else None][0 if turned else 1 :]
    norms = np.sqrt(np.sum(np.square(moved), axis=axes, keepdims=True))
    lengths = magnitude.read().astype(np.float32).reshape(norms.shape)
    with np.errstate(invalid="ignore", divide="ignore"):  # the merge reports it
        moved *= lengths / norms
    moved -= start
    return moved


def _scaled(tensor, scaling):
    return tensor.read().astype(np.float32) * np.float32(scaling)


def _assigned(
    config: Mapping[str, Any],
    module: str,
    pairs: Sequence[Factors],
    group: Mapping[str, str],
    places: Mapping[str, Stored],
) -> list[tuple[str, Factors, float]]:
    """Returns a module's parameters by the base's names, their factors and scales."""
    scales = {name: adapter_config.rank_and_scaling(config, name) for name in group}
    given = adapter_parameters.assign(
        module,
        pairs,
        {name: places[place] for name, place in group.items()},
        {name: rank for name, (rank, _) in scales.items()},
    )
    return [(group[name], pair, scales[name][1]) for name, pair in given.items()]


def _of_parameter(place, pair, scaling, places):
    leaf, inside = places[place], place.rpartition(".")[0]
    beside = [x for name, x in places.items() if name.rpartition(".")[0] == inside]
    in_out = adapter_parameters.lies_in_out(place, pair, leaf, beside)
    read = functools.partial(
        adapter_parameters.product, pair, scaling, in_out, leaf.shape
    )
    return Stored.made(np.float32, leaf.shape, read)


def _token_indices(config, module):
    """Returns PEFT's indices of an embedding's trained tokens: one list, or by name."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        ends = [key for key in given if f".{module}".endswith(f".{key}")]
        given = given[max(ends, key=len)] if ends else None
    return given


def _misfit_tokens(module, rows, indices, leaf, moved):
    good = isinstance(indices, list) and all(type(i) is int for i in indices)
    if not good or len(set(indices)) != len(indices):
        return [f"! {module}: the indices of its trained tokens are {indices}"]
    if (rows.shape, len(leaf.shape)) != ((len(indices), *leaf.shape[1:]), 2):
        tokens = tree.counted(len(indices), "trained token")
        return [f"! {module}: {tokens} {rows} for {leaf}"]
    if not all(0 <= i < leaf.shape[0] for i in indices) or not leaf.is_floating:
        return [f"! {module}: trained tokens up to {max(indices)} of {leaf}"]
    return [f"! {module} has factors as well as trained tokens"] * moved


def _of_tokens(rows, indices, leaf):
    def read():
        delta = np.zeros(leaf.shape, np.float32)
        start = leaf.read()[indices].astype(np.float32)
        delta[indices] = rows.read().astype(np.float32) - start
        return delta

    return Stored.made(np.float32, leaf.shape, read)


def _check_tied(folder, config, parts, names, base):
    """Raises a ValueError if a tied matrix moves in ways that cannot be added."""
    moved = {m: pair.magnitude is not None for m, pair in parts.factors.items()}
    moved |= dict.fromkeys(parts.tokens, True)
    places: dict[int, list[str]] = {}
    for module in moved:
        name = names.get(f"{module}.weight")
        if name is not None:
            places.setdefault(id(base[name]), []).append(module)
    for modules in places.values():
        if len(modules) > 1 and any(moved[module] for module in modules):
            raise ValueError(
                f"{folder} moves {' and '.join(modules)}, which are one tied matrix. "
                "Their DoRA or trained tokens cannot be added. Merge the adapter into "
                "a model in PEFT."
            )
