r"""Adaptive weight disentanglement (AWD): task arithmetic less a redundant vector.

Xiong et al. Multi-Task Model Merging via Adaptive Weight Disentanglement.
arXiv:2411.18729.

The redundant vector δ starts at zero and descends (Algorithm 1, Eq. 14)

.. math:: L = \frac{1}{K(K-1)} \sum_{i\neq j} |\cos(\tau_i-\delta, \tau_j-\delta)|
          + \alpha\|\delta\|,

and the disentangled vectors τ_i - δ are merged by task arithmetic.

Every gradient is a combination of the τ_i and δ, so plain gradient descent from zero
never leaves the span of the task vectors. With δ = Σ_k c_k τ_k all that it needs is the
K×K Gram matrix: one pass over the model, then steps in K variables. These are the same
iterates as in the full space, not an approximation.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.merge.task_arithmetic import add_scaled
from jaxarith.tree import Tree


def awd(
    params_0: Tree,
    taus: Sequence[Tree],
    *,
    coef=0.3,
    alpha=1e-4,
    step_size=0.01,
    steps=1000,
) -> Tree:
    r"""Merges disentangled vectors, :math:`\theta_0 + \lambda\sum_i(\tau_i-\delta)`.

    The paper restricts task vectors to the weights of linear layers inside transformer
    blocks; `tree.select` does that before the call.

    Args:
      params_0: pre-trained parameters.
      taus: K ≥ 2 task vectors. A leaf that one lacks counts as zero.
      coef: the coefficient λ: one number, or one per task `[K]`.
      alpha: the weight α of the norm of δ; the paper searches 1e-6 to 1e-2.
      step_size: the learning rate β in units of the mean squared norm of the task
        vectors, which makes it independent of their scale: β = step_size · mean‖τ‖².
        The paper states no β.
      steps: the number of gradient steps (the paper times 1000).

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: fewer than two task vectors, one that does not fit, or non-finite
        values.

    Example:
      >>> params_0 = {"w": jnp.zeros(2)}
      >>> taus = [{"w": jnp.array([1.0, 0.5])}, {"w": jnp.array([0.5, 1.0])}]
      >>> print(awd(params_0, taus, coef=1.0)["w"].round(3))
      [0.5 0.5]
    """
    _leaves.check(params_0, taus)
    coefs = _leaves.per_task(coef, len(taus), "coef")
    redundant = redundant_coefs(tree.gram(taus), alpha, step_size, steps)
    # Σ_i λ_i (τ_i - Σ_k c_k τ_k) = Σ_k (λ_k - c_k Σ_i λ_i) τ_k: task arithmetic.
    return _leaves.fold(add_scaled, params_0, taus, coefs - redundant * coefs.sum())


@functools.partial(jax.jit, static_argnames="steps")
def redundant_coefs(gram: jax.Array, alpha, step_size, steps: int) -> jax.Array:
    r"""The coefficients c of the redundant vector, :math:`\delta = \sum_k c_k\tau_k`.

    Args:
      gram: inner products of the task vectors, `[K, K]`.
      alpha, step_size, steps: as for `awd`.

    Returns:
      `[K]`.

    Raises:
      ValueError: K < 2.
    """
    tasks = len(gram)
    if tasks < 2:
        raise ValueError("AWD disentangles at least two task vectors; found one.")
    learning_rate = step_size * jnp.trace(gram) / tasks

    def step(_, c):
        a = jnp.eye(tasks, dtype=gram.dtype) - c[None]  # row i: τ_i - δ, by the τ_k
        products = jnp.einsum("ik,kl,jl->ij", a, gram, a, precision="highest")
        cosines = tree.cosine(products)
        norms = tree.safe_sqrt(jnp.diagonal(products))
        inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        # ∇L = Σ_i w_i (τ_i - δ) + α δ/‖δ‖, from the derivative of every cosine.
        signs = jnp.sign(cosines) * (1 - jnp.eye(tasks, dtype=gram.dtype))
        pairs = cosines * inverse[:, None] ** 2 - inverse[:, None] * inverse[None, :]
        weights = 2 / (tasks * (tasks - 1)) * jnp.sum(signs * pairs, axis=1)
        length = tree.safe_sqrt(c @ jnp.dot(gram, c, precision="highest"))
        unit = jnp.where(length > 0, c / jnp.where(length > 0, length, 1), 0)
        return c - learning_rate * (weights - weights.sum() * c + alpha * unit)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(tasks, gram.dtype))
