"""Files of curvature: safetensors with the fingerprint of θ0, and without code."""

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

    The file holds second moments of the layers' inputs and gradients. They are
    statistics of the data; they do not protect it in any formal sense.

    Args:
      path: path of the file; an older file is replaced.
      curvature: result of `collect`, `merge`, `correct` or `eigen`.
      metadata: additional texts to store in the file, for example the task's name.

    Raises:
      ValueError: it is not curvature, it holds NaN or infinite values, or `metadata`
        has a key that the format uses.

    Example:
      >>> save("cars.safetensors", factors, {"task": "cars"})  # doctest: +SKIP
    """
    if not isinstance(curvature, Curvature):
        raise ValueError(
            f"found {type(curvature).__name__}; expected Factors or EigenFactors, the "
            "results of curvature.collect, merge, eigen and correct."
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
            f"the metadata have the key {clash[0]!r}, which the format uses itself. "
            "Rename the key."
        )
    arrays = {k: v for k, v in vars(curvature).items() if k not in _STATIC}
    hub.save_tree(path, arrays, {**own, **(metadata or {})})


def load(path: str | os.PathLike, params_0: Params) -> tuple[Curvature, dict[str, str]]:
    """Reads a file that `save` wrote.

    Args:
      path: path of the file.
      params_0: the parameters at which the curvature must have been measured.

    Returns:
      The curvature, in NumPy arrays, and the metadata that were passed to `save`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, holds no curvature, holds matrices that are not
        symmetric or fit no layer, or belongs to other parameters.

    Example:
      >>> factors, metadata = load("cars.safetensors", params_0)  # doctest: +SKIP
    """
    nested, metadata = hub.load_tree(path)
    own = {key: metadata.pop(key, "") for key in ("format", "kind", *_STATIC)}
    if own["format"] != _FORMAT or own["kind"] not in _KINDS:
        raise ValueError(
            f"{path} has the format {own['format']!r} and the kind {own['kind']!r}; "
            f"expected {_FORMAT!r} and {' or '.join(_KINDS)}. Write it with "
            "curvature.save of this version of jaxarith, or update jaxarith."
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
            f"{path} is damaged: its layers do not have the form that curvature.save "
            f"writes ({type(error).__name__}: {error}). Collect the curvature again."
        ) from error
    check_base(found, params_0)
    _check_shapes(path, found, params_0)
    return found, metadata


def _check_shapes(path, curvature, params_0):
    """Refuses shapes that the product would broadcast, or fail on during training."""
    leaves = tree.flatten(params_0)

    def refuse(name, why):
        raise ValueError(f"{path} is damaged: {name} {why}. Collect it again.")

    if isinstance(curvature, Factors) and curvature.sharing not in (
        None,
        *get_args(Sharing),
    ):
        refuse("sharing", f"is {curvature.sharing!r}")
    if np.shape(curvature.samples) != () or isinstance(curvature.samples, dict):
        refuse("the number of samples", "is missing or not a scalar")
    measured = {*curvature.full, *curvature.diagonal}
    for layer in curvature.layers:
        paths = {*layer.kernels, *layer.biases}
        if unknown := paths - leaves.keys():
            names = ", ".join(map(str, unknown))
            refuse(f"a layer of {names}", "is not among the parameters")
        measured |= paths
        w = jax.eval_shape(lambda x, la=layer: matrices.matrix(la, x), leaves)
        for field, size in zip(("inputs", "outputs"), w.shape, strict=True):
            name = f"{field} of {layer.name}"
            if layer.name not in getattr(curvature, field):
                refuse(name, "is missing")
            found = getattr(curvature, field)[layer.name]
            width = found.shape[-1]
            blocks = found.shape[-3] if found.ndim == 4 else 1
            padding = width * blocks - size  # padding of the last of several blocks
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
        refuse("the sketch", f"and the measured leaves differ, first in {missing[0]}")
    if len({len(rows) for rows in curvature.sketch.values()}) > 1:
        refuse("the sketch", "has different numbers of rows for different leaves")
    for name, rows in curvature.sketch.items():
        if rows.shape[1:] != np.shape(leaves.get(name, ())):
            refuse(f"the sketch of {name}", f"has shape {list(rows.shape)}")


def _check_values(curvature, name, shape, refuse):
    """Refuses divisors or eigenvalues that do not fit the matrix of a layer.

    `shape` is the shape of this matrix.
    """
    if isinstance(curvature, EigenFactors):
        field, expected = "eigenvalues", tuple(shape)
    else:
        field, expected = "divisors", curvature.inputs[name].shape[:1]
        if curvature.outputs[name].shape[:1] != expected:
            refuse(f"inputs and outputs of {name}", "have different numbers of terms")
    values = getattr(curvature, field)
    if name not in values:
        refuse(f"{field} of {name}", "are missing")
    if values[name].shape != expected:
        refuse(f"{field} of {name}", f"have shape {list(values[name].shape)}")


def _is_symmetric(matrices):
    tolerance = 1e-4 * np.abs(matrices).max(initial=0)
    return np.allclose(matrices, np.swapaxes(matrices, -1, -2), rtol=0, atol=tolerance)
