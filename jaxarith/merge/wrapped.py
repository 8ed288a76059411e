"""What wrappers share: they change what a merge gave, leaf by leaf.

A wrapper is `wrapper(params_0, taus, merged, ...) -> params`, with the parameters that
a merge of the same task vectors gave. Leaves that no task vector moves, and running
statistics of normalisation layers, stay as merged.

What a wrapper does is a `Plan`, made from paths and shapes alone. So `streamed` can do
it to the leaves of a merge one by one, before they are written.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxarith import lazy, tree
from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus

Rows = Mapping[
    str, tuple
]  # by path `(leaf_0, *taus)`; to plan, leaves that are not read


class Plan(NamedTuple):
    """What a wrapper does to the leaves of a merged model.

    Attributes:
      change: a `leaf_function` of `(leaf, (leaf_0, *taus), *args)`, with the merged
        leaf.
      args: its arguments; of a dict, the entry of the leaf's path.
      measure: `measure(path, leaf, (leaf_0, *taus)) -> small arrays`, of all leaves
        before one is changed; None where that is not needed.
      conclude: `conclude(measured)` returns one more argument of `change` from what was
        measured by path.
    """

    change: Callable[..., Any]
    args: tuple
    measure: Callable[..., Any] | None = None
    conclude: Callable[..., Any] | None = None

    def apply(self, path: str, leaf: jax.Array, row: tuple) -> jax.Array:
        """The changed leaf, once nothing is to be measured any more."""
        return self.change(leaf, row, *(_leaves.at(arg, path) for arg in self.args))

    def concluded(self, measured: Mapping[str, Any]) -> "Plan":
        """The plan after all leaves were measured."""
        if self.conclude is None:
            return self
        return Plan(self.change, (*self.args, self.conclude(measured)))


def run(
    planned: Callable[[Rows], Plan], params_0: Params, taus: Taus, merged: Params
) -> Params:
    """Changes a merged model in memory.

    Raises:
      ValueError: with paths, for task vectors or a merged model that do not fit.
    """
    _check(params_0, taus, merged)
    found = rows(params_0, taus)
    plan, leaves = planned(found), tree.flatten(merged)
    if plan.measure is not None:
        plan = plan.concluded(
            {path: plan.measure(path, leaves[path], row) for path, row in found.items()}
        )
    return _leaves.fold_all(plan.change, merged, found, *plan.args)


def _check(params_0, taus, merged):
    _leaves.check(params_0, taus)
    tree.check_part(merged, params_0, "merged model", "pre-trained model")
    lacking = tree.flatten(params_0).keys() - tree.flatten(merged).keys()
    if lacking:
        raise ValueError(
            f"the merged model lacks {', '.join(tree.first_few(sorted(lacking)))}. "
            "Give all that the merge returned, parameters and not a task vector."
        )
    tree.check_finite(merged, "merged model")


def rows(params_0: Params, taus: Taus) -> dict[str, tuple]:
    """By path what a wrapper changes: `(leaf_0, *taus)`, leaves in files unread."""
    leaves = tree.flatten(params_0)
    return {
        path: (leaves[path], *row)
        for path, row in _leaves.unmapped(tree.aligned(taus)).items()
        if jnp.size(leaves[path]) and not _leaves.is_running(path)
    }


def streamed(
    planned: Callable[[Rows], Plan], merge: Callable[[Params, Taus], Params]
) -> Callable[[Params, Taus], Params]:
    """A merge and a wrapper of its result as one merge, from files to files.

    A leaf is changed before it is written, while those that it came from are held. What
    the merge gives is not rounded in between. A wrapper that measures lets the merge
    run twice.
    """

    def both(params_0: Params, taus: Taus) -> Params:
        found = rows(params_0, taus)
        plan = planned(found)
        if plan.measure is not None:
            measured, measure = {}, plan.measure

            def put(path, leaf):
                if path in found:
                    measured[path] = measure(path, leaf, _read(found[path]))

            merge(_with_places(params_0, put), taus)
            plan = plan.concluded(measured)
        places = tree.flatten(params_0)

        def change(path, leaf):
            if path in found:
                leaf = plan.apply(path, leaf, _read(found[path]))
            places[path].place(leaf)

        return merge(_with_places(params_0, change), taus)

    return both


def _read(row):
    return tuple(map(lazy.read, row))


def _with_places(params_0, put):
    """The pre-trained leaves in float32 or better, whose merged ones go to `put`."""

    def leaf(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # no task vector has it
            return leaf
        return lazy.changed(leaf, _leaves.widened).to(functools.partial(put, path))

    return tree.map_with_path(leaf, params_0)


def coefs(coef: Coef, rows: Rows) -> _leaves.Coefs:
    """The coefficient of the wrapped vector: one number, or one by path."""
    return _leaves.vector_coef(coef, [{path: row[0] for path, row in rows.items()}])
