"""Finds AWD's redundant vector, and compares AWD's merge with the plain sum.

With one redundant vector δ = Σ c_k τ_k for whole vectors, AWD's merge is
λ Σ (1 - K c_k) τ_k: task arithmetic with K scalars. So every report has two figures for
AWD's merged vector:

- Its cosine with the plain sum Σ τ_k of the same weights. It is 1 if AWD is task
  arithmetic at another λ.
- Its effective λ: the length of its projection on the plain sum, divided by the length
  of that sum.

The paper describes plain gradient descent. It states neither the learning rate nor
whether the cosines are those of whole vectors, and it has no code. In the authors'
later code for RoBERTa (`decompose.py` of WUDI, Cheng et al. 2025) every row of a weight
has its own redundant vector, found by 2000 steps of SGD with a momentum of 0.9. The
closest options here are `--scope row --solver momentum --awd-steps 2000`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax

from jaxarith import merge, task_vectors, tree
from jaxarith.merge.awd import Scope, Solver
from jaxarith.typing import Coef, Params, Taus, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all scripts on AWD."""

    scope: Scope = "global"
    """The part that shares one redundant vector: the whole model (global), a parameter
    tensor (layer), or the weights of one output of a layer (row)."""
    solver: Solver = "gradient_descent"
    """The solver for the redundant vector, see `jaxarith.merge.awd`."""
    step_size: float = 0.01
    """AWD's learning rate, in units of the mean squared norm of the task vectors; for
    `adam` in units of their root mean square entry."""
    awd_steps: int = 1000
    """Number of steps of AWD's solver."""


def merged(
    params_0: Params,
    parts: Taus,
    how: Options,
    *,
    alpha: float,
    coef: Coef = 1.0,
    objective: Literal["reduce", "reverse"] = "reduce",
) -> Tree:
    """Returns the vector Σ λ_k (τ_k - δ), with the leaves of the task vectors.

    Args:
      params_0: pre-trained parameters.
      parts: the task vectors, all with the same leaves.
      how: options of the script.
      alpha: weight of the norm of δ.
      coef: coefficient λ, one number or one per task.
      objective: "reduce" the cosines, or "reverse" (increase them).
    """
    model = merge.awd(
        params_0,
        parts,
        coef=coef,
        alpha=alpha,
        step_size=how.step_size,
        steps=how.awd_steps,
        scope=how.scope,
        objective=objective,
        solver=how.solver,
    )
    difference = task_vectors.difference(model, params_0)
    return tree.restrict(difference, tree.flatten(parts[0]))


def weighted_sum(taus: Taus, weights: Iterable[float]) -> Tree:
    """Returns Σ w_k τ_k; the task vectors all have the same leaves."""
    weights = [float(weight) for weight in weights]

    def of_leaf(*leaves):
        return sum(w * leaf for w, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(of_leaf, *taus)


def beside_sum(vector: Tree, total: Tree, coef: float = 1.0) -> dict[str, float]:
    """Returns a merged vector's cosine with the plain sum, and its effective λ.

    Args:
      vector: the merged vector at coefficient 1.
      total: the plain sum of the task vectors.
      coef: the coefficient of the merged vector.

    Example:
      >>> jnp = jax.numpy
      >>> total = {"w": jnp.array([2.0, 0.0])}
      >>> beside_sum({"w": jnp.array([1.0, 0.0])}, total, coef=0.5)
      {'cosine with sum': 1.0, 'effective λ': 0.25}
    """
    gram = tree.gram([vector, total])
    cosine, square = float(tree.cosine(gram)[0, 1]), float(gram[1, 1])
    projection = float(gram[0, 1]) / square if square else 0.0
    return {"cosine with sum": cosine, "effective λ": coef * projection}
