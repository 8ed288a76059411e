r"""LiNeS: moves the deep layers of a merged vector further than the shallow ones.

Wang, Dimitriadis, Favero, Ortiz-Jimenez, Fleuret, Frossard. LiNeS: Post-Training Layer
Scaling Prevents Forgetting and Enhances Model Merging. ICLR 2025. arXiv:2410.17146.

.. math:: \lambda_l = \alpha + \beta\,\frac{l}{L - 1}, \qquad
          \alpha = \frac{1}{T}\,\frac{\|\sum_t \tau_t\|_1}{\|\tau\|_1}

for block l = 0, …, L - 1 of a merged vector τ, and α for all leaves outside the blocks.
As in the authors' code, the norms are sums of magnitudes.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves, wrapped
from jaxarith.typing import Params, Taus

_BLOCK = re.compile(r"(.*?[/.])(\d+)[/.]")


def lines(
    params_0: Params,
    taus: Taus,
    merged: Params,
    *,
    beta: float,
    alpha: float | jax.Array | None = None,
    depths: Mapping[str, float] | Callable[[str], float] | None = None,
) -> Params:
    """Scales the layers of a merged vector by their depth, without data.

    Args:
      params_0: pre-trained parameters.
      taus: the task vectors that were merged.
      merged: the result of a merge of them with coefficient 1.
      beta: difference β between the coefficients of the last and the first block. The
        authors choose it in [0, 1] on validation data. With 0 all layers have the
        coefficient α. For a single task they use α in [0, 1] and β = 1 - α.
      alpha: coefficient α of the first block; by default the formula above.
      depths: depth of each leaf by path, from 0 for the first block to 1 for the last;
        by default the result of `block_depths`.

    Returns:
      Parameters with the structure and dtypes of `merged`.

    Raises:
      ValueError: β or α is not finite, `merged` does not have the structure of
        `params_0`, task vectors that do not fit, or non-finite values.

    Example:
      >>> merged = {"h/0/w": jnp.ones(1), "h/1/w": jnp.ones(1), "norm": jnp.ones(1)}
      >>> params_0 = {path: jnp.zeros(1) for path in merged}
      >>> found = lines(params_0, [merged, merged], merged, beta=0.5, alpha=0.25)
      >>> print({path: float(leaf[0]) for path, leaf in found.items()})
      {'h/0/w': 0.25, 'h/1/w': 0.75, 'norm': 0.25}
    """
    options = {"beta": beta, "alpha": alpha, "depths": depths}
    return wrapped.run(functools.partial(plan, **options), params_0, taus, merged)


def plan(
    rows: wrapped.Rows,
    *,
    beta: float,
    alpha: float | jax.Array | None = None,
    depths: Mapping[str, float] | Callable[[str], float] | None = None,
) -> wrapped.Plan:
    """Plans the changes of `lines` to each leaf; it has the same arguments."""
    beta_of = _leaves.one_number(beta, "beta")
    found = block_depths(rows) if depths is None else depths
    of_path = found if callable(found) else found.__getitem__
    deeper = {path: beta_of * of_path(path) for path in rows}
    if alpha is not None:
        return wrapped.Plan(_change, (deeper, _leaves.one_number(alpha, "alpha")))
    tasks = len(next(iter(rows.values()))) - 1
    conclude = functools.partial(_alpha, tasks=tasks)
    return wrapped.Plan(_change, (deeper,), _measured, conclude)


@_leaves.leaf_function
def _change(leaf, row, deeper, alpha):
    return row[0] + (alpha + deeper) * (leaf - row[0])


def _measured(path, leaf, row):
    return _norms(*tree.gathered((leaf, row)))


@jax.jit
def _norms(leaf, row):
    """Returns the L1 norms `[2]` of the summed task vectors and the merged vector."""
    merged, start, *taus = (_leaves.widened(x) for x in (leaf, *row))
    return tree.sums([jnp.abs(tree.total(taus)), jnp.abs(merged - start)])


def _alpha(norms, tasks):
    of_sum, of_merged = tree.total(norms.values())
    zero = of_merged == 0
    return jnp.where(zero, 1, of_sum / jnp.where(zero, 1, of_merged)) / tasks


def block_depths(paths: Iterable[str]) -> dict[str, float]:
    """Returns the depth of each leaf: 0 in the first block of its stack, 1 in the last.

    The first number in a path is the number of the block. The part before it names the
    stack, so an encoder and a decoder have separate depths. Leaves outside all blocks
    have depth 0. If a stack has only one block, its depth is 1.

    Example:
      >>> block_depths(["enc/0/w", "enc/1/w", "enc/2/w", "head/w"])
      {'enc/0/w': 0.0, 'enc/1/w': 0.5, 'enc/2/w': 1.0, 'head/w': 0.0}
    """
    found = {path: _BLOCK.match(path) for path in paths}
    last: dict[str, int] = {}
    for match in filter(None, found.values()):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))

    def depth(match):
        if match is None:
            return 0.0
        return int(match[2]) / last[match[1]] if last[match[1]] else 1.0

    return {path: depth(match) for path, match in found.items()}
