"""Parts that all merges share: checks of the input, and the loop over leaves.

A merge makes zero or more passes over the leaves to gather small statistics. Then it
calls `fold` with a function that merges one leaf. Besides its input and result, it
never holds more than one leaf of all tasks at a time.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxarith import lazy, task_vectors, tree
from jaxarith.merge import _blas
from jaxarith.typing import Coef, Params, PerTask, Taus, Tree


def check(params_0: Params, taus: Taus, least: int = 1) -> None:
    """Checks that task vectors can be merged.

    Args:
      params_0: pre-trained parameters.
      taus: the task vectors.
      least: smallest number of task vectors that the method accepts.

    Raises:
      ValueError: they cannot; the message names the paths.
    """
    check_fit(params_0, taus, least)
    check_values(params_0, taus)


def check_fit(params_0: Params, taus: Taus, least: int = 1) -> None:
    """Checks structure, shapes and number: the part of `check` that reads no values."""
    check_list(taus)
    movable = tree.floating(params_0)
    for path, leaf in tree.flatten(movable).items():
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"{path} is {jnp.result_type(leaf)}; merges take real numbers. Put the "
                "real and the imaginary part in two leaves."
            )
    for i, tau in enumerate(taus):
        tree.check_part(
            tau, movable, f"task vector {i}", "floating-point pre-trained parameters"
        )
    if not jax.tree.leaves(list(taus)):
        raise ValueError(
            "none of the task vectors has a leaf; expected at least one array. Check "
            "how the task vectors were made."
        )
    if len(taus) < least:
        raise ValueError(
            f"this method merges at least {least} task vectors; found {len(taus)}."
        )


def check_list(taus: Taus) -> None:
    """Checks that `taus` is a list and not empty, without a look at any leaf."""
    if not isinstance(taus, list | tuple) or hasattr(taus, "_fields"):
        kind = type(taus).__name__
        raise ValueError(
            f"merging needs a list of task vectors; found one tree, a {kind}. Write "
            "[tau]."
        )
    if not taus:
        raise ValueError(
            "merging needs a list of task vectors; found an empty list. Give at least "
            "one."
        )


def check_values(params_0: Params, taus: Taus) -> None:
    """Checks that no value is NaN or infinite; this part of `check` reads values."""
    tree.check_finite(params_0, "pre-trained model")
    _check_finite(taus)


def check_vectors(taus: Taus) -> None:
    """Checks a list of task vectors without a model: a list, and finite values."""
    check_list(taus)
    _check_finite(taus)


def _check_finite(taus):
    for i, tau in enumerate(taus):
        tree.check_finite(tau, f"task vector {i}")


def check_sum(merged: Tree, params_0: Params, taus: Taus) -> None:
    """Checks the values of all summands, but reads only the sum if it is finite.

    A sum that includes NaN or infinity is not finite. So if the sum is finite, all its
    summands are.
    """
    if tree.is_finite(merged):
        return
    check_values(params_0, taus)
    if not tree.is_traced(merged):
        raise ValueError(
            "the sum of the task vectors overflows the dtype of the parameters. Lower "
            "the coefficients, or merge in float32."
        )


@overload
def leaf_function(function: Callable[..., Any]) -> Callable[..., jax.Array]: ...
@overload
def leaf_function(
    *, static: str | Sequence[str] = (), whole: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., jax.Array]]: ...
def leaf_function(
    function: Callable[..., Any] | None = None,
    *,
    static: str | Sequence[str] = (),
    whole: bool = False,
) -> Callable[..., Any]:
    """Compiles `function(leaf_0, taus, *args)` with `jit`, for use by `fold`.

    The function receives a leaf of `params_0` and the tuple of that leaf in every task
    vector, in float32 or better. Its result is cast to the dtype of `params_0`.

    A loop over the tuple is unrolled into one pass over memory, while `jnp.stack` would
    copy the leaves.

    Args:
      function: a function defined in a module, so that JAX keeps its compiled program.
      static: names of arguments that are Python values, for example options.
      whole: whether the function sums over entries or decomposes a matrix. If so, it
        receives sharded leaves gathered, so its result does not depend on the sharding.
    """
    if function is None:
        return functools.partial(leaf_function, static=static, whole=whole)

    @functools.partial(jax.jit, static_argnames=static)
    @functools.wraps(function)
    def in_float32(leaf_0, taus, *args, **options):
        dtype = jnp.result_type(leaf_0)
        wide = tree.wide_dtype(leaf_0, *taus)
        start, *moves = (jnp.asarray(leaf, wide) for leaf in (leaf_0, *taus))
        return function(start, tuple(moves), *args, **options).astype(dtype)

    return _OfWhole(function, in_float32, static) if whole else in_float32


class _OfWhole:
    """A leaf function that receives its leaves gathered from all devices."""

    def __init__(self, function, in_float32, static):
        functools.update_wrapper(self, function)
        self._in_float32 = in_float32
        static = (static,) if isinstance(static, str) else static
        _, _, *names = inspect.signature(function).parameters
        self._is_static = [name in static for name in names]

    def __call__(self, leaf_0, taus, *args, **options):
        gathered = tree.gathered((leaf_0, taus, *args))
        with _blas.limited([leaf_0]):
            return tree.settled(self._in_float32(*gathered, **options))

    def work(self, leaf_0, taus, *args, **options) -> Callable[[], jax.Array]:
        """Returns a function that computes the same in any thread.

        It is compiled here, because JAX keeps its settings, for example for 64-bit
        numbers, separately for each thread.
        """
        compiled = self._in_float32.lower(leaf_0, taus, *args, **options).compile()
        pairs = zip(args, self._is_static, strict=False)
        found = [arg for arg, is_static in pairs if not is_static]
        arrays = jax.tree.map(jnp.asarray, found)  # Python's numbers have no dtype

        def run():
            with _blas.limited([leaf_0]):
                return jax.block_until_ready(compiled(leaf_0, taus, *arrays))

        return run


def fold(
    merge_leaf: Callable[..., Any],
    params_0: Params,
    taus: Taus | Mapping[str, tuple],
    *args: Any,
    **options: Any,
) -> Params:
    """Calls `merge_leaf(leaf_0, taus, *args, **options)` for every leaf of the taus.

    Leaves that no task vector has, or that have no entries, stay as they are. Running
    statistics of normalisation layers are averaged instead, because the sum of two
    models' variances is no model's variance.

    Args:
      merge_leaf: a `leaf_function`.
      params_0: pre-trained parameters.
      taus: the task vectors, or their leaves by path.
      *args: statistics. If one is a dict, `merge_leaf` receives the entry of the leaf's
        path.
      **options: the static arguments of `merge_leaf`.

    Returns:
      `params_0` with the merged leaves.
    """
    return _fold(merge_leaf, params_0, taus, args, options, means=is_running)


def fold_all(
    merge_leaf: Callable[..., Any],
    params_0: Params,
    taus: Taus | Mapping[str, tuple],
    *args: Any,
    **options: Any,
) -> Params:
    """Does the same as `fold`, but without an exception for running statistics.

    Means of models use it, because they average these statistics anyway. So do
    mergekit's methods, whose definitions have no such exception.
    """
    return _fold(merge_leaf, params_0, taus, args, options, means=lambda path: False)


def _fold(merge_leaf, params_0, taus, args, options, means):
    rows = taus if isinstance(taus, Mapping) else tree.aligned(taus)
    leaves = tree.flatten(params_0)

    def put(path, merged):
        leaves[path] = tree.sharded_like(tree.settled(merged), leaves[path])

    with _spread(rows), _blas.Queue(put) as queue:
        for path, leaf_0 in leaves.items():
            if path not in rows or not jnp.size(leaf_0):
                continue
            with _on(rows, path):
                row = rows[path]  # first: it reads the base, which `start` reuses
                start = lazy.read(leaf_0)
                own = [at(arg, path) for arg in args]
                if means(path):
                    put(path, _mean(start, row))
                elif isinstance(merge_leaf, _OfWhole) and _blas.fit_beside_others(
                    (start, *row), own
                ):
                    queue.add(path, merge_leaf.work(start, row, *own, **options))
                else:
                    if not _blas.are_vectors((start, *row), own):
                        queue.finish()
                    put(path, merge_leaf(start, row, *own, **options))
    return tree.map_with_path(lambda path, _: leaves[path], params_0)


def _in_files(rows):
    """Returns the rows in files under all functions of them; None if there are none."""
    while isinstance(rows, Mapped):
        rows = rows.rows
    return rows if isinstance(rows, lazy.Rows) else None


def _spread(rows):
    found = _in_files(rows)
    return contextlib.nullcontext() if found is None else found.spread()


def _on(rows, path):
    found = _in_files(rows)
    return contextlib.nullcontext() if found is None else found.on(path)


# Names of running statistics: those of BatchNorm in Linen, NNX and PyTorch, and those
# of Haiku's moving averages.
_RUNNING = re.compile(
    r"(.*/)?batch_stats/.*|(.*[/.])?(running_)?(mean|var)(/value)?|.*/(mean|var)_ema/.*"
)


def is_running(path: str) -> bool:
    """Returns whether a leaf's name says that it holds running statistics."""
    return _RUNNING.fullmatch(path) is not None


@leaf_function
def _mean(leaf_0, taus):
    return leaf_0 + sum(taus) / len(taus)


def widened(leaf: jax.Array) -> jax.Array:
    """Returns the leaf in float32 or better."""
    return jnp.asarray(leaf, tree.wide_dtype(leaf))


def at(statistic: Any, path: str) -> Any:
    """Returns a leaf's statistic: its path's entry, or the one all leaves share."""
    return statistic[path] if isinstance(statistic, dict) else statistic


class Mapped(Mapping):
    """The leaves of task vectors by path, with a function applied at every look-up.

    The results are computed again in every pass and not kept. So a method of several
    passes never holds a whole changed task vector.

    Args:
      function: `function(row, *args) -> row`; a row is the tuple of a leaf of every
        task.
      rows: leaves by path.
      *args: as for `fold`.
    """

    def __init__(
        self, function: Callable[..., tuple], rows: Mapping[str, tuple], *args: Any
    ):
        self._function, self.rows, self.args = function, rows, args

    def __getitem__(self, path: str) -> tuple:
        args = (at(arg, path) for arg in self.args)
        # Without this wait, JAX would allocate the results of many leaves in advance.
        return jax.block_until_ready(self._function(self.rows[path], *args))

    def __contains__(self, path) -> bool:
        return path in self.rows  # the method of `Mapping` would compute the row

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unmapped(self) -> Mapping[str, tuple]:
        """The leaves before the function, with the same shapes, at no cost."""
        return unmapped(self.rows)


def is_traced(rows: Mapping[str, tuple], *others: Any) -> bool:
    """Returns whether a transformation traces the leaves or anything they depend on."""
    while isinstance(rows, Mapped):
        others, rows = (*others, rows.args), rows.rows
    return tree.is_traced(dict(unmapped(rows)), others)


F = TypeVar("F", bound=Callable)


def at_once(function: F) -> F:
    """Makes `function(rows, ...)` compute known values at once, even inside `jit`.

    Inside a transformation, JAX only records computations, even with arrays that are
    known because the transformed function closes over them. But passes that gather
    statistics use their results as Python values.
    """

    @functools.wraps(function)
    def computed(rows, *args):
        if is_traced(rows, args):
            return function(rows, *args)
        with jax.ensure_compile_time_eval():
            return function(rows, *args)

    return cast(F, computed)


def unmapped(rows: Mapping[str, tuple]) -> Mapping[str, tuple]:
    """Returns leaves of the same shapes that need no reading or computation."""
    return rows.unmapped if isinstance(rows, Mapped | lazy.Rows) else rows


def one_of(value: str, known: Any, name: str) -> None:
    """Raises a ValueError unless an option's value is one of the `Literal` values."""
    options = get_args(known)
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}; known are {', '.join(options)}.")


def one_each(found: Collection, tasks: int, name: str) -> None:
    """Raises a ValueError unless `found` has one item for each task vector."""
    if len(found) != tasks:
        raise ValueError(
            f"found {len(found)} {name} for {tasks} task vectors; give one for each."
        )


def per_task(values: PerTask, tasks: int, name: str) -> jax.Array:
    """Returns one number, or one number per task, as `[task]`.

    Raises:
      ValueError: a number is not finite, or there are several but not one per task.
    """
    found = _finite(jnp.asarray(values, float), name)
    if found.shape not in ((), (tasks,)):
        raise ValueError(
            f"{name} has shape {list(found.shape)}; expected one number, or one per "
            f"task vector: [{tasks}]."
        )
    return jnp.broadcast_to(found, (tasks,))


def _finite(values, name):
    # NumPy also checks values that are known inside a `jit`. JAX would trace them.
    if not isinstance(values, Tracer) and not np.isfinite(values).all():
        raise ValueError(f"{name} is {values}; it must be finite.")
    return values


def one_number(value: PerTask, name: str) -> jax.Array:
    """Returns the coefficient of one merged vector, as a scalar.

    Raises:
      ValueError: there are several numbers, or the number is not finite.
    """
    found = _finite(jnp.asarray(value, float), name)
    if found.ndim:
        raise ValueError(
            f"{name} has shape {list(found.shape)}; expected one number, because this "
            "method scales one merged vector."
        )
    return found


Coefs = jax.Array | dict[str, jax.Array]  # argument of `fold`: for all, or by path


def task_coefs(coef: Coef, taus: Taus, name: str = "coef") -> Coefs:
    """Returns a coefficient for every task, `[T]`, or a dict of them by path.

    Args:
      coef: one number, one per task `[T]`, or either by path.
      taus: T task vectors.
      name: name of the coefficient in error messages.
    """
    if not isinstance(coef, Mapping) and not callable(coef):
        return per_task(coef, len(taus), name)
    paths = tree.aligned(taus)
    of_path = task_vectors.by_path(coef, paths, name)
    return {
        path: per_task(of_path(path), len(taus), f"{name} of {path}") for path in paths
    }


def vector_coef(coef: Coef, taus: Taus, name: str = "coef") -> Coefs:
    """Returns the coefficient of the one merged vector, or a dict of them by path.

    Args:
      coef: one number, or one number for each path.
      taus: the task vectors, which have these paths.
      name: name of the coefficient in error messages.
    """
    if not isinstance(coef, Mapping) and not callable(coef):
        return one_number(coef, name)
    paths = tree.aligned(taus)
    of_path = task_vectors.by_path(coef, paths, name)
    return {path: one_number(of_path(path), f"{name} of {path}") for path in paths}


def keys(key: jax.Array, taus: Taus) -> dict[str, jax.Array]:
    """Returns the random key of every leaf by path, as an argument of `fold`.

    Add the number of the task with `jax.random.fold_in(keys[path], task)`. Then the
    draws depend only on the path and the task, not on order, sharding or devices.
    """
    return {path: task_vectors.leaf_key(key, path) for path in tree.aligned(taus)}
