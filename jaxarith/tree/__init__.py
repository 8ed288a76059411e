"""Trees of arrays: slash paths, parts of trees, placement, sums over leaves.

It has only functions that `jax.tree` and `optax.tree` lack. The path of a leaf is its
keys joined by slashes, as in `text_model/embeddings/bias`. A *part* of a tree holds
some of its leaves. In nested dicts the keys of the other leaves are absent. In other
pytrees the other leaves are `None`, which JAX does not count as a leaf.
"""

from jaxarith.lazy import wide_dtype as wide_dtype
from jaxarith.tree._checks import check_finite as check_finite
from jaxarith.tree._checks import check_part as check_part
from jaxarith.tree._checks import is_finite as is_finite
from jaxarith.tree._listing import counted as counted
from jaxarith.tree._listing import first_few as first_few
from jaxarith.tree._parts import fill as fill
from jaxarith.tree._parts import floating as floating
from jaxarith.tree._parts import restrict as restrict
from jaxarith.tree._parts import select as select
from jaxarith.tree._parts import size as size
from jaxarith.tree._parts import stack as stack
from jaxarith.tree._parts import unstack as unstack
from jaxarith.tree._parts import update as update
from jaxarith.tree._paths import flatten as flatten
from jaxarith.tree._paths import map_with_path as map_with_path
from jaxarith.tree._paths import path_name as path_name
from jaxarith.tree._paths import unflatten as unflatten
from jaxarith.tree._placement import gathered as gathered
from jaxarith.tree._placement import is_traced as is_traced
from jaxarith.tree._placement import settled as settled
from jaxarith.tree._placement import sharded_like as sharded_like
from jaxarith.tree._reductions import aligned as aligned
from jaxarith.tree._reductions import cosine as cosine
from jaxarith.tree._reductions import counts as counts
from jaxarith.tree._reductions import gram as gram
from jaxarith.tree._reductions import gram_of as gram_of
from jaxarith.tree._reductions import safe_sqrt as safe_sqrt
from jaxarith.tree._reductions import sums as sums
from jaxarith.tree._reductions import total as total
