"""AWD's objective, its gradient, and the solvers besides plain gradient descent."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxarith import tree


def gradient(
    products: jax.Array,
    square: jax.Array,
    alpha: float | jax.Array,
    reverse: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    r"""The gradient of Eq. 14 as :math:`\sum_i w_i\tau_i + s\,\delta`.

    Args:
      products: inner products of the disentangled vectors τ_i - δ, `[K, K]`.
      square: ‖δ‖².
      alpha: the weight of ‖δ‖.
      reverse: whether the absolute cosines are maximised.

    Returns:
      The weights w, `[K]`, and s. The norms of vectors that are zero have gradient 0.
    """
    tasks = len(products)
    cosines = tree.cosine(products)
    scale = inverse(tree.safe_sqrt(jnp.diagonal(products)))
    # From the derivative of every cosine: Σ_i w_i (τ_i - δ) + α δ/‖δ‖.
    signs = jnp.sign(cosines) * (1 - jnp.eye(tasks, dtype=products.dtype))
    pairs = cosines * scale[:, None] ** 2 - scale[:, None] * scale[None, :]
    weights = 2 / (tasks * (tasks - 1)) * jnp.sum(signs * pairs, axis=1)
    weights = jnp.where(reverse, -weights, weights)
    return weights, alpha * inverse(tree.safe_sqrt(square)) - weights.sum()


def inverse(x: jax.Array) -> jax.Array:
    """1/x for norms; 0 for a norm of 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def loss(
    products: jax.Array,
    square: jax.Array,
    alpha: float | jax.Array,
    reverse: float | jax.Array,
    smoothing: float | jax.Array = 0.0,
) -> jax.Array:
    """Eq. 14, with √(x² + smoothing²) for |x| in both terms.

    Args:
      products, square, alpha, reverse: as for `gradient`.
      smoothing: 0 for the objective itself.
    """

    def absolute(x_squared):
        return tree.safe_sqrt(x_squared + smoothing**2)

    tasks = len(products)
    off_diagonal = 1 - jnp.eye(tasks, dtype=products.dtype)
    cosines = jnp.sum(off_diagonal * absolute(tree.cosine(products) ** 2))
    cosines = cosines / (tasks * (tasks - 1))
    return jnp.where(reverse, -cosines, cosines) + alpha * absolute(square)


def rest_products(gram: jax.Array, cross: jax.Array, square: jax.Array) -> jax.Array:
    """Inner products of the τ_i - δ; 0 with a τ_i that is zero, which has no direction.

    Args:
      gram: inner products of the task vectors, `[K, K]`.
      cross: ⟨τ_i, δ⟩, `[K]`.
      square: ‖δ‖².
    """
    products = gram - cross[:, None] - cross[None, :] + square
    present = jnp.diagonal(gram) > 0
    return jnp.where(present[:, None] & present[None, :], products, 0)


def span(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which eigenvectors of the cosines are directions of the vectors' span.

    The others combine the vectors, scaled to unit norm, to zero, up to rounding.

    Returns:
      The eigenvalues `[K]`, ascending, the eigenvectors `[K, K]` as columns, and the
      answer, `bool[K]`.
    """
    eigenvalues, basis = jnp.linalg.eigh(tree.cosine(gram))
    threshold = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    return eigenvalues, basis, eigenvalues > threshold * eigenvalues[-1]


# Stages of smoothing, and steps in each.
STAGES, NEWTON_STEPS = 12, 8


@jax.jit
def direct(
    grams: jax.Array,
    alpha: float | jax.Array,
    redundant: jax.Array,
    room: jax.Array,
    reverse: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A minimum of Eq. 14 over δ = Σ_k c_k τ_k + r u, u a unit vector off the span.

    Newton's method on a smoothed objective that is sharpened in stages, from where
    gradient descent ended and from zero, inside the span and off it. Of all ends and
    starts, the best by Eq. 14 itself is returned.

    Args:
      grams: inner products of the task vectors of every part, `[part, K, K]`.
      alpha: the weight of ‖δ‖.
      redundant: where gradient descent ended, `[part, K]`.
      room: whether r may differ from zero, `bool[part]`.
      reverse: whether the absolute cosines are maximised.

    Returns:
      c, `[part, K]`, and r, `[part]`.
    """
    # A constant to differentiation: an eigendecomposition has no derivative where
    # eigenvalues meet.
    grams, redundant = jax.lax.stop_gradient((grams, redundant))
    return jax.vmap(lambda g, c, free: _direct_part(g, alpha, c, free, reverse))(
        grams, redundant, room
    )


def _direct_part(gram, alpha, redundant, room, reverse):
    epsilon = jnp.finfo(gram.dtype).eps
    norms = tree.safe_sqrt(jnp.diagonal(gram))
    unit = tree.safe_sqrt(jnp.mean(norms**2))
    unit = jnp.where(unit > 0, unit, 1)
    # The vectors in an orthonormal basis of their span are the rows of `vectors`; the
    # last coordinate is the orthogonal one. In units of their root mean square norm.
    eigenvalues, basis, in_span = span(gram)
    roots = jnp.where(in_span, tree.safe_sqrt(eigenvalues), 0)
    vectors = jnp.pad(basis * roots[None, :] * norms[:, None] / unit, ((0, 0), (0, 1)))
    # Within a line, parallel vectors stay parallel.
    free = jnp.append(in_span & (in_span.sum() > 1), room)
    present = norms > 0
    alpha = alpha * unit

    def objective(delta, smoothing):
        rest = vectors - delta[None, :]
        products = jnp.dot(rest, rest.T, precision="highest")
        products = jnp.where(present[:, None] & present[None, :], products, 0)
        return loss(products, delta @ delta, alpha, reverse, smoothing)

    def newton_step(_, state):
        delta, smoothing = state
        slope = jax.grad(objective)(delta, smoothing) * free
        curvature = jax.hessian(objective)(delta, smoothing)
        curvature = jnp.where(free[:, None] & free[None, :], curvature, 0)
        # |eigenvalues|: downhill also where the objective is not convex.
        values, axes = jnp.linalg.eigh(curvature)
        values = jnp.abs(values)
        values = jnp.maximum(values, 1e-6 * values.max() + epsilon)
        move = -axes @ ((axes.T @ slope) / values) * free
        move = move / jnp.maximum(1, jnp.linalg.norm(move))
        # The curvature next to a very short vector overflows: no step then.
        move = jnp.where(jnp.isfinite(move).all(), move, 0)
        # The best of several step lengths; zero among them, so it never climbs.
        lengths = jnp.append(2.0 ** -jnp.arange(0, 16, 1.5), 0).astype(delta.dtype)
        trials = delta[None, :] + lengths[:, None] * move[None, :]
        values = jax.vmap(objective, (0, None))(trials, smoothing)
        return trials[jnp.nanargmin(values)], smoothing

    def anneal(smoothing, delta):
        state = (delta, smoothing)
        return jax.lax.fori_loop(0, NEWTON_STEPS, newton_step, state)[0]

    descended = jnp.dot(vectors.T, redundant, precision="highest")
    starts = [descended, jnp.zeros_like(descended)]
    starts = jnp.stack([s for d in starts for s in (d, _off_span(vectors, d, room))])
    widths = jnp.geomspace(0.1, 10 * epsilon, STAGES, dtype=gram.dtype)

    def solve(start):
        return jax.lax.fori_loop(0, STAGES, lambda i, d: anneal(widths[i], d), start)

    ends = jnp.concatenate([starts, jax.vmap(solve)(starts)])
    values = jax.vmap(objective, (0, None))(ends, 0.0)
    best = ends[jnp.nanargmin(values)]
    c = jnp.dot(basis, best[:-1] * inverse(roots), precision="highest")
    return c * inverse(norms) * unit, jnp.abs(best[-1]) * unit


def _off_span(vectors, delta, room):
    """`delta` with the length off the span that cancels negative products on average.

    r = 0 is a stationary point, and a local minimum at δ = 0, so it is left by a jump.
    """
    rest = vectors - delta[None, :]
    products = jnp.dot(rest, rest.T, precision="highest")
    negative = products < 0
    total = -jnp.sum(jnp.where(negative, products, 0))
    square = total / jnp.maximum(negative.sum(), 1)
    return delta.at[-1].set(jnp.where(room, tree.safe_sqrt(square), 0))


def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The Gaussian numbers of one leaf, from which the orthogonal direction is made."""
    return jax.random.normal(key, shape, jnp.float32)


def draw_products(
    rows: Mapping[str, tuple], part: Sequence[str], keys: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Inner products of the drawn vector with the task vectors, `[K]`, and itself."""
    products = [_draw_products(tree.gathered(rows[path]), keys[path]) for path in part]
    inner, square = zip(*products, strict=True)
    return tree.total(inner), tree.total(square)


@jax.jit
def _draw_products(row, key):
    row = widened(row)
    noise = draw(key, row[0].shape).astype(row[0].dtype)
    *inner, square = tree.sums([*(noise * leaf for leaf in row), noise * noise])
    return jnp.stack(inner), square


@jax.jit
@jax.vmap
def add_orthogonal(
    gram: jax.Array,
    redundant: jax.Array,
    length: jax.Array,
    inner: jax.Array,
    square: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """δ = Σ_k c_k τ_k + r u in terms of the task vectors and the drawn vector n.

    u is n less its projection Σ_k b_k τ_k on the span, at unit length.

    Args:
      gram, redundant, length: G, c and r of every part.
      inner, square: ⟨n, τ_k⟩ and ‖n‖² of every part.

    Returns:
      The coefficients of the τ_k, `[part, K]`, and that of n, `[part]`.
    """
    gram, inner = jax.lax.stop_gradient((gram, inner))
    projection = jnp.linalg.pinv(gram, hermitian=True) @ inner
    scale = length * inverse(tree.safe_sqrt(square - projection @ inner))
    return redundant - scale * projection, scale


@jax.jit(static_argnames="steps")
def adam(
    part: dict[str, Sequence[jax.Array]],
    alpha: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    reverse: float | jax.Array,
) -> dict[str, jax.Array]:
    """δ by Adam (Kingma and Ba 2015) with its usual constants, in the full space.

    Args:
      part: `{path: leaf in every task}`.
      alpha, steps: as for `awd`.
      step_size: the learning rate in units of the root mean square entry of the τ_i.
      reverse: whether the absolute cosines are maximised.

    Returns:
      δ, `{path: leaf}`.
    """
    part = jax.lax.stop_gradient(part)
    tasks = len(next(iter(part.values())))
    gram = tree.gram(
        [{path: row[i] for path, row in part.items()} for i in range(tasks)]
    )
    entries = sum(row[0].size for row in part.values())
    learning_rate = step_size * jnp.sqrt(jnp.trace(gram) / max(tasks * entries, 1))
    # Parallel vectors stay parallel; Adam would enlarge the rounding of a zero.
    learning_rate = jnp.where(jnp.sum(span(gram)[2]) > 1, learning_rate, 0)
    decay_1, decay_2, epsilon = 0.9, 0.999, 1e-8

    def step(n, state):
        delta, first, second = state
        # Wide in every step, leaf by leaf, not once: that would be a copy of them all.
        # XLA would move it out of the loop if it did not depend on the state.
        held, delta = jax.lax.optimization_barrier((part, delta))
        rows = {path: widened(row) for path, row in held.items()}
        *cross, square = tree.total(
            tree.sums([x * delta[path] for x in (*row, delta[path])])
            for path, row in rows.items()
        )
        cross = jnp.stack(cross)
        products = rest_products(gram, cross, square)
        weights, shrink = gradient(products, square, alpha, reverse)

        def leaf(row, delta, first, second):
            slope = (
                sum(w * tau for w, tau in zip(weights, row, strict=True))
                + shrink * delta
            )
            first = decay_1 * first + (1 - decay_1) * slope
            second = decay_2 * second + (1 - decay_2) * slope**2
            mean = first / (1 - decay_1 ** (n + 1))
            spread = jnp.sqrt(second / (1 - decay_2 ** (n + 1)))
            delta = delta - learning_rate * mean / (spread + epsilon)
            # Weights that all leaves share may be wider than this one.
            return tuple(x.astype(row[0].dtype) for x in (delta, first, second))

        new = {p: leaf(row, delta[p], first[p], second[p]) for p, row in rows.items()}
        return tuple(
            {path: leaves[i] for path, leaves in new.items()} for i in range(3)
        )

    zeros = {path: jnp.zeros(row[0].shape, _wide(row)) for path, row in part.items()}
    return jax.lax.fori_loop(0, steps, step, (zeros, zeros, zeros))[0]


def _wide(row):
    return tree.wide_dtype(*row)


def widened(row: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """A leaf of every task in one dtype, float32 or wider."""
    return tuple(jnp.asarray(leaf, _wide(row)) for leaf in row)
