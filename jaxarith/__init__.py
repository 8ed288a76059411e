"""Task arithmetic in JAX: task vectors, tangent-space models, τJp and merging.

Importing this package loads jax and numpy, and nothing heavier. The parts that
need more are imported by name: `jaxarith.hub`, `jaxarith.models.clip`,
`jaxarith.train`, `jaxarith.plots` and so on.
"""

import importlib.metadata

from jaxarith import merge as merge
from jaxarith import tangent as tangent
from jaxarith import task_vectors as task_vectors
from jaxarith import tau_jp as tau_jp
from jaxarith import tree as tree

try:
    __version__ = importlib.metadata.version("jaxarith")
except importlib.metadata.PackageNotFoundError:  # sources that are not installed
    __version__ = "0+unknown"
