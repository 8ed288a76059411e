r"""Adaptive weight disentanglement (AWD): task arithmetic minus a redundant vector.

Xiong et al. Multi-Task Model Merging via Adaptive Weight Disentanglement.
arXiv:2411.18729.

The redundant vector δ starts at zero and descends the loss (Algorithm 1, Eq. 14)

.. math:: L = \frac{1}{K(K-1)} \sum_{i\neq j} |\cos(\tau_i-\delta, \tau_j-\delta)|
          + \alpha\|\delta\|,

and the disentangled vectors τ_i - δ are merged by task arithmetic.

Every gradient is a linear combination of the τ_i and δ. So gradient descent from zero,
with or without momentum, never leaves the span of the task vectors. With
δ = Σ_k c_k τ_k it needs only the K×K Gram matrix: one pass over the model, then steps
in K variables. The iterates are the same as in the full space, not an approximation.

It follows that one δ for whole vectors adds no new direction. With a coefficient λ_k
for every task, the merged vector is

.. math:: \sum_i\lambda_i(\tau_i-\delta)
          = \sum_k\big(\lambda_k - c_k\textstyle\sum_i\lambda_i\big)\,\tau_k,

and λ Σ_k (1 - K c_k) τ_k if all coefficients are λ. This is task arithmetic with K
scalars. With a δ for every leaf there are K scalars for each leaf, and with a δ for
every row K scalars for each row. Only Adam, and the direct solver with a key, leave the
span.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _awd_rows, _awd_solvers, _leaves
from jaxarith.typing import Coef, Params, Taus

Scope = Literal["global", "layer", "row"]
Objective = Literal["reduce", "reverse"]
Solver = Literal["gradient_descent", "momentum", "direct", "adam"]
MOMENTUM = 0.9


def awd(
    params_0: Params,
    taus: Taus,
    *,
    coef: Coef = 0.3,
    alpha: float = 1e-4,
    step_size: float = 0.01,
    steps: int = 1000,
    scope: Scope = "global",
    pattern: str | None = None,
    objective: Objective = "reduce",
    solver: Solver = "gradient_descent",
    key: jax.Array | None = None,
) -> Params:
    r"""Merges disentangled vectors, :math:`\theta_0 + \lambda\sum_i(\tau_i-\delta)`.

    The paper restricts task vectors to the weights of linear layers inside transformer
    blocks. `pattern` can do that, or `tree.select` before the call.

    Args:
      params_0: pre-trained parameters.
      taus: K ≥ 2 task vectors. A missing leaf counts as zero. A vector that is zero has
        no direction: its cosines count as 0 for every δ.
      coef: the coefficient λ: one number, one per task `[K]`, or either by path.
      alpha: the weight α of the norm of δ, in units of 1/norm: vectors that are twice
        as long need half the α. The paper searches 1e-6 to 1e-2.
      step_size: the learning rate β in units of the mean squared norm of the task
        vectors: β = step_size · mean‖τ‖². So the steps for the cosines do not depend on
        the scale of the vectors. The term α‖δ‖ moves δ by step_size · alpha · norm
        vector lengths per step. This must be far below 1, or δ does not settle. The
        paper states no β. For "adam", the unit is the root mean square entry of the
        task vectors.
      steps: the number of gradient steps. The paper times 1000 steps.
      scope: the part of the vectors that shares one δ. "global": whole vectors.
        "layer": each leaf solves Eq. 14 separately, with α Σ_l ‖δ_l‖ for the norm.
        "row": each row of a matrix solves it separately. A row holds the weights of one
        output of a layer, which `merge.input_axis` knows by name. Leaves that are not
        2-D are one row. Leaves and rows have smaller norms than the model, so the same
        α has less effect there. The authors' later code uses rows (`decompose.py` of
        WUDI, Cheng et al. 2025). It takes the mean of the cosines over the R rows of a
        matrix, so its α and learning rate β are α/R and βR here.
      pattern: a regular expression of whole slash paths. Leaves that do not match stay
        at `params_0`. `None` takes every leaf.
      objective: "reduce" minimises the absolute cosines; "reverse" maximises them, as
        in Tables 6 and 7.
      solver: "gradient_descent" is Algorithm 1. "momentum" adds a momentum of 0.9, as
        in the authors' later code; its steps grow to ten times the length. "direct"
        finds a minimum of Eq. 14 by Newton's method in K variables. It starts at zero
        and at the result of gradient descent, and is never above that result. Other
        minima may be lower, because the problem is not convex. "adam" is Adam on δ in
        the full space. It holds δ and two moments besides the task vectors, and gathers
        sharded leaves on one device. With "reverse" and a small α, minima lie far out.
      key: a random key lets the direct solver leave the span too, for the scopes
        "global" and "layer". A part of δ that is orthogonal to all task vectors acts
        only through its length, a (K+1)-th variable. Its direction is drawn from the
        key.

    Returns:
      Parameters with the structure and dtypes of `params_0`. For "gradient_descent" and
      "momentum", derivatives with respect to the task vectors go through δ. For the
      other solvers, δ is a constant.

    Raises:
      ValueError: an unknown option, a key with another solver or with rows, fewer than
        two task vectors, one that does not fit, non-finite values, or no leaf that
        matches.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([1.0, 0.5])}, {"w": jnp.array([0.5, 1.0])}]
      >>> print(awd(params_0, taus, coef=1.0)["w"].round(3))
      [0.5 0.5]
    """
    _leaves.one_of(scope, Scope, "scope")
    _leaves.one_of(objective, Objective, "objective")
    _leaves.one_of(solver, Solver, "solver")
    if key is not None and solver != "direct":
        raise ValueError(
            f'key is for solver="direct"; found solver={solver!r}. Leave out the key.'
        )
    if key is not None and scope == "row":
        raise ValueError(
            'key is for scope="global" and "layer"; found scope="row". Leave out the '
            "key."
        )
    _leaves.check(params_0, taus)
    if len(taus) < 2:
        raise ValueError(
            "AWD needs at least two task vectors; found one. Use `task_arithmetic`."
        )
    if pattern is not None:
        taus = [tree.select(tau, pattern) for tau in taus]
    coefs = _leaves.task_coefs(coef, taus)
    rows, reverse = tree.aligned(taus), objective == "reverse"
    # The parts of the vector that share one δ, each as the paths of its leaves.
    parts = [list(rows)] if scope == "global" else [[path] for path in rows]

    if solver == "adam":
        delta = {}
        for paths in parts:
            part = {path: _on_device(rows[path]) for path in paths}
            of_part = _awd_rows.adam if scope == "row" else _awd_solvers.adam
            delta |= of_part(part, alpha, step_size, steps, reverse)
        return _leaves.fold(_subtract, params_0, taus, coefs, delta)

    momentum = MOMENTUM if solver == "momentum" else 0.0

    def solve(grams, room):
        """Returns c and the length of δ outside the span, for `grams[part, K, K]`."""
        found = _redundant_of_parts(grams, alpha, step_size, steps, reverse, momentum)
        if solver == "direct":
            return _awd_solvers.direct(grams, alpha, found, room, reverse)
        return found, jnp.zeros(len(grams), grams.dtype)

    if scope == "row":
        redundant = {path: _awd_rows.coefs(path, rows[path], solve) for path in rows}
        return _leaves.fold(_subtract_combination, params_0, taus, coefs, redundant)

    grams = jnp.stack([tree.gram_of(rows[path] for path in part) for part in parts])
    # An orthogonal direction exists only if there are more entries than vectors.
    leaves = _leaves.unmapped(rows)
    entries = [sum(leaves[path][0].size for path in part) for part in parts]
    room = jnp.array([key is not None and n > len(taus) for n in entries])
    redundant, length = solve(grams, room)
    if key is None:
        redundant = _by_path(redundant, parts)
        return _leaves.fold(_subtract_combination, params_0, taus, coefs, redundant)
    keys = _leaves.keys(key, taus)
    drawn = [_awd_solvers.draw_products(rows, part, keys) for part in parts]
    inner, square = map(jnp.stack, zip(*drawn, strict=True))
    found = _awd_solvers.add_orthogonal(grams, redundant, length, inner, square)
    redundant, scale = (_by_path(x, parts) for x in found)
    return _leaves.fold(_subtract_drawn, params_0, taus, coefs, redundant, keys, scale)


@jax.jit(static_argnames="steps")
def redundant_coefs(
    gram: jax.Array,
    alpha: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    reverse: bool | jax.Array = False,
    momentum: float | jax.Array = 0.0,
) -> jax.Array:
    r"""Returns the coefficients c of the redundant vector δ, `[K]`.

    They define :math:`\delta = \sum_k c_k\tau_k`.

    Args:
      gram: inner products of K ≥ 2 task vectors, `[K, K]`.
      alpha, step_size, steps: as for `awd`.
      reverse: whether to maximise the absolute cosines.
      momentum: the share of the last step's direction that is kept: 0 for Algorithm 1.
    """
    _, basis, in_span = _awd_solvers.span(jax.lax.stop_gradient(gram))
    learning_rate = step_size * jnp.trace(gram) / len(gram)
    # Parallel vectors stay parallel, so steps would only add rounding errors.
    learning_rate = jnp.where(jnp.sum(in_span) > 1, learning_rate, 0)
    # Some combinations of the vectors may be zero: if tasks are duplicates, or if there
    # are more tasks than entries. Every step removes them from c. They do not change δ,
    # but c would grow along them until rounding moves δ.
    zeros = jnp.where(in_span[None, :], 0, basis)
    norms = jax.lax.stop_gradient(tree.safe_sqrt(jnp.diagonal(gram)))

    def without_zeros(c):
        along = jnp.dot(zeros.T, c * norms, precision="highest")
        along = jnp.dot(zeros, along, precision="highest")
        return c - _awd_solvers.inverse(norms) * along

    def step(_, state):
        c, direction = state
        # Row i of a = 1 - 1cᵀ holds the coefficients of τ_i - δ; products = a G aᵀ.
        cross = jnp.dot(gram, c, precision="highest")
        square = c @ cross
        products = _awd_solvers.rest_products(gram, cross, square)
        weights, shrink = _awd_solvers.gradient(products, square, alpha, reverse)
        direction = momentum * direction + (weights + shrink * c)
        return without_zeros(c - learning_rate * direction), direction

    zero = jnp.zeros(len(gram), gram.dtype)
    return jax.lax.fori_loop(0, steps, step, (zero, zero))[0]


@jax.jit(static_argnames="steps")
def _redundant_of_parts(grams, alpha, step_size, steps, reverse, momentum):
    def solve(gram):
        return redundant_coefs(gram, alpha, step_size, steps, reverse, momentum)

    return jax.vmap(solve)(grams)


def _on_device(row):
    return tuple(jnp.asarray(tau) for tau in tree.gathered(row))


def _by_path(values, parts):
    """Returns the value of each part by path, as an argument of `fold`."""
    return {path: v for v, part in zip(values, parts, strict=True) for path in part}


@_leaves.leaf_function
def _subtract_combination(leaf_0, taus, coefs, redundant):
    # Σ_i λ_i (τ_i - Σ_k c_k τ_k) = Σ_k (λ_k - c_k Σ_i λ_i) τ_k: task arithmetic.
    # For rows, c is [K, 1, n] or [K, m, 1].
    coefs = coefs.reshape(-1, *(1 for _ in redundant.shape[1:]))
    weights = coefs - redundant * coefs.sum()
    return leaf_0 + sum(w * tau for w, tau in zip(weights, taus, strict=True))


@_leaves.leaf_function
def _subtract_drawn(leaf_0, taus, coefs, redundant, key, scale):
    weights = coefs - redundant * coefs.sum()
    merged = leaf_0 + sum(w * tau for w, tau in zip(weights, taus, strict=True))
    noise = _awd_solvers.draw(key, leaf_0.shape)
    return merged - coefs.sum() * scale * noise


@_leaves.leaf_function
def _subtract(leaf_0, taus, coefs, delta):
    merged = leaf_0 + sum(w * tau for w, tau in zip(coefs, taus, strict=True))
    return merged - coefs.sum() * delta
