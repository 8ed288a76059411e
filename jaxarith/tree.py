"""What `jax.tree` and `optax.tree` lack: slash paths, parts of trees, Gram matrices.

A leaf's path is its keys joined by slashes, as in `text_model/embeddings/bias`.
A *part* of a tree holds some of its leaves: in nested dicts the other keys are absent,
in other pytrees they are `None`, which JAX does not count as a leaf either.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxarith import lazy

Tree = Any  # any pytree of arrays


def path_name(path: tuple) -> str:
    """The slash path of a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """The leaves by slash path, in JAX's order.

    Raises:
      ValueError: two leaves have one slash path, as `{"a/b": …}` and `{"a": {"b": …}}`.

    Example:
      >>> flatten({"mlp": {"kernel": 1.0, "bias": 2.0}})
      {'mlp/bias': 2.0, 'mlp/kernel': 1.0}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    by_path = {path_name(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        double = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves have the path {', '.join(double)}; rename one.")
    return by_path


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """The nested dict of which `leaves` are the leaves by slash path.

    Raises:
      ValueError: the path of a leaf continues that of another.

    Example:
      >>> unflatten({"mlp/bias": 2.0, "mlp/kernel": 1.0})
      {'mlp': {'bias': 2.0, 'kernel': 1.0}}
    """
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or name in node:
            raise ValueError(
                f"{path} is a leaf and above or below another one, as `a` and `a/b` "
                "are: no nested dict has both. Rename one."
            )
        node[name] = leaf
    return tree


def select(tree: Tree, pattern: str) -> Tree:
    """The part of the tree whose whole paths match a regular expression.

    Raises:
      ValueError: no path matches.

    Example:
      >>> select({"a": {"kernel": 1.0, "bias": 2.0}, "b": {"bias": 3.0}}, ".*/kernel")
      {'a': {'kernel': 1.0}}
    """
    matching = [path for path in flatten(tree) if re.fullmatch(pattern, path)]
    if not matching:
        some = ", ".join(list(flatten(tree))[:3])
        raise ValueError(
            f"no leaf matches {pattern!r}. The pattern must match whole slash paths, "
            f"such as {some}."
        )
    return restrict(tree, matching)


def floating(tree: Tree) -> Tree:
    """The part of the tree whose leaves are floating-point numbers.

    Integers are indices and counters: no arithmetic on parameters should touch them.
    """
    leaves = flatten(tree).items()
    return restrict(tree, [path for path, leaf in leaves if _is_floating(leaf)])


def _is_floating(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def restrict(tree: Tree, paths: Collection[str]) -> Tree:
    """The part of the tree that holds the leaves with these paths."""
    paths = frozenset(paths)
    part = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path_name(path) in paths else None, tree
    )
    return _without_empty(part)


def _without_empty(node):
    """The nested dict without keys under which there is no leaf."""
    if not isinstance(node, dict):
        return node
    kept = {key: _without_empty(child) for key, child in node.items()}
    return {key: child for key, child in kept.items() if jax.tree.leaves(child)}


def update(tree: Tree, part: Tree) -> Tree:
    """The tree with the leaves of `part` in place of its own."""
    check_part(part, tree)
    new = flatten(part)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path_name(path), leaf), tree
    )


def fill(part: Tree, like: Tree) -> Tree:
    """The leaves of `part` in the structure and dtypes of `like`, zero where absent."""
    check_part(part, like)
    leaves = flatten(part)

    def leaf(path, target):
        if (name := path_name(path)) in leaves:
            return jnp.asarray(leaves[name], target.dtype)
        return jnp.zeros_like(target)

    return jax.tree_util.tree_map_with_path(leaf, jax.tree.map(jnp.asarray, like))


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one tree with leaves `[len(trees), ...]`."""
    for tree in trees[1:]:
        check_part(tree, trees[0])
        check_part(trees[0], tree)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The inverse of `stack`."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def check_part(part: Tree, whole: Tree, part_name="tree", whole_name="parameters"):
    """Raises a ValueError with the paths unless `part` fits into `whole`.

    Every leaf of `part` must be in `whole`, with the same shape.
    """
    expected = {path: jnp.shape(leaf) for path, leaf in flatten(whole).items()}
    found = {path: jnp.shape(leaf) for path, leaf in flatten(part).items()}
    lines = [
        f"  + {path} {list(shape)}: not in the {whole_name}"
        for path, shape in found.items()
        if path not in expected
    ]
    lines += [
        f"  ! {path}: {list(shape)} in the {part_name}, {list(expected[path])} in the "
        f"{whole_name}"
        for path, shape in found.items()
        if path in expected and expected[path] != shape
    ]
    if lines:
        shown = lines[:10] + ([f"  … and {len(lines) - 10} more"] * (len(lines) > 10))
        raise ValueError(
            f"the {part_name} does not fit the {whole_name} ({len(lines)} leaves):\n"
            + "\n".join(shown)
        )


def check_finite(tree: Tree, name: str):
    """Raises a ValueError with the paths of leaves that hold NaN or infinity.

    Values that `jit` is tracing are not known yet and are not checked; those in files
    are when they are read.
    """
    leaves = {}
    for path, leaf in flatten(tree).items():
        if isinstance(leaf, lazy.Leaf):
            leaf.check()
        elif not isinstance(leaf, jax.core.Tracer) and _is_floating(leaf):
            leaves[path] = leaf
    with jax.ensure_compile_time_eval():  # values that are known inside a `jit`
        finite = {path: settled(lazy.all_finite(leaf)) for path, leaf in leaves.items()}
    finite = jax.device_get(finite)
    if bad := [path for path, ok in finite.items() if not ok]:
        raise ValueError(
            f"the {name} has NaN or infinite values in {len(bad)} leaves: "
            f"{', '.join(bad[:5])}{' …' * (len(bad) > 5)}. Check the run or the file "
            "that it came from."
        )


def is_finite(tree: Tree) -> bool:
    """Whether all values are known to be finite; False if `jit` is tracing one.

    Leaves in files do not count: they are looked at when they are written.
    """
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not isinstance(leaf, lazy.Leaf) and _is_floating(leaf)
    ]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    return all(jax.device_get([settled(lazy.all_finite(leaf)) for leaf in leaves]))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root with derivative 0, not NaN, at 0: what a norm at zero needs."""
    zero = x <= 0  # not `x > 0`, which would turn NaN into 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def gathered(tree: Tree) -> Tree:
    """The tree with leaves that are on several devices as whole NumPy arrays.

    A sum over entries, or a matrix product, rounds otherwise in shards than over the
    whole leaf, and a program for several devices is not compiled to the bits of one for
    one. What is computed from gathered leaves, one at a time, is what one device gives.
    Other leaves are as they were; all are where `jit` is tracing one of them.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return tree

    def leaf(x):
        if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
            return x
        if not x.is_fully_addressable:  # other processes have parts of it
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def settled(tree: Tree) -> Tree:
    """The tree, after waiting for leaves that CPU devices compute.

    What computes leaf by leaf, or batch by batch, settles one before the next. Leaves
    that are read from files would otherwise all be read before the first is done. And
    XLA runs all CPU devices with as many threads as there are cores: with many programs
    for several devices under way, some wait for others in threads that these need,
    forever.
    """
    of_cpu = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and next(iter(leaf.sharding.device_set)).platform == "cpu"
    ]
    jax.block_until_ready(of_cpu)
    return tree


def sharded_like(leaf: jax.Array, like: jax.Array) -> jax.Array:
    """The leaf where `like` is, unless `jit` traces it: the way back of `gathered`.

    Where `like` is in a file, so is the leaf then.
    """
    if isinstance(like, lazy.Leaf):
        return like.place(leaf)
    tracing = isinstance(leaf, jax.core.Tracer) or not isinstance(like, jax.Array)
    if tracing or leaf.sharding == like.sharding:
        return leaf
    return jax.device_put(leaf, like.sharding)


def gram(trees: Sequence[Tree]) -> jax.Array:
    r"""Inner products of trees, `G[i, j] = Σ_leaves <tree_i, tree_j>`.

    Cosines, norms, AWD and task-vector bases need no more of the task vectors than
    this. The leaves are read once; a leaf that a tree lacks is zero. Sharded leaves are
    gathered one after another, so that the result has the bits of one device.

    Args:
      trees: T trees whose common leaves have the same shapes.

    Returns:
      `[T, T]` in float32, or float64 where a leaf is.

    Example:
      >>> gram([{"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}])
      Array([[2., 2.],
             [2., 3.]], dtype=float32)
    """
    zero = jnp.zeros((len(trees), len(trees)), jnp.float32)
    return zero + gram_of(aligned(trees).values())


def gram_of(rows: Iterable[tuple]) -> jax.Array:
    """`gram` of trees of which each row is a leaf of all; 0 if there is no row."""
    return sum(settled(_leaf_gram(gathered(row))) for row in rows)


BLOCK = 8  # tasks whose products are summed in one pass


@jax.jit
def _leaf_gram(leaves):
    # Products of entries summed in one loop read each vector once. A matrix product
    # would first copy the leaves side by side, and raveling would gather their shards.
    count = len(leaves)
    dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
    leaves = [jnp.asarray(leaf, dtype) for leaf in leaves]
    gram = jnp.zeros((count, count), dtype)
    for first in range(0, count, BLOCK):
        for second in range(first, count, BLOCK):
            pairs = [
                (i, j)
                for i in range(first, min(first + BLOCK, count))
                for j in range(max(second, i), min(second + BLOCK, count))
            ]
            rows, columns = np.array(pairs).T
            products = sums([leaves[i] * leaves[j] for i, j in pairs])
            gram = gram.at[rows, columns].set(products)
            gram = gram.at[columns, rows].set(products)
    return gram


def sums(terms: Sequence[jax.Array]) -> jax.Array:
    """The sums `[len(terms)]` over all entries of arrays of one shape, in one pass.

    Arrays that are computed from few others, as products of them are, are not stored,
    and the others are read once.
    """
    return _sums(tuple(terms))


@jax.custom_jvp
def _sums(terms):
    return counts(terms, terms[0].dtype)


@_sums.defjvp
def _sums_jvp(primals, tangents):
    return _sums(*primals), jnp.stack([jnp.sum(tangent) for tangent in tangents[0]])


def counts(conditions: Sequence[jax.Array], dtype=jnp.int32) -> jax.Array:
    """The numbers of true entries `[len(conditions)]`, in one pass, as `sums`."""
    terms = [_in_rows(jnp.atleast_1d(jnp.asarray(t, dtype))) for t in conditions]
    zero = jnp.zeros((), dtype)
    # XLA makes a loop over the last axis of several reductions at once, but only then.
    rows = jax.lax.reduce(
        terms,
        [zero] * len(terms),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        [terms[0].ndim - 1],
    )
    return jnp.stack([jnp.sum(row, dtype=dtype) for row in rows])


def _in_rows(term, longest=4096, width=1024):
    """A long last axis as rows: the loop over it adds up one by one, and rounds so."""
    *rest, length = term.shape
    if length <= longest:
        return term
    padding = [(0, 0)] * len(rest) + [(0, -length % width)]
    return jnp.pad(term, padding).reshape(*rest, -1, width)


def aligned(trees: Sequence[Tree]) -> Mapping[str, tuple]:
    """For each path that any tree has, its leaf in every tree.

    Where a tree lacks the leaf, zeros stand for it that take no memory. Leaves in files
    are read when their path is looked up.
    """
    flat = [flatten(tree) for tree in trees]
    aligned = {}
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        found = [leaves[path] for leaves in flat if path in leaves]
        shapes = {jnp.shape(leaf) for leaf in found}
        if len(shapes) > 1:
            raise ValueError(
                f"the trees disagree on the shape of {path}: {sorted(shapes)}."
            )
        zeros = np.zeros((), jnp.result_type(*found))
        zeros = np.broadcast_to(zeros, jnp.shape(found[0]))
        aligned[path] = tuple(_as_array(leaves.get(path, zeros)) for leaves in flat)
    in_files = any(isinstance(x, lazy.Leaf) for row in aligned.values() for x in row)
    return lazy.Rows(aligned) if in_files else aligned


def _as_array(leaf):
    known = isinstance(leaf, jax.Array | np.ndarray | lazy.Leaf)
    return leaf if known else jnp.asarray(leaf)


def cosine(gram: jax.Array) -> jax.Array:
    """Cosines from a Gram matrix `[T, T]`; zero for a tree that is zero."""
    norms = safe_sqrt(jnp.diagonal(gram))
    scale = norms[:, None] * norms[None, :]
    zero = scale == 0
    return jnp.where(zero, 0, gram / jnp.where(zero, 1, scale))


def map_with_path(function: Callable, tree: Tree) -> Tree:
    """`jax.tree.map` of a `function(slash_path, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )


def size(tree: Tree) -> int:
    """The number of entries in all leaves."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))
