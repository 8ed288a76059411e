"""The objective of AWD, its gradient, and all solvers except gradient descent."""

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
    r"""Returns the gradient of Eq. 14 as :math:`\sum_i w_i\tau_i + s\,\delta`.

    Args:
      products: inner products of the disentangled vectors τ_i - δ, `[K, K]`.
      square: ‖δ‖².
      alpha: the weight of ‖δ‖.
      reverse: whether to maximise the absolute cosines.

    Returns:
      The weights w, `[K]`, and s. The norm of a zero vector has the gradient 0.
    """
    tasks = len(products)
    cosines = tree.cosine(products)
    scale = inverse(tree.safe_sqrt(jnp.diagonal(products)))
    # The derivatives of the cosines add up to Σ_i w_i (τ_i - δ) + α δ/‖δ‖.
    signs = jnp.sign(cosines) * (1 - jnp.eye(tasks, dtype=products.dtype))
    pairs = cosines * scale[:, None] ** 2 - scale[:, None] * scale[None, :]
    weights = 2 / (tasks * (tasks - 1)) * jnp.sum(signs * pairs, axis=1)
    weights = jnp.where(reverse, -weights, weights)
    return weights, alpha * inverse(tree.safe_sqrt(square)) - weights.sum()


def inverse(x: jax.Array) -> jax.Array:
    """Returns 1/x of norms; 0 for a norm of 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def loss(
    products: jax.Array,
    square: jax.Array,
    alpha: float | jax.Array,
    reverse: float | jax.Array,
    smoothing: float | jax.Array = 0.0,
) -> jax.Array:
    """Returns Eq. 14, with √(x² + smoothing²) in place of |x| in both terms.

    Args:
      products, square, alpha, reverse: as for `gradient`.
      smoothing: 0 returns the objective itself.
    """

    def absolute(x_squared):
        return tree.safe_sqrt(x_squared + smoothing**2)

    tasks = len(products)
    off_diagonal = 1 - jnp.eye(tasks, dtype=products.dtype)
    cosines = jnp.sum(off_diagonal * absolute(tree.cosine(products) ** 2))
    cosines = cosines / (tasks * (tasks - 1))
    return jnp.where(reverse, -cosines, cosines) + alpha * absolute(square)


def rest_products(gram: jax.Array, cross: jax.Array, square: jax.Array) -> jax.Array:
    """Returns the inner products of the vectors τ_i - δ, `[K, K]`.

    They are 0 for a τ_i that is zero, because it has no direction.

    Args:
      gram: inner products of the task vectors, `[K, K]`.
      cross: ⟨τ_i, δ⟩, `[K]`.
      square: ‖δ‖².
    """
    products = gram - cross[:, None] - cross[None, :] + square
    present = jnp.diagonal(gram) > 0
    return jnp.where(present[:, None] & present[None, :], products, 0)


def span(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decides which eigenvectors of the cosine matrix are directions in the span.

    With the other eigenvectors as weights, the vectors of unit norm add up to zero, up
    to rounding.

    Returns:
      The eigenvalues `[K]`, ascending, the eigenvectors `[K, K]` as columns, and
      whether each one is a direction in the span, `bool[K]`.
    """
    eigenvalues, basis = jnp.linalg.eigh(tree.cosine(gram))
    threshold = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    return eigenvalues, basis, eigenvalues > threshold * eigenvalues[-1]


# The number of stages of smoothing, and of steps in each stage.
STAGES, NEWTON_STEPS = 12, 8


@jax.jit
def direct(
    grams: jax.Array,
    alpha: float | jax.Array,
    redundant: jax.Array,
    room: jax.Array,
    reverse: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Finds a minimum of Eq. 14 over δ = Σ_k c_k τ_k + r u.

    u is a unit vector orthogonal to the span. Newton's method minimises a smoothed
    objective, which gets sharper in stages. It starts at the result of gradient descent
    and at zero, each inside the span and outside it. From all starts and ends, the
    function returns the best one by Eq. 14 itself.

    Args:
      grams: inner products of the task vectors of every part, `[part, K, K]`.
      alpha: the weight of ‖δ‖.
      redundant: c where gradient descent ended, `[part, K]`.
      room: whether r may differ from zero, `bool[part]`.
      reverse: whether to maximise the absolute cosines.

    Returns:
      c, `[part, K]`, and r, `[part]`.
    """
    # The result is a constant for derivatives, because an eigendecomposition has no
    # derivative where eigenvalues are equal.
    grams, redundant = jax.lax.stop_gradient((grams, redundant))
    return jax.vmap(lambda g, c, free: _direct_part(g, alpha, c, free, reverse))(
        grams, redundant, room
    )


def _direct_part(gram, alpha, redundant, room, reverse):
    epsilon = jnp.finfo(gram.dtype).eps
    norms = tree.safe_sqrt(jnp.diagonal(gram))
    unit = tree.safe_sqrt(jnp.mean(norms**2))
    unit = jnp.where(unit > 0, unit, 1)
    # The rows of `vectors` are the task vectors in an orthonormal basis of their span,
    # in units of their root mean square norm. The last coordinate is orthogonal to it.
    eigenvalues, basis, in_span = span(gram)
    roots = jnp.where(in_span, tree.safe_sqrt(eigenvalues), 0)
    vectors = jnp.pad(basis * roots[None, :] * norms[:, None] / unit, ((0, 0), (0, 1)))
    # On a line nothing can change, because parallel vectors stay parallel.
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
        # Absolute eigenvalues make the step go downhill even where the objective is not
        # convex.
        values, axes = jnp.linalg.eigh(curvature)
        values = jnp.abs(values)
        values = jnp.maximum(values, 1e-6 * values.max() + epsilon)
        move = -axes @ ((axes.T @ slope) / values) * free
        move = move / jnp.maximum(1, jnp.linalg.norm(move))
        # Next to a very short vector the curvature overflows. Then there is no step.
        move = jnp.where(jnp.isfinite(move).all(), move, 0)
        # The best of several step lengths is taken. One of them is zero, so the
        # objective never rises.
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
    """Returns `delta` with a length outside the span.

    The length cancels the negative products on average. The start needs this jump,
    because r = 0 is a stationary point, and a local minimum at δ = 0.
    """
    rest = vectors - delta[None, :]
    products = jnp.dot(rest, rest.T, precision="highest")
    negative = products < 0
    total = -jnp.sum(jnp.where(negative, products, 0))
    square = total / jnp.maximum(negative.sum(), 1)
    return delta.at[-1].set(jnp.where(room, tree.safe_sqrt(square), 0))


def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws the Gaussian numbers of one leaf for the orthogonal direction."""
    return jax.random.normal(key, shape, jnp.float32)


def draw_products(
    rows: Mapping[str, tuple], part: Sequence[str], keys: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns inner products of the drawn vector with the task vectors and itself.

    They have the shapes `[K]` and `[]`.
    """
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
    """Expresses δ = Σ_k c_k τ_k + r u by the task vectors and the drawn vector n.

    u is n minus its projection Σ_k b_k τ_k on the span, scaled to unit length.

    Args:
      gram, redundant, length: G, c and r of every part.
      inner, square: ⟨n, τ_k⟩ and ‖n‖² of every part.

    Returns:
      The coefficients of the τ_k, `[part, K]`, and the coefficient of n, `[part]`.
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
    """Finds δ by Adam (Kingma and Ba 2015), with its usual constants, in full space.

    Args:
      part: the leaf in every task, by path.
      alpha, steps: as for `awd`.
      step_size: the learning rate in units of the root mean square entry of the τ_i.
      reverse: whether to maximise the absolute cosines.

    Returns:
      δ: its leaves by path.
    """
    part = jax.lax.stop_gradient(part)
    tasks = len(next(iter(part.values())))
    gram = tree.gram(
        [{path: row[i] for path, row in part.items()} for i in range(tasks)]
    )
    entries = sum(row[0].size for row in part.values())
    learning_rate = step_size * jnp.sqrt(jnp.trace(gram) / max(tasks * entries, 1))
    # Parallel vectors stay parallel. Adam would only amplify the rounding of a zero.
    learning_rate = jnp.where(jnp.sum(span(gram)[2]) > 1, learning_rate, 0)
    decay_1, decay_2, epsilon = 0.9, 0.999, 1e-8

    def step(n, state):
        delta, first, second = state
        # Each step widens the leaves one by one. To widen them all once would copy them
        # all, and XLA would do so if this did not depend on the state.
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
            # The weights, which all leaves share, may be wider than this leaf.
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
    """Returns a leaf of every task in one dtype, float32 or wider."""
    return tuple(jnp.asarray(leaf, _wide(row)) for leaf in row)
