r"""Reads files of LoRA, LoHa and LoKr that kohya's sd-scripts and LyCORIS write.

The scale is :math:`s = \alpha / r`, or 1 if the file has no :math:`\alpha`. Then

.. math::
    \Delta_\text{LoRA} = s\,U D, \qquad
    \Delta_\text{LoHa} = s\,(A_1 B_1) \odot (A_2 B_2), \qquad
    \Delta_\text{LoKr} = s\,W_1 \otimes W_2.

With `dora_scale`, the sum of base and delta gets new lengths. These files write the
dots in names of modules as underscores, so the base decides which module is meant.

Yeh, Hsieh, Gao, Yang, Oh, Gong. Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation. ICLR 2024. arXiv:2309.14859.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxarith import tree
from jaxarith.hub import packed, safetensors
from jaxarith.hub.adapter_reading import Adapter
from jaxarith.hub.stored import Stored

_KINDS = (
    "lora_up.weight lora_down.weight lora_mid.weight hada_w1_a hada_w1_b hada_w2_a "
    "hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b "
    "lokr_t2 diff diff_b alpha dora_scale"
).split()
_SIGNS = (".lora_down.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".diff")
# Prefixes that name the part of a pipeline that a module belongs to.
_PREFIX = re.compile(r"(lora_(?:unet|te\d?|transformer|prior)|lycoris)_")
# Prefixes of the layers in some classes of a model.
_OUTER = re.compile(r"(diffusion_model|model|transformer|unet|text_model)_")

_Parts = Mapping[str, Stored]


def is_lycoris(file: str | os.PathLike) -> bool:
    """Whether the names of its tensors say that a file is of kohya or LyCORIS."""
    file = Path(file)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    tensors, _ = safetensors.open_file(file)
    return any(name.endswith(_SIGNS) for name in tensors)


def read(file: str | os.PathLike, base: Mapping[str, Stored]) -> Adapter:
    """Finds what a file adds to a base; the tensors are read when used.

    A file may hold adapters of several models, for example of a U-Net and of text
    encoders. Modules of models other than the base are left out, and noted.

    Args:
      file: a safetensors file.
      base: the tensors of one of the models that it was trained on, by name.

    Raises:
      ValueError: the file holds another kind of adapter, is incomplete, or does not fit
        the base.

    Example:
      >>> adapter = read("style.safetensors", unet)  # doctest: +SKIP
    """
    file = Path(file)
    modules = _modules(file)
    names, absent = _places(file, modules, base)
    deltas: dict[str, Stored] = {}
    lines = []
    for module, name in names.items():
        parts = modules[module]
        if "diff_b" in parts:
            bias = name.removesuffix("weight") + "bias"
            if bias not in base or base[bias].shape != parts["diff_b"].shape:
                lines.append(f"! {module} has diff_b {parts['diff_b']} for {bias}")
                continue
            deltas[bias] = _made(base[bias], _wide, parts["diff_b"])
        if (found := _formula(file, module, parts)) is None:
            continue
        shape, make = found
        leaf = base[name]
        if _as_matrix(shape) != _as_matrix(leaf.shape) or not leaf.is_floating:
            lines.append(f"! {module} has shape {list(shape)}, but {name} is {leaf}")
            continue
        deltas[name] = _made(leaf, make)
        if (lengths := parts.get("dora_scale")) is not None:
            if not _fits(lengths, leaf):
                lines.append(f"! {module} has dora_scale {lengths} for {name} {leaf}")
                continue
            deltas[name] = _made(leaf, _dora, deltas[name], lengths, leaf)
    if lines:
        listed = "\n  ".join(tree.first_few(lines))
        raise ValueError(f"{file} does not fit the base:\n  {listed}")
    notes = [
        f"{file}: {_some_of(len(left), prefix)} of another model, and left out"
        for prefix, left in absent.items()
    ]
    return Adapter(deltas, {}, tuple(notes))


def _some_of(count, prefix):
    return tree.counted(count, f"module of {prefix} is", f"modules of {prefix} are")


def _made(leaf: Stored, make: Callable[..., np.ndarray], *args: Stored) -> Stored:
    read = functools.partial(make, *args)
    return Stored.made(np.float32, leaf.shape, lambda: read().reshape(leaf.shape))


def _modules(file: Path) -> dict[str, dict[str, Stored]]:
    """Returns the tensors of each module, by their kinds."""
    tensors, _ = safetensors.open_file(file)
    packed.check(file, tensors, {})
    modules: dict[str, dict[str, Stored]] = {}
    strange = []
    for key, tensor in tensors.items():
        kind = next((kind for kind in _KINDS if key.endswith(f".{kind}")), None)
        if kind is None:
            strange.append(key)
            continue
        modules.setdefault(key.removesuffix(f".{kind}"), {})[kind] = tensor
    if strange:
        raise ValueError(
            f"{file} holds {', '.join(tree.first_few(strange, most=3))}; supported are "
            "LoRA, LoHa, LoKr and full differences (diff) of kohya and LyCORIS. Merge "
            "the file into a model in the program that made it."
        )
    return modules


def _places(
    file: Path, modules: Mapping[str, _Parts], base: Mapping[str, Stored]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns each module's weight in the base, and other models' modules by prefix."""
    whole: dict[str, set[str]] = {}
    ends: dict[str, set[str]] = {}
    for name in base:
        if name.endswith(".weight"):
            pieces = name.removesuffix(".weight").split(".")
            whole.setdefault("_".join(pieces), set()).add(name)
            for i in range(1, len(pieces)):
                ends.setdefault("_".join(pieces[i:]), set()).add(name)
    names: dict[str, str] = {}
    absent: dict[str, list[str]] = {}
    lines = []
    for module in modules:
        prefix = _PREFIX.match(module)
        flat = module[prefix.end() if prefix else 0 :].replace(".", "_")
        found = whole.get(flat) or ends.get(flat) or _inner(flat, whole)
        if len(found) > 1:
            lines.append(f"+ {module} may be {' or '.join(sorted(found)[:3])}")
        elif found:
            names[module] = next(iter(found))
        else:
            absent.setdefault(prefix[1] if prefix else "no prefix", []).append(module)
    fitting = {(_PREFIX.match(module) or ["", "no prefix"])[1] for module in names}
    for prefix in fitting & absent.keys():
        lines += [f"+ {module}: not in the base" for module in absent.pop(prefix)]
    twice = {name for name in names.values() if [*names.values()].count(name) > 1}
    lines += [f"+ two modules are {name}" for name in sorted(twice)]
    if lines or not names:
        lines = lines or [f"+ {next(iter(modules), 'nothing')}: not in the base"]
        listed = "\n  ".join(tree.first_few(lines))
        raise ValueError(
            f"{file} does not fit the base:\n  {listed}\nGive the part of the model "
            "that it was trained on, with the same names."
        )
    return names, absent


def _inner(flat, whole):
    """Returns the base's tensors whose names lack the prefix of the module's name."""
    while outer := _OUTER.match(flat):
        flat = flat[outer.end() :]
        if found := whole.get(flat):
            return found
    return set()


def _formula(
    file: Path, module: str, parts: _Parts
) -> tuple[tuple[int, ...], Callable[[], np.ndarray]] | None:
    """Returns the shape of a module's delta and a function that computes it."""
    kinds = parts.keys() - {"alpha", "dora_scale", "diff_b"}
    make = next((make for needed, make in _FORMULAS if set(kinds) in needed), None)
    if not kinds and "diff_b" in parts:
        return None
    if make is None:
        raise ValueError(
            f"{file} holds {', '.join(sorted(kinds)) or 'no factors'} for {module}; "
            "expected LoRA, LoHa or LoKr. The file is incomplete: save it again."
        )
    try:
        return make(parts)
    except (IndexError, ValueError):
        shapes = ", ".join(f"{kind} {parts[kind]}" for kind in sorted(kinds))
        raise ValueError(
            f"{file} holds {shapes} for {module}, whose ranks do not match. Save the "
            "file again."
        ) from None


def _check(*ranks: int) -> None:
    """Raises a ValueError if sizes that meet in a product differ."""
    if len({*ranks}) > 1:
        raise ValueError("the ranks do not match")


def _scale(parts: _Parts, rank: int) -> np.float32:
    alpha = float(parts["alpha"].read().reshape(())) if "alpha" in parts else 0.0
    return np.float32(alpha / rank if alpha else 1.0)


def _wide(tensor: Stored) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _lora(parts):
    up, down, mid = (parts.get(f"lora_{kind}.weight") for kind in ("up", "down", "mid"))
    rank = down.shape[0]
    _check(rank, up.shape[1], *(mid.shape[:2] if mid is not None else ()))
    window = down.shape[2:] if mid is None else mid.shape[2:]

    def make():
        left, right = _wide(up).reshape(-1, rank), _wide(down).reshape(rank, -1)
        if mid is None:
            return _scale(parts, rank) * (left @ right)
        return _scale(parts, rank) * _tucker(_wide(mid), left.T, right)

    return (up.shape[0], down.shape[1], *window), make


def _tucker(middle, left, right):
    """Returns a convolution `[out, in, *window]` from a small one and two matrices.

    Args:
      middle: `[r, r, *window]`.
      left: `[r, out]`.
      right: `[r, in]`.
    """
    return np.einsum("ij...,ip,jq->pq...", middle, left, right, optimize=True)


def _loha(parts):
    a1, b1, a2, b2 = (parts[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    middle = parts.get("hada_t1")
    rank = b1.shape[0]
    axis = 1 if middle is None else 0
    _check(a1.shape[axis], rank)
    _check(a2.shape[axis], b2.shape[0])
    _check(a1.shape[1 - axis], a2.shape[1 - axis])
    _check(b1.shape[1], b2.shape[1])
    for i, side in ((1, rank), (2, b2.shape[0])) if middle is not None else ():
        _check(side, *parts[f"hada_t{i}"].shape[:2])

    def make():
        pairs = [(_wide(a1), _wide(b1)), (_wide(a2), _wide(b2))]
        if middle is None:
            one, other = (a @ b for a, b in pairs)
        else:
            middles = (_wide(parts[f"hada_t{i}"]) for i in (1, 2))
            one, other = (
                _tucker(t, *pair) for t, pair in zip(middles, pairs, strict=True)
            )
        return _scale(parts, rank) * one * other

    if middle is None:
        return (a1.shape[0], b1.shape[1]), make
    return (a1.shape[1], b1.shape[1], *middle.shape[2:]), make


def _lokr(parts):
    small = [parts[x] for x in ("lokr_w1_b", "lokr_w2_b") if x in parts]
    ranks = [tensor.shape[0] for tensor in small]
    one = _side(parts, "w1")
    other = _side(parts, "w2")

    def make():
        first, second = one[1](), other[1]()
        first = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
        product = np.kron(first, second)
        return product * (_scale(parts, ranks[0]) if ranks else np.float32(1))

    (a, c), (b, d, *window) = one[0], other[0]
    return (a * b, c * d, *window), make


def _side(parts, name):
    """Returns the shape of one side of a Kronecker product and a function for it."""
    if (whole := parts.get(f"lokr_{name}")) is not None:
        return whole.shape, functools.partial(_wide, whole)
    a, b = (parts[f"lokr_{name}_{side}"] for side in "ab")
    middle = parts.get("lokr_t2") if name == "w2" else None
    _check(a.shape[1 if middle is None else 0], b.shape[0])
    if middle is None:
        return (a.shape[0], *b.shape[1:]), lambda: np.tensordot(_wide(a), _wide(b), 1)
    _check(b.shape[0], *middle.shape[:2])
    shape = (a.shape[1], b.shape[1], *middle.shape[2:])
    return shape, lambda: _tucker(_wide(middle), _wide(a), _wide(b))


def _diff(parts):
    return parts["diff"].shape, functools.partial(_wide, parts["diff"])


_LORA = {"lora_up.weight", "lora_down.weight"}
_LOHA = {f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}
_W1, _W2 = ({f"lokr_{w}_a", f"lokr_{w}_b"} for w in ("w1", "w2"))
# The formulas, by the kinds of tensors that a module has.
_FORMULAS = (
    ((_LORA, _LORA | {"lora_mid.weight"}), _lora),
    ((_LOHA, _LOHA | {"hada_t1", "hada_t2"}), _loha),
    (
        [
            first | second
            for first in ({"lokr_w1"}, _W1)
            for second in ({"lokr_w2"}, _W2, _W2 | {"lokr_t2"})
        ],
        _lokr,
    ),
    (({"diff"},), _diff),
)


def _as_matrix(shape):
    """Returns a layer's shape as a matrix: a window may be of size 1, or flattened."""
    return (*shape[:1], math.prod(shape[1:]))


def _fits(lengths, leaf):
    """Whether the lengths are one for each output, or one for each input."""
    shape = leaf.shape
    ones = (1,) * len(shape[2:])
    return lengths.shape in ((shape[0], 1, *ones), (1, shape[1], *ones))


def _dora(delta, lengths, leaf):
    start = _wide(leaf)
    moved = start + delta.read()
    wanted = _wide(lengths)
    axes = tuple(i for i, size in enumerate(wanted.shape) if size == 1)
    norms = np.sqrt(np.sum(np.square(moved), axis=axes, keepdims=True))
    moved *= wanted / (norms + np.finfo(np.float32).eps)  # as LyCORIS does
    return moved - start
