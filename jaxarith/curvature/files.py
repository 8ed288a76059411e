"""Files of curvature: safetensors, with the fingerprint of θ0 and no code in them."""

import dataclasses
import json
import os
from typing import Any, get_args

import jax
import numpy as np

from jaxarith import hub, tree
from jaxarith.curvature import matrices
from jaxarith.curvature.factors import (
    Curvature,
    EigenFactors,
    Factors,
    Sharing,
    check_base,
)
from jaxarith.curvature.matrices import Layer
from jaxarith.typing import Params

_KINDS: dict[str, type[Factors] | type[EigenFactors]] = {
    "factors": Factors,
    "eigenfactors": EigenFactors,
}
_FORMAT = "jaxarith.curvature 1"
_STATIC = ("layers", "base", "sharing")


def save(
    path: str | os.PathLike,
    curvature: Curvature,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes curvature to one safetensors file.

    Second moments of a layer's inputs and gradients are in it: they are statistics of
    the data, and no formal protection of it.

    Args:
      path: the file; an older one is replaced.
      curvature: what `collect`, `merge`, `correct` or `eigen` gives.
      metadata: more of what the file says about itself, such as the task's name.

    Raises:
      ValueError: it is no curvature, holds NaN or infinite values, or `metadata` has a
        key that the format uses.
    """
    if not isinstance(curvature, Curvature):
        raise ValueError(
            f"found {type(curvature).__name__}; expected what curvature.collect, merge "
            "or eigen gives."
        )
    kind = next(name for name, c in _KINDS.items() if isinstance(curvature, c))
    own = {
        "format": _FORMAT,
        "kind": kind,
        "base": f"{curvature.base:08x}",
        "layers": json.dumps(curvature.layers),
        "sharing": json.dumps(getattr(curvature, "sharing", None)),
    }
    if clash := sorted(own.keys() & (metadata or {}).keys()):
        raise ValueError(
            f"the metadata have the key {clash[0]!r}, which the format uses itself; "
            "give it another name."
        )
    arrays = {k: v for k, v in vars(curvature).items() if k not in _STATIC}
    hub.save_tree(path, arrays, {**own, **(metadata or {})})


def load(path: str | os.PathLike, params_0: Params) -> tuple[Curvature, dict[str, str]]:
    """Reads what `save` wrote.

    Args:
      path: the file.
      params_0: the parameters that the curvature must be of.

    Returns:
      The curvature, in NumPy arrays as it was saved, and the metadata that `save` got.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is corrupt, holds no curvature, or matrices that are not
        symmetric or fit no layer; or it is of other parameters.
    """
    nested, metadata = hub.load_tree(path)
    own = {key: metadata.pop(key, "") for key in ("format", "kind", *_STATIC)}
    if own["format"] != _FORMAT or own["kind"] not in _KINDS:
        raise ValueError(
            f"{path} is of the format {own['format']!r} and of the kind "
            f"{own['kind']!r}; expected {_FORMAT!r} and {' or '.join(_KINDS)}. Write "
            "it with curvature.save of this version of jaxarith, or update jaxarith."
        )
    kind = _KINDS[own["kind"]]
    names = {field.name for field in dataclasses.fields(kind)}
    try:
        layers = [
            Layer(tuple(kernels), tuple(biases), bool(out_first))
            for kernels, biases, out_first in json.loads(own["layers"])
        ]
        parts: dict[str, Any] = {name: {} for name in names}
        for name, leaf in tree.flatten(nested).items():
            field, _, place = name.partition("/")
            if place:
                parts[field][place] = leaf
            else:
                parts[field] = leaf
        static = {
            "layers": tuple(layers),
            "base": int(own["base"], 16),
            "sharing": json.loads(own["sharing"]),
        }
        found = kind(**parts | {k: v for k, v in static.items() if k in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: its layers are not what curvature.save writes "
            f"({type(error).__name__}: {error}). Collect the curvature again."
        ) from error
    check_base(found, params_0)
    _check_shapes(path, found, params_0)
    return found, metadata


def _check_shapes(path, curvature, params_0):
    """Finds what the product would broadcast, or fail on in the middle of a step."""
    leaves = tree.flatten(params_0)

    def refuse(name, why):
        raise ValueError(f"{path} is damaged: {name} {why}. Collect it again.")

    if isinstance(curvature, Factors) and curvature.sharing not in (
        None,
        *get_args(Sharing),
    ):
        refuse("sharing", f"is {curvature.sharing!r}")
    if np.shape(curvature.samples) != () or isinstance(curvature.samples, dict):
        refuse("the number of samples", "is missing or no scalar")
    measured = {*curvature.full, *curvature.diagonal}
    for layer in curvature.layers:
        paths = {*layer.kernels, *layer.biases}
        if unknown := paths - leaves.keys():
            names = ", ".join(map(str, unknown))
            refuse(f"a layer of {names}", "is none of the parameters")
        measured |= paths
        w = jax.eval_shape(lambda x, la=layer: matrices.matrix(la, x), leaves)
        for field, size in zip(("inputs", "outputs"), w.shape, strict=True):
            name = f"{field} of {layer.name}"
            if layer.name not in getattr(curvature, field):
                refuse(name, "is missing")
            found = getattr(curvature, field)[layer.name]
            width = found.shape[-1]
            blocks = found.shape[-3] if found.ndim == 4 else 1
            padding = width * blocks - size  # of the last of several blocks
            if not 0 <= padding < (width if blocks > 1 else 1):
                refuse(name, f"has shape {list(found.shape)} for a side of {size}")
            if isinstance(curvature, Factors) and not _is_symmetric(found):
                refuse(name, "is not symmetric")
        _check_values(curvature, layer.name, w.shape, refuse)
    for name, block in curvature.full.items():
        if block.shape != (np.size(leaves.get(name, ())),) * 2:
            refuse(f"the block of {name}", f"has shape {list(block.shape)}")
    for name, squares in curvature.diagonal.items():
        if squares.shape != np.shape(leaves.get(name, ())):
            refuse(f"the diagonal of {name}", f"has shape {list(squares.shape)}")
    if curvature.sketch and curvature.sketch.keys() != measured:
        missing = sorted(measured ^ curvature.sketch.keys())
        refuse("the sketch", f"is not of the leaves measured, as for {missing[0]}")
    if len({len(rows) for rows in curvature.sketch.values()}) > 1:
        refuse("the sketch", "has other numbers of rows by leaf")
    for name, rows in curvature.sketch.items():
        if rows.shape[1:] != np.shape(leaves.get(name, ())):
            refuse(f"the sketch of {name}", f"has shape {list(rows.shape)}")


def _check_values(curvature, name, shape, refuse):
    """Finds divisors that are not those of all terms, or eigenvalues of another matrix.

    The matrix of the layer has this shape.
    """
    if isinstance(curvature, EigenFactors):
        field, expected = "eigenvalues", tuple(shape)
    else:
        field, expected = "divisors", curvature.inputs[name].shape[:1]
        if curvature.outputs[name].shape[:1] != expected:
            refuse(f"inputs and outputs of {name}", "have other numbers of terms")
    values = getattr(curvature, field)
    if name not in values:
        refuse(f"{field} of {name}", "are missing")
    if values[name].shape != expected:
        refuse(f"{field} of {name}", f"have shape {list(values[name].shape)}")


def _is_symmetric(matrices):
    tolerance = 1e-4 * np.abs(matrices).max(initial=0)
    return np.allclose(matrices, np.swapaxes(matrices, -1, -2), rtol=0, atol=tolerance)
