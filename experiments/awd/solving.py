"""How the scripts find AWD's redundant vector, and what it changes of the plain sum.

With one redundant vector δ = Σ c_k τ_k for whole vectors, AWD's merge is
λ Σ (1 - K c_k) τ_k: task arithmetic with K scalars. So every report says of AWD's
merged vector

- its cosine with the plain sum Σ τ_k of the same weights, which is 1 where AWD is task
  arithmetic at another λ, and
- its effective λ, the length of its projection on the plain sum in units of that sum.

The paper describes plain gradient descent, states neither its learning rate nor
whether the cosines are those of whole vectors, and has no code. In the authors' later
code for RoBERTa (`decompose.py` of WUDI, Cheng et al. 2025) every row of a weight has a
redundant vector of its own, found by 2000 steps of SGD with a momentum of 0.9. The
nearest to it here is `--scope row --solver momentum --awd-steps 2000`.
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
    """The options of all scripts on AWD."""

    scope: Scope = "global"
    """What shares a redundant vector: the whole model, a parameter tensor, or a row,
    which is the weights of one output of a layer."""
    solver: Solver = "gradient_descent"
    """How it is found, see `jaxarith.merge.awd`."""
    step_size: float = 0.01
    """AWD's learning rate, in units of the mean squared norm of the task vectors; for
    `adam` of their root mean square entry."""
    awd_steps: int = 1000
    """The steps in which it is found."""


def merged(
    params_0: Params,
    parts: Taus,
    how: Options,
    *,
    alpha: float,
    coef: Coef = 1.0,
    objective: Literal["reduce", "reverse"] = "reduce",
) -> Tree:
    """The vector Σ λ_k (τ_k - δ), of the leaves that the task vectors have.

    Args:
      params_0: pre-trained parameters.
      parts: the task vectors, which all have the same leaves.
      how: options of the script.
      alpha: the weight of the norm of δ.
      coef: λ, one number or one for every task.
      objective: "reduce" the cosines, or "reverse".
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
    """Σ w_k τ_k of task vectors that all have the same leaves."""
    weights = [float(weight) for weight in weights]

    def of_leaf(*leaves):
        return sum(w * leaf for w, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(of_leaf, *taus)


def beside_sum(vector: Tree, total: Tree, coef: float = 1.0) -> dict[str, float]:
    """A merged vector's cosine with the plain sum, and its effective λ: cells of a row.

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
