"""Computes leaves of trees from tensors in files."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import lazy
from jaxarith.hub import Stored


def widened(dtype: np.dtype, array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns the array in a dtype; a NumPy array stays a NumPy array."""
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    return jnp.asarray(array, dtype)


def moved(
    source: Callable[[Stored, str], lazy.Source],
    label: str,
    *,
    layout: Stored,
    base: lazy.Source | None,
    model: Stored | None,
    delta: Stored | None,
) -> lazy.Leaf:
    """Returns a task vector's leaf: `model + delta - base`, without those missing."""
    shape = layout.shape
    found: dict[str, lazy.Source] = {}
    dtypes = []
    if model is not None:
        found["model"] = source(_cut(model, shape), label)
        dtypes.append(model.dtype)
    if base is not None:
        dtypes.append(layout.dtype)
        if model is not None:
            found["base"] = base
    if delta is not None:
        found["delta"] = source(_cut(delta, shape), f"the adapter of {label}")
    if delta is not None or base is not None:
        dtypes.append(np.dtype(np.float32))
    combine = functools.partial(_combine, tuple(found), shape)
    return lazy.Leaf(shape, common_dtype(*dtypes), found.values(), combine)


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """Returns the dtype of JAX that holds the values of all dtypes."""
    return jax.dtypes.canonicalize_dtype(_promoted(*dtypes))  # JAX may have no float64


@functools.cache  # there are many leaves, but few dtypes
def _promoted(*dtypes):
    return functools.reduce(jnp.promote_types, dtypes)


def _cut(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    """Returns the tensor without rows beyond those of a shape."""
    if tensor.shape == shape:
        return tensor
    return tensor.rows(min(tensor.shape[0], shape[0]))


def _combine(
    names: Sequence[str], shape: tuple[int, ...], *arrays: jax.Array
) -> jax.Array | lazy.Difference:
    found: Mapping[str, jax.Array] = dict(zip(names, arrays, strict=True))
    model, base, delta = (found.get(name) for name in ("model", "base", "delta"))
    if delta is not None and delta.shape != shape:  # its model has fewer rows
        more = shape[0] - len(delta)
        delta = jnp.pad(delta, [(0, more), *[(0, 0)] * (delta.ndim - 1)])
    if model is None:
        assert delta is not None  # a leaf of a task vector has one of the two
        return delta
    if base is None:
        moved = model
    elif model.shape == shape:
        moved = lazy.Difference(model, base)
    else:  # rows that the model lacks do not move
        moved = lazy.Difference(jnp.concatenate([model, base[len(model) :]]), base)
    return moved if delta is None else jnp.asarray(moved, jnp.float32) + delta
