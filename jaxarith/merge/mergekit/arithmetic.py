r"""mergekit's generalized task arithmetic; TIES, DARE and DELLA are special cases.

The eight methods use one formula, tensor by tensor. The task vectors are made sparse,
:math:`\hat\tau_t`, and are added with weights w. Optionally, each entry sums only
values of one sign.

.. math:: \theta = \theta_0 + \lambda\,\frac{\sum_{t \in A} w_t \hat\tau_t}
                                            {\sum_{t \in A} w_t}, \qquad
          A = \{t : \operatorname{sgn}(w_t \hat\tau_t) = \gamma\},
          \quad \gamma = \operatorname{sgn}^+\big(\textstyle\sum_t w_t\hat\tau_t\big),

where :math:`\operatorname{sgn}^+(0) = 1`. Without a consensus of signs all t are in A.
Without `normalize` the divisor is one.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import task_vectors, tree
from jaxarith.merge import _draws, _leaves, _order
from jaxarith.merge.della import centered_ranks
from jaxarith.merge.drop import rescaled
from jaxarith.merge.ties import agreeing, weighted
from jaxarith.typing import Coef, Params, Taus

MethodName = Literal[
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
]


class Method(NamedTuple):
    """A method of the family.

    Attributes:
      keep: the entries of a task vector that stay: all, the largest, those between
        outliers and small ones, random ones, or random ones that tend to be large.
      consensus: whether only the entries of the elected sign are merged.
      normalize: default of `normalize`: whether to divide by the sum of weights.
      rescale: default of `rescale`: whether to restore the sum of magnitudes.
    """

    keep: Literal["all", "largest", "middle", "random", "ranked"]
    consensus: bool
    normalize: bool
    rescale: bool


METHODS: dict[MethodName, Method] = {
    "task_arithmetic": Method("all", False, False, False),
    "ties": Method("largest", True, True, False),
    "dare_linear": Method("random", False, False, True),
    "dare_ties": Method("random", True, False, True),
    "breadcrumbs": Method("middle", False, False, False),
    "breadcrumbs_ties": Method("middle", True, False, False),
    "della": Method("ranked", True, True, True),
    "della_linear": Method("ranked", False, False, True),
}


def generalized_task_arithmetic(
    params_0: Params,
    taus: Taus,
    *,
    method: MethodName,
    weight: Coef,
    density: Coef = 1.0,
    normalize: bool | None = None,
    rescale: bool | None = None,
    gamma: Coef = 0.01,
    epsilon: Coef = 0.15,
    coef: Coef = 1.0,
    key: jax.Array | None = None,
) -> Params:
    """Merges by a method of mergekit's task-arithmetic family.

    ====================  =========================  =========  =========  =======
    method                entries that stay          consensus  normalize  rescale
    ====================  =========================  =========  =========  =======
    `task_arithmetic`     all                        no         no         no
    `ties`                the largest                yes        yes        no
    `dare_linear`         random ones                no         no         yes
    `dare_ties`           random ones                yes        no         yes
    `breadcrumbs`         the largest, no outliers   no         no         no
    `breadcrumbs_ties`    the largest, no outliers   yes        no         no
    `della`               random, mostly large ones  yes        yes        yes
    `della_linear`        random, mostly large ones  no         no         yes
    ====================  =========================  =========  =========  =======

    A tensor of n entries keeps ⌊density·n⌋ of them, at least one unless the density is
    zero. A density of one keeps all entries, outliers too. The breadcrumbs drop
    ⌊gamma·n⌋ outliers, or fewer if too few entries would remain. Entries that equal the
    smallest or the largest kept entry stay too; in mergekit a sort decides which of
    them stay.

    Four points differ from mergekit. If density·n < 1, mergekit's breadcrumbs drop the
    whole tensor; here one entry stays. Sums are taken in float32, not in the dtype of
    the checkpoint. Random entries depend on key, path and task, as in `dare` and
    `della`, so they differ from mergekit's. mergekit's DELLA fails at a row of one
    entry; here it is kept with the mean density.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      method: name of a method in the table.
      weight: the factor of a task vector: one number, one per task `[T]`, or either by
        path.
      density: the share of entries that stay, in [0, 1]; given like `weight`.
      normalize: whether to divide by the sum of the weights in A; None takes the value
        of the table.
      rescale: whether to scale the entries that stay so that the tensor keeps its sum
        of magnitudes; None takes the value of the table.
      gamma: for the breadcrumbs, the share of outliers; given like `weight`.
      epsilon: for DELLA, half the range of probabilities; given like `weight`. The
        entries of a row along the second axis are kept with a probability from
        density - epsilon (the smallest entry) to density + epsilon (the largest). Both
        must be in (0, 1), unless the density is 0 or 1.
      coef: mergekit's `lambda`: one number, or one by path.
      key: random key of the draws of DARE and DELLA.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown method, a share out of range, a wrong number of
        coefficients, no key for random draws, no task vector, one that does not fit, or
        non-finite values.

    Example:
      >>> params_0 = {"w": jnp.zeros(3)}
      >>> taus = [{"w": jnp.array([4.0, 3.0, 0.1])}, {"w": jnp.array([2.0, -5.0, 0.2])}]
      >>> merged = generalized_task_arithmetic(
      ...     params_0, taus, method="ties", weight=[3.0, 1.0], density=0.7
      ... )
      >>> print(merged["w"])
      [3.5 3.  0. ]
    """
    _leaves.one_of(method, MethodName, "method")
    chosen = METHODS[method]
    keep = chosen.keep
    normalize = chosen.normalize if normalize is None else normalize
    rescale = chosen.rescale if rescale is None else rescale
    scale = "l1" if rescale else "none"
    if keep in ("random", "ranked") and key is None:
        raise ValueError(
            f"{method} needs a key; found None. Give key=jax.random.key(0)."
        )
    _leaves.check(params_0, taus)
    weights = _leaves.task_coefs(weight, taus, "weight")
    coefs = _leaves.vector_coef(coef, taus)
    rows = tree.aligned(taus)
    if keep != "all":
        rows = _leaves.Mapped(tree.gathered, rows)  # the next steps sum over leaves
    if keep in ("largest", "middle"):
        shares = _shares(density, rows, "density")
        outliers = _shares(gamma if keep == "middle" else 0, rows, "gamma")
        bounded = keep == "middle"
        rows = _leaves.Mapped(_keep_between, rows, shares, outliers, bounded, scale)
    if keep in ("random", "ranked") and key is not None:
        shares = _shares(density, rows, "density")
        windows = _shares(epsilon if keep == "ranked" else 0, rows, "epsilon")
        _check_windows(shares, windows)
        keys, ranked = _leaves.keys(key, taus), keep == "ranked"
        rows = _leaves.Mapped(_keep_random, rows, keys, shares, windows, ranked, scale)
    return _leaves.fold_all(
        _merge_leaf,
        params_0,
        rows,
        weights,
        coefs,
        consensus=chosen.consensus,
        normalize=normalize,
    )


def _shares(value: Coef, rows, name) -> dict[str, np.ndarray]:
    """Returns the share of every task by path, `[T]`, in float64 for ⌊share·n⌋."""
    shares, known = {}, _leaves.unmapped(rows)
    value_of = task_vectors.by_path(value, known, name)
    for path, row in known.items():
        of_path = value_of(path)
        _leaves.per_task(of_path, len(row), f"{name} of {path}")
        shares[path] = np.broadcast_to(np.asarray(of_path, float), len(row))
        if not ((0 <= shares[path]) & (shares[path] <= 1)).all():
            raise ValueError(f"{name} of {path} is {of_path}; it must be in [0, 1].")
    return shares


def _check_windows(densities, windows):
    for path, density in densities.items():
        low, high = density - windows[path], density + windows[path]
        certain = (density == 0) | (density == 1)
        if not (certain | (low > 0) & (high < 1)).all():
            raise ValueError(
                f"density of {path} is {density} and epsilon is {windows[path]}; "
                "density ± epsilon must be in (0, 1)."
            )


def _keep_between(row, densities, outliers, bounded, rescale):
    if (densities == 1).all():
        return row
    size = row[0].size
    smallest, largest = _ranks(densities, outliers, size)
    low = _order.kth_of_leaf(row, smallest.clip(1, max(size, 1)))
    low = jnp.where(smallest <= largest, low, jnp.inf)
    high = jnp.full_like(low, jnp.inf)
    if bounded:
        high = _order.kth_of_leaf(row, largest.clip(1, max(size, 1)))
    kept = [
        tau if density == 1 else _Between(tau, *limits)
        for tau, density, *limits in zip(row, densities, low, high, strict=True)
    ]
    if rescale == "l1":
        kept = [_with_norm(x) if isinstance(x, _Between) else x for x in kept]
    return tuple(kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Between:
    """A leaf with zeros outside two magnitudes; the program that uses it sets them.

    To store such leaves in float32 for every task would take longer than the merge.
    """

    tau: jax.Array
    smallest: jax.Array
    largest: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tau.shape

    @property
    def dtype(self):
        return jnp.promote_types(self.tau.dtype, jnp.float32)

    def kept(self) -> jax.Array:
        size = jnp.abs(_leaves.widened(self.tau))
        return (size >= self.smallest) & (size <= self.largest)

    def __jax_array__(self) -> jax.Array:
        return jnp.where(self.kept(), _leaves.widened(self.tau), 0)


@jax.jit
def _with_norm(leaf):
    return rescaled(_leaves.widened(leaf.tau), leaf.kept(), None, "l1")


def _ranks(densities, outliers, size):
    """Returns the ranks `[T]` of the smallest and the largest magnitude that stay."""
    kept = np.maximum((densities * size).astype(int), densities > 0)
    below = np.maximum(size - kept - (outliers * size).astype(int), 0)
    return below + 1, below + kept


def _keep_random(row, key, densities, windows, ranked, rescale):
    # One task at a time, because the random numbers take more memory than the leaf.
    return tuple(
        tau if density == 1 else _draw(tau, key, task, density, window, ranked, rescale)
        for task, (tau, density, window) in enumerate(
            zip(row, densities, windows, strict=True)
        )
    )


@jax.jit(static_argnames=("ranked", "rescale"))
def _draw(tau, key, task, density, window, ranked, rescale):
    tau = _leaves.widened(tau)
    shares = density
    if ranked:
        ranks = centered_ranks(tau, 1 if tau.ndim > 1 else -1)
        shares = jnp.where(density > 0, density + window * ranks, 0)
    kept = _draws.draw(jax.random.fold_in(key, task), shares, tau.shape)
    return rescaled(tau, kept, None, rescale)


@_leaves.leaf_function(static=("consensus", "normalize"))
def _merge_leaf(leaf_0, taus, weights, coef, consensus, normalize):
    taus = weighted(taus, weights)
    total = jnp.sum(weights)
    if consensus:
        taus, _ = agreeing(taus, 1)
        total = sum(weighted([tau != 0 for tau in taus], weights))
    merged = sum(taus)
    if normalize:
        # As in mergekit, the sum is not divided by weights that sum to zero.
        zero = total == 0 if consensus else jnp.abs(total) < 1e-8
        merged = merged / jnp.where(zero, 1, total)
    return leaf_0 + coef * merged
