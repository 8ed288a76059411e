"""Parts that all wrappers share. A wrapper changes the result of a merge leaf by leaf.

A wrapper is `wrapper(params_0, taus, merged, ...) -> params`, where `merged` is the
result of a merge of the same task vectors. Leaves that no task vector moves, and
running statistics of normalisation layers, stay as merged.

The work of a wrapper is a `Plan`, which needs only paths and shapes. So `streamed` can
apply it to the leaves of a merge one by one, before they are written.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxarith import lazy, tree
from jaxarith.merge import _leaves
from jaxarith.typing import Coef, Params, Taus

Rows = Mapping[str, tuple]  # by path `(leaf_0, *taus)`; a plan needs no leaf to be read


class Plan(NamedTuple):
    """The changes that a wrapper makes to the leaves of a merged model.

    Attributes:
      change: a `leaf_function` of `(leaf, (leaf_0, *taus), *args)`, where `leaf` is the
        merged leaf.
      args: the other arguments of `change`. If one is a dict, `change` receives the
        entry of the leaf's path.
      measure: `measure(path, leaf, (leaf_0, *taus)) -> small arrays`. It is called for
        all leaves before the first one is changed. None if nothing must be measured.
      conclude: `conclude(measured)` returns one more argument of `change`; `measured`
        has the results of `measure` by path.
    """

    change: Callable[..., Any]
    args: tuple
    measure: Callable[..., Any] | None = None
    conclude: Callable[..., Any] | None = None

    def apply(self, path: str, leaf: jax.Array, row: tuple) -> jax.Array:
        """Returns the changed leaf; call it after everything was measured."""
        return self.change(leaf, row, *(_leaves.at(arg, path) for arg in self.args))

    def concluded(self, measured: Mapping[str, Any]) -> "Plan":
        """Returns the plan after all leaves were measured."""
        if self.conclude is None:
            return self
        return Plan(self.change, (*self.args, self.conclude(measured)))


def run(
    planned: Callable[[Rows], Plan], params_0: Params, taus: Taus, merged: Params
) -> Params:
    """Changes a merged model in memory.

    Raises:
      ValueError: the task vectors or the merged model do not fit; the message names
        the paths.
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
            "Give all parameters that the merge returned, not a task vector."
        )
    tree.check_finite(merged, "merged model")


def rows(params_0: Params, taus: Taus) -> dict[str, tuple]:
    """Returns the rows that a wrapper changes, by path; reads no leaf from a file.

    A row is `(leaf_0, *taus)`.
    """
    leaves = tree.flatten(params_0)
    return {
        path: (leaves[path], *row)
        for path, row in _leaves.unmapped(tree.aligned(taus)).items()
        if jnp.size(leaves[path]) and not _leaves.is_running(path)
    }


def streamed(
    planned: Callable[[Rows], Plan], merge: Callable[[Params, Taus], Params]
) -> Callable[[Params, Taus], Params]:
    """Combines a merge and a wrapper of its result to one merge, from files to files.

    A merged leaf is changed before it is written, while its sources are still in
    memory. It is not rounded in between. If the wrapper measures, the merge runs twice.
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
    """Returns the pre-trained leaves in float32 or better; merged ones go to `put`."""

    def leaf(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # no task vector has it
            return leaf
        return lazy.changed(leaf, _leaves.widened).to(functools.partial(put, path))

    return tree.map_with_path(leaf, params_0)


def coefs(coef: Coef, rows: Rows) -> _leaves.Coefs:
    """Returns the coefficient of the wrapped vector: one number, or one by path."""
    return _leaves.vector_coef(coef, [{path: row[0] for path, row in rows.items()}])
