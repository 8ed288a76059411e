"""Merges adapters to one adapter, layer by layer.

Linear methods have an exact result; its rank is the sum of the ranks:

.. math:: \\sum_t c_t B_t A_t = [c_1 B_1 \\cdots c_T B_T]\\,[A_1; \\cdots; A_T].

Its best approximation of a lower rank is computed from the QR factors of the two sides.
Other methods merge in core space (`merge.core`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import lazy, merge, tree
from jaxarith.commands.adapters.opened import Adapters, Product
from jaxarith.hub import Stored
from jaxarith.merge.core import Factors
from jaxarith.typing import Params, Taus

Method = Callable[[Params, Taus], Params]


class Merged(NamedTuple):
    """The merged factors of a layer.

    Attributes:
      module: name of the layer.
      product: the delta, in float64.
      energy: the share of the squared norm that the factors keep.
      squared_norm: squared norm that the factors keep.
    """

    module: str
    product: Product
    energy: float
    squared_norm: float


class Whole(NamedTuple):
    """A tensor that adapters replace (`modules_to_save`).

    Attributes:
      tensors: the tensor of each adapter; None if the adapter keeps the base's.
      start: the tensor of the base; None if it is not available.
    """

    tensors: list[Stored | None]
    start: Stored | None


def coefficients(
    method: Method, adapters: Adapters, whole: Mapping[str, Whole]
) -> dict[str, np.ndarray]:
    """Returns the coefficients `[adapter]` of a linear method, by tensor.

    They are the method's results for unit vectors.
    """
    names = [*map(_name, adapters.layers), *whole]
    count = len(adapters.folders)
    units = [dict.fromkeys(names, unit) for unit in np.eye(count)]
    zeros = dict.fromkeys(names, np.zeros(count))
    return {
        path: np.asarray(leaf)
        for path, leaf in tree.flatten(method(zeros, units)).items()
    }


def _name(module: str) -> str:
    """Returns the name of a layer's weight, which methods see."""
    return f"{module}.weight"


def linear(
    adapters: Adapters, coefs: Mapping[str, np.ndarray], rank: int | None
) -> Iterator[Merged]:
    """Yields the weighted sums of the deltas, layer by layer.

    Args:
      adapters: the adapters.
      coefs: the coefficients by tensor.
      rank: the largest rank; None keeps the sum of the ranks.
    """
    for module in adapters.layers:
        given = adapters.products(module)
        scaled = [
            Product(coef * product.left, product.right)
            for coef, product in zip(coefs[_name(module)], given, strict=True)
            if product is not None
        ]
        left = np.concatenate([product.left for product in scaled], axis=1)
        right = np.concatenate([product.right for product in scaled])
        total = Product(left, right)
        if rank is not None and rank < total.rank:
            yield _truncated(module, total, rank)
        else:
            squared_norm = float(np.sum((left.T @ left) * (right @ right.T)))
            yield Merged(module, total, 1.0, squared_norm)


def _truncated(module: str, product: Product, rank: int) -> Merged:
    """Returns the best product of a rank, from the small core between QR factors."""
    q_left, r_left = np.linalg.qr(product.left)
    q_right, r_right = np.linalg.qr(product.right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept, total = np.sum(s[:rank] ** 2), np.sum(s**2)
    roots = np.sqrt(s[:rank])
    best = Product(
        q_left @ (u[:, :rank] * roots), (roots[:, None] * vt[:rank]) @ q_right.T
    )
    return Merged(module, best, float(kept / total) if total else 1.0, float(kept))


def in_core_space(
    method: Method,
    adapters: Adapters,
    whole: Mapping[str, Whole],
    rank: int | None,
    place: Callable[[str, np.ndarray], None],
) -> Iterator[Merged]:
    """Merges the cores of all layers with a method.

    Factors are read twice, one layer after another: before the method is called and
    after it. In between, only the cores are kept.

    Args:
      method: the method.
      adapters: the adapters.
      whole: tensors that are merged as they are, by name, each with the base's.
      rank: the largest rank; None keeps the sum of the ranks.
      place: `place(name, merged)` writes a merged whole tensor.
    """
    count = len(adapters.folders)
    taus: list[dict] = [{} for _ in range(count)]
    for module in adapters.layers:
        cores = _cores(module, adapters.products(module))
        for tau, found in zip(taus, cores, strict=True):
            tau[_name(module)] = found
    found: dict[str, np.ndarray] = {}

    def put(name: str, merged: jax.Array) -> None:
        if name in whole:
            place(name, np.asarray(merged))
        else:
            found[name] = np.asarray(merged)

    params_0 = {
        name: lazy.Leaf(
            leaf.shape,
            leaf.dtype,
            (),
            functools.partial(jnp.zeros, leaf.shape, leaf.dtype),
            functools.partial(put, name),
        )
        for name, leaf in taus[0].items()
    }
    for name, leaf in whole.items():
        assert leaf.start is not None
        start = _source(f"{name} of the base", leaf.start)
        params_0[name] = _leaf(leaf.start, [start], _in_float32, name, put)
        for tau, tensor in zip(taus, leaf.tensors, strict=True):
            if tensor is not None:
                sources = [_source(f"{name} of an adapter", tensor), start]
                tau[name] = _leaf(tensor, sources, lazy.Difference)
    for name, leaf in tree.flatten(method(params_0, taus)).items():
        if not isinstance(leaf, lazy.Leaf):
            put(name, leaf)
    for module in adapters.layers:
        result = found[_name(module)]
        most = rank or sum(adapters.ranks(module))
        yield _in_core_space(
            module,
            adapters.products(module),
            lambda params_0, _, result=result: dict.fromkeys(params_0, result),
            most,
        )


def _source(label, tensor):
    return lazy.Source(label, tensor.nbytes, tensor.read)


def _leaf(tensor, sources, combine, name="", put=None):
    placed = None if put is None else functools.partial(put, name)
    return lazy.Leaf(tensor.shape, np.float32, sources, combine, placed)


def _in_float32(array):
    return jnp.asarray(array, jnp.float32)


def _wide(tensor):
    return tensor.read().astype(np.float32)


def _cores(module: str, given: Sequence[Product | None]) -> Taus:
    """Returns the core of every adapter's delta of a layer."""
    cores: list[np.ndarray] = []

    def keep(params_0, taus):
        cores.extend(np.asarray(tau[module]) for tau in taus)
        return params_0

    merge.core(_by_path(module, given), keep)
    return cores


def _by_path(module, given):
    return [
        {} if product is None else {module: Factors(*map(jnp.asarray, product))}
        for product in given
    ]


def _in_core_space(
    module: str, given: Sequence[Product | None], method: Method, rank: int
) -> Merged:
    products = [product for product in given if product is not None]
    shape = len(products[0].left), products[0].right.shape[1]
    most = min(rank, sum(product.rank for product in products), *shape)
    found = merge.core(_by_path(module, given), method, rank=most)
    product = Product(*map(np.asarray, found.factors[module]))
    lengths = [np.sum(product.left**2, axis=0), np.sum(product.right**2, axis=1)]
    squared_norm = float(np.dot(*lengths))  # of orthogonal terms
    return Merged(module, product, float(found.energy[module]), squared_norm)


def weighted(name: str, leaf: Whole, coefs: np.ndarray) -> np.ndarray:
    """Returns the linear merge of a whole tensor, in float32.

    Raises:
      ValueError: the merge moves the base's tensor, which is not available.
    """
    if leaf.start is None and (
        None in leaf.tensors or abs(float(np.sum(coefs)) - 1) > 1e-6
    ):
        raise ValueError(needs_base(name))
    start = np.float32(0) if leaf.start is None else _wide(leaf.start)
    total = np.asarray(start)
    for coef, tensor in zip(coefs, leaf.tensors, strict=True):
        if tensor is not None:
            total = total + np.float32(coef) * (_wide(tensor) - start)
    return total


def needs_base(name: str) -> str:
    """Returns the error message for a whole tensor without a base."""
    return (
        f"{name} is a whole tensor of the adapters (modules_to_save). Its merge moves "
        "the base's tensor, unless weights sum to 1 and all adapters have it. Give "
        "--base with the base's weights."
    )
