"""Finds the tensors that a model changed in its base, one by one."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import lazy
from jaxarith.stream import Opened


class Change(NamedTuple):
    """A tensor that differs.

    Attributes:
      name: its name in the base.
      delta: `model - base`, in float32 or better.
      whole: the model's tensor, in its dtype.
    """

    name: str
    delta: jax.Array
    whole: np.ndarray


def changes(opened: Opened) -> Iterator[Change]:
    """Yields the tensors of the one model that differ from the base, read one by one.

    Raises:
      ValueError: a tensor has NaN or infinite values.
    """
    [tau] = opened.taus
    rows = lazy.rows({name: (tau[name],) for name in opened.base if name in tau})
    for name, row in rows.items():
        [found] = row
        delta = jnp.asarray(found)
        if not bool(jnp.any(delta != 0)):
            continue
        if isinstance(found, lazy.Difference):
            whole = np.asarray(found.model)
        else:  # the model is an adapter
            start = opened.base[name].read()
            whole = (np.asarray(delta) + start).astype(start.dtype)
        if opened.base[name].is_floating and not np.isfinite(whole).all():
            raise ValueError(lazy.not_finite(name))
        yield Change(name, delta, whole)
