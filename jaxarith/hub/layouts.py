"""Translates the names in a checkpoint, and checks that its tensors fit a model.

A layout is the tree of shapes and dtypes that a model expects, with the names of
Hugging Face's Flax models. PyTorch's names and orientations follow from it:
`a.b.weight` is whichever of `a/b/kernel` (transposed), `a/b/scale`, `a/b/embedding`
and `a/b/weight` the model has. `hub` does the reading and writing.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxarith import tree
from jaxarith.hub.stored import Stored, described

_SHOWN = 8  # an error lists at most this many leaves of a module, or else their number

# Buffers that older versions of transformers saved with the parameters.
_NOT_PARAMETERS = re.compile(r"(.*[./])?position_ids")
# Flax's names for a leaf. The files of Google's BERT still use TensorFlow's names for
# the scale and bias of a norm.
_LEAVES = {
    "weight": ("kernel", "scale", "embedding", "weight"),
    "gamma": ("scale",),
    "beta": ("bias",),
}


def to_flax(stored: Mapping[str, Stored], paths: Collection[str]) -> dict[str, Stored]:
    """Renames tensors with PyTorch's or Flax's names to the paths of a layout.

    Tensors with PyTorch's names are transposed to Flax's orientations. Names that do
    not fit are also tried under each key at the top of the layout, because transformers
    5 writes a `CLIPVisionModel` without `vision_model.` in front. Tensors that fit
    nowhere keep their names, with slashes.
    """
    names = [name for name in stored if not _NOT_PARAMETERS.fullmatch(name)]

    def fitting(top):
        return sum(_flax_path(f"{top}.{name}", paths) in paths for name in names)

    top = max(_tops(paths), key=fitting)
    leaves = {}
    for name in names:
        path = _flax_path(name, paths)
        prefixed = _flax_path(f"{top}.{name}", paths)
        if path not in paths and prefixed in paths:
            path = prefixed
        leaf = stored[name]
        if path.endswith("/kernel") and name.endswith(".weight"):
            leaf = _transposed(leaf)
        # The model does not expect a second tensor for the same leaf.
        leaves[name if path in leaves else path] = leaf
    return leaves


def without_extras(
    stored: Mapping[str, Stored],
    paths: Collection[str],
    ignore: str | None,
    copies: Mapping[str, str],
) -> dict[str, Stored]:
    """Removes the tensors that a model does not need from the result of `to_flax`.

    Args:
      stored: tensors by path; those outside the layout by their own names, with
        slashes.
      paths: the paths of the layout.
      ignore: pattern for whole names outside the layout; those tensors are left out.
      copies: `{name: path}`. Tensor `name` is outside the layout and tied to leaf
        `path`; the file may hold one of them or both. Names here and in `ignore` may
        have a key at the top of the layout in front.

    Raises:
      ValueError: a copy differs from the leaf that the model ties it to.
    """
    tops = _tops(paths)

    def spellings(name):
        top, _, rest = name.partition("/")
        return {name, rest if top in tops else name}

    kept = {path: leaf for path, leaf in stored.items() if path in paths}
    for name in [name for name in stored if name not in kept]:
        path = next((copies[n] for n in spellings(name) if n in copies), None)
        if path is not None and path in paths:
            _check_copy(name, stored[name], path, kept.setdefault(path, stored[name]))
        elif not ignore or not any(re.fullmatch(ignore, n) for n in spellings(name)):
            kept[name] = stored[name]
    return kept


def _check_copy(name, copy, path, leaf):
    if copy is leaf or np.array_equal(copy.read(), leaf.read()):
        return
    raise ValueError(
        f"the checkpoint holds {name} {copy} and {path} {leaf} with different values. "
        "The model ties the two, so one of them would be lost. The checkpoint has "
        "another architecture, or was trained untied: use the model that it was made "
        "with."
    )


def _tops(paths):
    return sorted({path.split("/")[0] for path in paths})


def _flax_path(name, paths):
    path = name.replace(".", "/")
    module, _, last = path.rpartition("/")
    leaves = _LEAVES.get(last, ()) if module else ()
    candidates = (f"{module}/{leaf}" for leaf in leaves)
    return next((candidate for candidate in candidates if candidate in paths), path)


# PyTorch's kernels are [out, in, *window], and Flax's are [*window, in, out].


def _transposed(leaf):
    if len(leaf.shape) < 2:
        return leaf  # its shape is wrong, which `check` reports
    return _turned(leaf, (*range(2, len(leaf.shape)), 1, 0))


def _turned(leaf, axes):
    if axes is None:
        return leaf
    shape = tuple(leaf.shape[axis] for axis in axes)
    return Stored.made(leaf.dtype, shape, lambda: leaf.read().transpose(axes))


def to_torch(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts arrays by slash path to PyTorch's names and orientations.

    Raises:
      ValueError: two leaves get the same name, for example a module's kernel and scale,
        which would both be its weight.
    """
    names = _torch_names(leaves)
    axes = {path: _torch_axes(path, array.ndim) for path, array in leaves.items()}
    return {
        names[path]: array if axes[path] is None else array.transpose(axes[path])
        for path, array in leaves.items()
    }


def stored_to_torch(leaves: Mapping[str, Stored]) -> dict[str, Stored]:
    """Like `to_torch`, for tensors that are not read yet."""
    names = _torch_names(leaves)
    return {
        names[path]: _turned(leaf, _torch_axes(path, len(leaf.shape)))
        for path, leaf in leaves.items()
    }


def _torch_names(paths):
    owners: dict[str, str] = {}
    for path in paths:
        name = re.sub(r"/(kernel|scale|embedding)$", "/weight", path).replace("/", ".")
        if name in owners:
            raise ValueError(
                f"{path} and another leaf would both be saved as {name}. Rename one."
            )
        owners[name] = path
    return {path: name for name, path in owners.items()}


def _torch_axes(path, ndim):
    """Returns the axes that transpose a kernel; None for other leaves."""
    if not path.endswith("/kernel") or ndim < 2:
        return None
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def check(file: Path, layout: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raises one ValueError that lists every path in which `stored` and layout differ.

    Args:
      file: the file to name in the message.
      layout: the expected leaves by slash path, with `shape` and `dtype`.
      stored: the leaves of the checkpoint by slash path.
    """
    expected = {
        path: described(leaf.dtype, leaf.shape) for path, leaf in layout.items()
    }
    missing = {path: leaf for path, leaf in expected.items() if path not in stored}
    unexpected = {path: leaf for path, leaf in stored.items() if path not in expected}
    different = [
        f"! {path}: model {expected[path]}, checkpoint {stored[path]}"
        for path, leaf in layout.items()
        if path in stored
        and (stored[path].shape != tuple(leaf.shape) or not stored[path].is_floating)
    ]
    if not (missing or unexpected or different):
        return
    lines = [
        f"{file} does not match the model.",
        *_section("in the model but not in the checkpoint", "-", missing),
        *_section("in the checkpoint but not in the model", "+", unexpected),
    ]
    if different:
        lines.append(f"  shape or dtype differs ({len(different)}):")
        lines += [f"    {line}" for line in tree.first_few(different)]
    lines.append(_advice(expected, missing, unexpected, different))
    raise ValueError("\n".join(lines))


def _section(title, sign, leaves):
    by_top: dict[str, list[str]] = {}
    for path in leaves:
        by_top.setdefault(path.split("/")[0], []).append(path)
    lines = [f"  {title} ({len(leaves)}):"] if leaves else []
    for paths in by_top.values():
        if len(paths) > _SHOWN:
            module = os.path.commonprefix([path.split("/")[:-1] for path in paths])
            below = tree.counted(len(paths), "leaf", "leaves")
            lines.append(f"    {sign} {'/'.join(module)}/...  ({below})")
        else:
            lines += [f"    {sign} {path}  {leaves[path]}" for path in paths]
    return lines


def _advice(expected, missing, unexpected, different):
    lost = {path.split("/")[0] for path in missing}
    whole = [path for path in expected if path not in missing]
    held = dict.fromkeys(path.split("/")[0] for path in whole)
    if missing and held and not different and not lost.intersection(held):
        patterns = "|".join(top if top in expected else f"{top}/.*" for top in held)
        return (
            f"The checkpoint holds only {', '.join(held)}. Use hub.load(folder, "
            f'layout, select="{patterns}") and take the rest from another checkpoint.'
        )
    if unexpected and not missing and not different:
        call = 'hub.load(folder, layout, select=".*")'
        return f"If the model does not need these leaves, use {call}."
    return (
        "Use the model and the config.json that belong to this checkpoint, or download "
        "it again."
    )
