"""LoRA adapters in the folders of PEFT: read as task vectors, and written.

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
arXiv:2106.09685. Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning
with LoRA. 2023. arXiv:2312.03732 (`use_rslora`).
"""

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxarith import tree
from jaxarith.hub import (
    adapter_names,
    download,
    folders,
    packed,
    patterns,
    places,
    safetensors,
    writing,
)
from jaxarith.hub.stored import Stored
from jaxarith.typing import Tree

CONFIG = "adapter_config.json"

# Names of the factors beside a kernel in a parameter tree, see `models.lora`.
FACTOR_A, FACTOR_B = "lora_a", "lora_b"

# A module's factors are `lora_A.weight` and `lora_B.weight`, or with the name of the
# adapter as in `lora_A.default.weight`; those of embeddings have no `.weight`.
_FACTOR = re.compile(
    r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|(embedding_[AB])(?:\.[^.]+)?)"
)
# Words that PEFT puts between the names of modules where it wraps them.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|modules_to_save(\.default)?)\.")
# Where biases are trained, PEFT saves those of `modules_to_save` three times: by their
# own names, by the wrapper's, and as they were.
_SPARE = re.compile(r"(.+)\.(?:original_module|modules_to_save(?:\.default)?)\.(.+)")

# What changes the meaning of a file beyond scaling · B @ A.
_UNSUPPORTED = {
    "use_dora": "DoRA scales the columns of the sum",
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "arrow_config": "the adapter is chosen by the input",
    "kasa_config": "KaSA truncates the base's weights",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "the factors have biases",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "the factors are random",
    "target_parameters": "the factors are of tensors rather than modules",
    "trainable_token_indices": "single rows of embeddings were trained",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the factors see averaged inputs",
    "velora_config": "VeLoRA is not LoRA",
}
# Starts that leave the base's weights as they are; PiSSA and others subtract from them.
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


class Adapter(NamedTuple):
    """What an adapter does to a base. A tensor may be replaced and then moved.

    Attributes:
      deltas: by name of the base's tensor, what is added to it, in float32.
      replaced: by name of the base's tensor, the tensor that takes its place.
      notes: how its names were understood, where they are not the base's.
    """

    deltas: dict[str, Stored]
    replaced: dict[str, Stored]
    notes: tuple[str, ...] = ()


class _Factors(NamedTuple):
    """`a` is `[rank, in, *window]` and `b` is `[out, rank, *ones]`."""

    a: Stored
    b: Stored
    embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (Path(folder) / CONFIG).is_file()


def read_adapter(folder: str | os.PathLike, base: Mapping[str, Stored]) -> Adapter:
    r"""Finds what a LoRA adapter adds to a base; the tensors are read when used.

    A delta is :math:`s B A` with :math:`s = \alpha / r`, or :math:`\alpha / \sqrt r`
    for rank-stabilised adapters, computed in float32 whatever the adapter's dtype.

    The base may have a prefix in front of its names that the adapter has not, or the
    other way round.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      base: the tensors of the model that the adapter was trained on, by name.

    Raises:
      FileNotFoundError: one of the two files is not there.
      ValueError: the adapter is of a kind that is no plain LoRA, is corrupt, or does
        not fit the base.

    Example:
      >>> adapter = read_adapter("my_lora", base)  # doctest: +SKIP
      >>> adapter.deltas["model.layers.0.mlp.up_proj.weight"].read()  # doctest: +SKIP
    """
    folder = Path(folder)
    config = folders.read_json(folder, CONFIG)
    _check_config(folder, config)
    factors, whole = _split(folder, _open(folder))
    wanted = {f"{module}.weight" for module in factors} | whole.keys()
    names, notes = adapter_names.fit(folder, wanted, base)
    turned = _conv1d(base)
    deltas, lines = {}, []
    for module, pair in factors.items():
        name = names[f"{module}.weight"]
        flag = bool(config.get("fan_in_fan_out"))
        turn = pair.embedding or _is_conv1d(name, base[name].shape, turned, flag)
        rank = _matching(config.get("rank_pattern"), module, config["r"])
        lines += _misfit(module, pair, rank, turn, name, base[name])
        alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        read = functools.partial(_product, pair, scaling, turn, base[name].shape)
        deltas[name] = Stored.made(np.float32, base[name].shape, read)
    replaced = {names[name]: tensor for name, tensor in whole.items()}
    lines += [
        f"! {name}: {base[name]} in the base is replaced by {tensor}"
        for name, tensor in replaced.items()
        if tensor.shape != base[name].shape or not tensor.is_floating
    ]
    if lines:
        raise ValueError(adapter_names.unfit(folder, lines))
    return Adapter(deltas, replaced, notes)


def save_adapter(
    folder: str | os.PathLike, factors: Tree, base: str | os.PathLike, *, alpha: float
) -> None:
    """Writes factors as a LoRA adapter that PEFT loads on top of a checkpoint.

    `peft.PeftModel.from_pretrained(model, folder)` finds the layers by name, so `model`
    must be of the class that the checkpoint's config.json states: with a head, say,
    names begin with `bert.encoder.`, and without one with `encoder.`.

    Args:
      folder: it must not exist. It appears whole or not at all.
      factors: pairs of leaves `lora_a` `[in, r]` and `lora_b` `[r, out]`, beside or
        without their kernels, as `models.lora` has them; other leaves are left out.
      base: the checkpoint that was adapted, a folder or an id of the Hugging Face Hub;
        its tensors' names are those of the adapter, and PEFT's config names it.
      alpha: the scale α; the rank is that of the factors.

    Raises:
      FileExistsError: the folder exists.
      ValueError: there are no factors, they differ in rank, or do not fit the base.

    Example:
      >>> save_adapter("my_lora", params, base, alpha=16)  # doctest: +SKIP
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a folder that does not.")
    pairs = _factors_by_module(factors)
    ranks = {a.shape[-1] for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise ValueError(
            f"factors of the ranks {sorted(ranks)}; expected lora_a and lora_b of one "
            "rank, as `models.lora.init` makes them."
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
            # PyTorch's orientation, [out, in].
            found[f"base_model.model.{target}.lora_{side}.weight"] = factor.T
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
    """What a base model's files may have in front of its modules' names, or nothing.

    A `BertModel` has a module `encoder`, which is `bert.encoder` in the file if that
    was written by a model with a head, or by `save`.
    """
    [architecture, *_] = config.get("architectures") or [""]
    return f"{config.get('model_type')}." if architecture.endswith("Model") else ""


def _factors_by_module(factors):
    """A and B by the module's name, with dots."""
    leaves = tree.flatten(factors)
    return {
        path.removesuffix(f"/{FACTOR_A}").replace("/", "."): (
            np.asarray(a),
            np.asarray(leaves[path.removesuffix(FACTOR_A) + FACTOR_B]),
        )
        for path, a in leaves.items()
        if path.endswith(f"/{FACTOR_A}")
    }


def _open(folder):
    if not (file := folder / folders.ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {folders.ADAPTER}. jaxarith opens no pickle: if there "
            "is an adapter_model.bin, load the adapter in PEFT and save it again."
        )
    tensors, _ = safetensors.open_file(file)
    packed.check(file, tensors, {})
    return tensors


def _check_config(folder, config):
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


def _split(folder, tensors):
    """The pairs of factors by module, and the whole tensors by name."""
    pairs: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    strange = []
    for key, tensor in tensors.items():
        spare = _SPARE.fullmatch(key)
        if spare and f"{spare[1]}.{spare[2]}" in tensors:
            continue
        name = _WRAPPED.sub("", key.removeprefix("base_model.model."))
        place = whole
        if found := _FACTOR.fullmatch(name):
            place = pairs.setdefault(found[1], {})
            name = found[2] or found[3]
        elif "lora_" in name:
            strange.append(key)
        if name in place:
            strange.append(key)
        place[name] = tensor
    if strange or not tensors:
        raise ValueError(
            f"{folder} holds {_some(strange) or 'no tensors'}; expected one plain LoRA "
            "adapter. Other kinds, and several in one file, are not supported: merge "
            "it into a model in PEFT."
        )
    factors = {}
    for module, pair in pairs.items():
        if pair.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise ValueError(
                f"{folder} holds of {module} lora_{' and lora_'.join(sorted(pair))}; "
                "expected an A and a B. The file is incomplete: save the adapter again."
            )
        a, b = (pair[side] for side in sorted(pair))
        factors[module] = _Factors(a, b, "embedding_A" in pair)
    return factors, whole


def _matching(values, module, default):
    """PEFT's rule: the first pattern that fits whole words at the end of the name."""
    for pattern, value in (values or {}).items():
        if patterns.fits_end(pattern, module):
            return value
    return default


def _misfit(module, pair, rank, turned, name, leaf):
    """What is wrong with the shapes of the factors of a module, in no or one line."""
    a, b = pair.a.shape, pair.b.shape
    factors = f"! {module}: A {list(a)} and B {list(b)}"
    if len(a) < 2 or len(a) != len(b) or (a[0], b[1]) != (rank, rank):
        return [f"{factors}, and the rank is {rank} by {CONFIG}"]
    product = (b[0], *a[1:])
    whole = math.prod(b[2:]) == 1 and (product[::-1] if turned else product)
    if whole != leaf.shape or not leaf.is_floating:
        return [f"{factors}, and {name} is {leaf}"]
    return []


def _product(pair, scaling, turned, shape):
    a = pair.a.read().astype(np.float32).reshape(pair.rank, -1)
    b = pair.b.read().astype(np.float32).reshape(-1, pair.rank)
    product = a.T @ b.T if turned else b @ a
    product *= np.float32(scaling)  # in place: no second array of this size
    return product.reshape(shape)


def _conv1d(base: Mapping[str, Stored]) -> dict[str, bool]:
    """Of the matrices that are not square and have a bias, which lie `[in, out]`.

    A bias is as long as the outputs.
    """
    found = {}
    for name, tensor in base.items():
        bias = base.get(name.removesuffix("weight") + "bias")
        if bias is None or len(tensor.shape) != 2:
            continue
        fits = [bias.shape == (length,) for length in tensor.shape]
        if name.endswith(".weight") and sum(fits) == 1:
            found[name] = fits[1]
    return found


def _is_conv1d(name, shape, known, flag):
    """Whether a matrix lies `[in, out]`, as in the layers that GPT-2 calls Conv1D.

    PEFT goes by the class of the layer. Its flag is wrong in the files of models with
    layers of both kinds, and a checkpoint names no classes. Where a matrix is square,
    what is known of another one in the same layer tells.
    """
    if len(shape) != 2:
        return False
    if name in known:
        return known[name]
    if shape[0] != shape[1]:
        return flag
    layer = re.match(r".*\.\d+\.", name)
    relatives = [other for other in known if layer and other.startswith(layer[0])]
    if not relatives:
        return flag
    return known[max(relatives, key=lambda other: _common(other, name))]


def _common(a, b):
    return len(os.path.commonprefix([a.split("."), b.split(".")]))


def _some(names):
    return ", ".join(tree.first_few(names, most=3))
