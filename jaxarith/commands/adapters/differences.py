"""What a model changed of its base, tensor by tensor, and what an adapter can say."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import lazy
from jaxarith.hub import Stored, orientation
from jaxarith.stream import Opened, tying

# Two-dimensional weights that are no linear layers, or whose layers PEFT does not know:
# tables, routers, and experts, which transformers 5 holds in one parameter.
_NOT_LINEAR = re.compile(
    r".*\.experts\.\d+\..*|(.*\.)?(shared|wte|wpe|wtt|tok_embeddings|embed_in|relative_attention_bias|"
    r"relative_attention\w*|codebook\w*|router|(mlp|moe|block_sparse_moe|feed_forward)"
    r"\.gate|(?!\w*(proj|out))\w*embed\w*)\.weight"
)


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
    """The tensors of the one model that differ from the base, read one by one."""
    [tau] = opened.taus
    rows = lazy.rows({name: (tau[name],) for name in opened.base if name in tau})
    for name, row in rows.items():
        [found] = row
        delta = jnp.asarray(found)
        if not bool(jnp.any(delta != 0)):
            continue
        if isinstance(found, lazy.Difference):
            whole = np.asarray(found.model)
        else:  # of an adapter
            start = opened.base[name].read()
            whole = (np.asarray(delta) + start).astype(start.dtype)
        if opened.base[name].is_floating and not np.isfinite(whole).all():
            raise ValueError(lazy.not_finite(name))
        yield Change(name, delta, whole)


def linear(
    base: Mapping[str, Stored], config: Mapping[str, Any], exclude: str | None
) -> dict[str, bool]:
    """The weights of linear layers, and whether each lies `[in, out]`.

    By their names and shapes: a file names no classes. Heads that are tied to an
    embedding are none.

    Args:
      base: the tensors of the base.
      config: the content of its `config.json`.
      exclude: a regular expression of whole names of modules that are none.
    """
    known = orientation.known(base)
    turned = any(known.values())
    tied = tying.pair(base, config) or ()
    return {
        name: orientation.in_out(name, tensor.shape, known, turned)
        for name, tensor in base.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and min(tensor.shape) > 0
        and tensor.is_floating
        and name not in tied
        and not _NOT_LINEAR.fullmatch(name)
        and not re.fullmatch(exclude or "", name.removesuffix(".weight"))
    }
