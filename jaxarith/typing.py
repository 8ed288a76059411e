"""The types that signatures name; nothing else.

They say what an argument means. A type checker cannot check trees, because JAX accepts
any pytree. It does check numbers, functions and options.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Tree: TypeAlias = Any
"""Any pytree of arrays."""

Params: TypeAlias = Any
"""Parameters of a model, a pytree of arrays; for the ports a nested dict."""

Taus: TypeAlias = Sequence[Params]
"""Task vectors, `fine-tuned - pre-trained`; a missing leaf counts as zero."""

ApplyFn: TypeAlias = Callable[..., Any]
"""`apply_fn(params, *inputs) -> outputs`: the model as a function of its parameters."""

Array: TypeAlias = jax.Array | np.ndarray

Number: TypeAlias = float | int | np.number | np.ndarray | jax.Array
"""A number or a scalar array; `jit` may be tracing it."""

PerTask: TypeAlias = Number | Sequence[Number]
"""One number for all tasks, or one for each."""

Numbers: TypeAlias = Sequence[float] | np.ndarray | jax.Array
"""Several numbers `[n]`."""

Coef: TypeAlias = PerTask | Callable[[str], Any] | Mapping[str, Any]
"""A scaling coefficient: one number, one number per task, or either of them by leaf.

By leaf means a function of the slash path, or a mapping from slash paths. The `coefs`
of `merge.adamerging` are an example of a mapping. A mapping must have all leaves of the
task vectors; it may have more. A method that scales one merged vector takes one number,
which may differ by leaf, but not one per task.
"""


class Source(Protocol):
    """Samples, or batches of them: a length, and a dict at every index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


LossFn: TypeAlias = Callable[[Any, dict, Any], jax.Array]
"""`loss(outputs, batch, constants) -> scalar`; a task keeps its constants fixed."""


class Quadratic(Protocol):
    """A quadratic form of a task vector, as `jaxarith.curvature` measures it."""

    def product(self, tau: Params, /) -> Params: ...
