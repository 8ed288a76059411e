"""What the library is compared with: NumPy transcriptions, differences, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np


def ties(theta_0, taus, density, coef=1.0, aggregate="mean"):
    """The authors' `ties_merging` (`topk_mass_dis-*`) on vectors `[d]`, `[task, d]`.

    One line differs: theirs takes `trimmed < 0` also where the sign is still zero,
    which is where an entry cancels and no sign has the majority.
    """
    size = taus.shape[1]
    thresholds = ties_thresholds(taus, size - int(size * density))
    trimmed = taus * (np.abs(taus) >= thresholds[:, None])
    sign = np.sign(trimmed.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    kept = np.where((sign > 0) & (trimmed > 0) | (sign < 0) & (trimmed < 0), trimmed, 0)
    counts = (kept != 0).sum(axis=0)
    merged = {
        "mean": kept.sum(axis=0) / np.maximum(counts, 1),
        "sum": kept.sum(axis=0),
        "max": np.abs(kept).max(axis=0) * sign,
    }
    return theta_0 + coef * merged[aggregate]


def ties_thresholds(taus, rank):
    """The `rank`-th smallest magnitude of every row, 0 for rank 0 (nothing trimmed)."""
    if rank == 0:
        return np.zeros(len(taus), taus.dtype)
    return np.partition(np.abs(taus), rank - 1, axis=1)[:, rank - 1]


def awd_loss(delta, taus, alpha):
    """AWD paper, Eq. 14 as printed, of `delta[d]`, `taus[task, d]`; ‖δ‖' = 0 at 0."""
    tasks = len(taus)
    rest = taus - delta[None]
    norms = jnp.sqrt(jnp.sum(rest**2, axis=1))
    cosines = rest @ rest.T / (norms[:, None] * norms[None])
    square = jnp.sum(delta**2)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    off_diagonal = jnp.sum(jnp.abs(cosines)) - jnp.sum(jnp.abs(jnp.diagonal(cosines)))
    return off_diagonal / (tasks * (tasks - 1)) + alpha * length


awd_gradient = jax.jit(jax.grad(awd_loss))


def awd_descent(taus, alpha, learning_rate, steps):
    """AWD paper, Algorithm 1 on whole vectors, by automatic differentiation."""
    delta = jnp.zeros_like(taus[0])
    for _ in range(steps):
        delta = delta - learning_rate * awd_gradient(delta, taus, alpha)
    return delta


def awd_momentum(taus, alpha, learning_rate, steps, momentum=0.9, sign=1.0):
    """PyTorch's SGD with momentum in the full space, with the gradient in NumPy."""
    taus, tasks = np.asarray(taus), len(taus)
    delta = velocity = np.zeros_like(taus[0])
    for _ in range(steps):
        rest = taus - delta
        norms = np.linalg.norm(rest, axis=1)
        gradient = np.zeros_like(delta)
        for i in range(tasks):
            for j in range(tasks):
                if i != j:
                    cosine = rest[i] @ rest[j] / (norms[i] * norms[j])
                    slope = -(rest[i] + rest[j]) / (norms[i] * norms[j])
                    slope += cosine * (
                        rest[i] / norms[i] ** 2 + rest[j] / norms[j] ** 2
                    )
                    gradient += sign * np.sign(cosine) * slope / (tasks * (tasks - 1))
        if delta.any():
            gradient += alpha * delta / np.linalg.norm(delta)
        velocity = momentum * velocity + gradient
        delta = delta - float(learning_rate) * velocity
    return delta


def central_difference(function, point, direction, h=1e-4):
    """The derivative of `function` at a pytree, along a pytree, to O(h⁴)."""

    def at(t):
        return function(jax.tree.map(lambda p, d: p + t * d, point, direction))

    return jax.tree.map(
        lambda a, b, c, d: (8 * (a - b) - (c - d)) / (12 * h),
        *(at(h), at(-h), at(2 * h), at(-2 * h)),
    )


def flops(function, *args):
    """The floating-point operations that XLA counts in the compiled function."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def normal(seed, *shape, scale=1.0):
    """Seeded Gaussian numbers as float64 NumPy."""
    return scale * np.random.default_rng(seed).standard_normal(shape)
