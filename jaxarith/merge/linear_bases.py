r"""A few basis vectors whose linear combinations are the task vectors.

The two methods are PCA and an autoencoder.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. The authors' current
code (github.com/uiuctml/TaskVectorBasis) uses these bases instead of the clusters of
the first version.

With the T task vectors as the columns of a matrix V and an encoder B, `[T, M]`, the M
basis vectors are V B. With a decoder W, `[M, T]`, the task vectors are recovered as

.. math:: \hat V = V B W \quad (+\ \bar\tau \text{ for PCA}).

B and W need only the Gram matrix :math:`G = V^\top V`. It takes one pass over the task
vectors, and the basis vectors take a second pass.

Addition: the authors' code adds the basis vectors, θ0 + α Σ_m b_m, without the mean of
PCA. Its result depends on the signs of eigenvectors, which are arbitrary. We add the
vectors that `recover` returns. With PCA their sum is the sum of the task vectors, for
every M, because the errors of the recovered vectors sum to zero.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.merge import _leaves
from jaxarith.typing import Array, Taus, Tree


class LinearBases(NamedTuple):
    """Basis vectors, and the weights that turn them back into task vectors.

    Attributes:
      basis: the M basis vectors, in float32 or better.
      coefficients: the decoder W, `[M, T]`.
      mean: the mean of the task vectors, which is one more vector to store, or None.
    """

    basis: list[Tree]
    coefficients: jax.Array
    mean: Tree | None


class Factors(NamedTuple):
    """The matrices that define bases, without any vector.

    Attributes:
      encoder: B, `[T, M]`. Basis vector m is Σ_i B[i, m] τ_i.
      decoder: W, `[M, T]`. Task vector i is approximately Σ_m W[m, i] b_m, plus the
        mean for PCA.
    """

    encoder: jax.Array
    decoder: jax.Array


def pca(taus: Taus, count: int | None = None) -> LinearBases:
    """Returns the principal components of task vectors.

    Source: the authors' current code of the bases paper, Zeng et al. arXiv:2502.01015.

    Args:
      taus: T task vectors. A missing leaf counts as zero.
      count: M, the number of components, at most T. None takes half of T, as in the
        authors' code. With T - 1 every task vector is recovered exactly.

    Returns:
      M orthogonal basis vectors and the mean of the task vectors: M + 1 vectors to
      store. The longest basis vector is first. Their signs are arbitrary.

    Raises:
      ValueError: no task vector, non-finite values, or M is not in 1 to T.

    Example:
      >>> taus = [{"w": jnp.array(w)} for w in ([4.0, 1], [2.0, 1], [0.0, 1])]
      >>> found = pca(taus, 1)
      >>> print(found.mean["w"], recover(found, [0])[0]["w"].round(3))
      [2. 1.] [4. 1.]
    """
    _leaves.check_vectors(taus)
    factors = pca_factors(tree.gram(taus), count)
    mean = jnp.full((len(taus), 1), 1 / len(taus))
    *basis, mean = combined(taus, jnp.concatenate([factors.encoder, mean], axis=1))
    return LinearBases(basis, factors.decoder, mean)


def autoencoder(
    taus: Taus,
    count: int | None = None,
    *,
    key: jax.Array,
    steps: int = 6000,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-6,
    temperature: float = 5.0,
) -> LinearBases:
    """Finds weighted means of task vectors from which they are recovered best.

    The training works on T × T matrices, not on the task vectors. The defaults are
    those of the authors' `scripts/build_ae_basis.py`.

    Args:
      taus: T task vectors. A missing leaf counts as zero.
      count: M, the number of basis vectors, at most T. None takes half of T.
      key: random key for the initial encoder.
      steps, learning_rate, weight_decay: options of Adam. As in PyTorch's Adam, the
        decay is part of the gradient.
      temperature: the encoder is the softmax of its parameters divided by this number.

    Returns:
      M basis vectors, without a mean.

    Raises:
      ValueError: no task vector, non-finite values, or M is not in 1 to T.

    Example:
      >>> taus = [{"w": jnp.array(w)} for w in ([4.0, 0], [2.0, 0], [0.0, 1])]
      >>> found = autoencoder(taus, 2, key=jax.random.key(0))
      >>> print(recover(found, [1])[0]["w"].round(2) + 0.0)
      [2. 0.]
    """
    _leaves.check_vectors(taus)
    factors = autoencoder_factors(
        tree.gram(taus),
        count,
        key=key,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        temperature=temperature,
    )
    return LinearBases(combined(taus, factors.encoder), factors.decoder, None)


def recover(bases: LinearBases, tasks: Sequence[int]) -> list[Tree]:
    """Returns the approximate task vectors of some tasks.

    Args:
      bases: result of `pca` or `autoencoder`.
      tasks: indices of the tasks.

    Returns:
      One vector for each index, in float32 or better.

    Raises:
      ValueError: an index is out of range.

    Example:
      >>> bases = LinearBases([{"w": jnp.ones(2)}], jnp.array([[1.0, 3.0]]), None)
      >>> print(recover(bases, [1])[0]["w"])
      [3. 3.]
    """
    count = bases.coefficients.shape[1]
    if unknown := [i for i in tasks if not 0 <= i < count]:
        raise ValueError(
            f"tasks {unknown} have no coefficients; the bases have {count} tasks, 0 to "
            f"{count - 1}."
        )
    if not len(tasks):
        return []
    weights, vectors = bases.coefficients[:, np.asarray(tasks)], list(bases.basis)
    if bases.mean is not None:
        weights = jnp.concatenate([weights, jnp.ones((1, len(tasks)))])
        vectors.append(bases.mean)
    return combined(vectors, weights)


def combined(vectors: Sequence[Tree], weights: Array) -> list[Tree]:
    """Returns linear combinations of vectors; reads one leaf of all vectors at a time.

    Args:
      vectors: K vectors. A missing leaf counts as zero.
      weights: weights of the combinations, `[K, n]`.

    Returns:
      n vectors in float32 or better. They have the structure of the first vector that
      has all leaves. If no vector has all of them, they are nested dicts.

    Example:
      >>> vectors = {"w": jnp.ones(2)}, {"w": jnp.array([0.0, 4.0])}
      >>> print(combined(vectors, np.array([[1.0], [0.5]]))[0]["w"])
      [1. 3.]
    """
    rows = tree.aligned(vectors)
    leaves = {path: _combined_leaf(row, weights) for path, row in rows.items()}
    found = [
        {path: leaf[n] for path, leaf in leaves.items()}
        for n in range(np.shape(weights)[1])
    ]
    for like in vectors:
        if len(jax.tree.leaves(like)) == len(rows):
            return [tree.map_with_path(lambda p, _, o=own: o[p], like) for own in found]
    return [tree.unflatten(own) for own in found]


def _combined_leaf(row, weights):
    found = tree.settled(_products(tree.gathered(row), weights))
    return [tree.sharded_like(leaf, row[0]) for leaf in found]


@jax.jit
def _products(row, weights):
    dtype = tree.wide_dtype(*row)
    leaves = jnp.stack([jnp.asarray(leaf, dtype) for leaf in row])
    weights = jnp.asarray(weights, dtype)
    return tuple(jnp.tensordot(weights.T, leaves, 1, precision="highest"))


def pca_factors(gram: Array, count: int | None = None) -> Factors:
    r"""Returns the factors of PCA, from the eigenvectors of the centred Gram matrix.

    With the centred vectors :math:`X = V - \bar\tau 1^\top = U S Q^\top`, the basis is
    :math:`X Q = U S` and the decoder is :math:`Q^\top`. No number is divided by a
    singular value, so small singular values do no harm.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      count: as for `pca`.

    Raises:
      ValueError: the Gram matrix is not square, or M is not in 1 to T.
    """
    gram = _square(gram)
    tasks = len(gram)
    count = _checked_count(count, tasks)
    centre = jnp.eye(tasks, dtype=gram.dtype) - 1 / tasks
    product = functools.partial(jnp.matmul, precision="highest")
    _, vectors = jnp.linalg.eigh(product(product(centre, gram), centre))
    chosen = vectors[:, ::-1][:, :count]  # eigh returns the largest eigenvalues last
    return Factors(product(centre, chosen), chosen.T)


def autoencoder_factors(
    gram: Array,
    count: int | None = None,
    *,
    key: jax.Array,
    steps: int = 6000,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-6,
    temperature: float = 5.0,
) -> Factors:
    r"""Trains the autoencoder: returns :math:`B = \mathrm{softmax}(A / t)` and W.

    The softmax is over the tasks. A starts from a normal distribution, and W from zero.
    Adam minimises the mean squared error of the recovered vectors,
    ``squared_error(gram, B @ W) / T**2``.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      count, key, steps, learning_rate, weight_decay, temperature: as for
        `autoencoder`.

    Raises:
      ValueError: the Gram matrix is not square, or M is not in 1 to T.
    """
    gram = _square(gram)
    count = _checked_count(count, len(gram))
    start = jax.random.normal(key, (len(gram), count), gram.dtype)
    return _trained(gram, start, steps, learning_rate, weight_decay, temperature)


@jax.jit
def _trained(gram, start, steps, learning_rate, weight_decay, temperature):
    import optax  # here, so that `import jaxarith` stays light

    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
    )

    def encoder(a):
        return jax.nn.softmax(a / temperature, axis=0)

    @jax.grad
    def gradient(params):
        a, w = params
        rebuilt = jnp.matmul(encoder(a), w, precision="highest")
        return squared_error(gram, rebuilt) / len(gram) ** 2

    def step(_, state):
        params, moments = state
        updates, moments = optimizer.update(gradient(params), moments, params)
        return optax.apply_updates(params, updates), moments

    params = start, jnp.zeros(start.shape[::-1], start.dtype)
    state = params, optimizer.init(params)
    (a, w), _ = jax.lax.fori_loop(0, steps, step, state)
    return Factors(encoder(a), w)


def squared_error(gram: Array, rebuilt: Array) -> jax.Array:
    r"""Returns the squared error of all recovered vectors, :math:`\|V R - V\|_F^2`.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      rebuilt: R, `[T, T]`. The recovered vector i is the sum of the task vectors with
        the weights in column i. R is B W; with the mean of PCA add 1 / T to every
        entry.

    Example:
      >>> gram, rebuilt = jnp.diag(jnp.array([4.0, 9.0])), jnp.diag(jnp.array([1, 0]))
      >>> print(squared_error(gram, rebuilt))
      9.0
    """
    gram = jnp.asarray(gram)
    rest = rebuilt - jnp.eye(len(gram), dtype=gram.dtype)
    return jnp.sum(rest * jnp.matmul(gram, rest, precision="highest"))


def _square(gram):
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(
            f"the Gram matrix has shape {list(gram.shape)}; expected [T, T]."
        )
    return gram


def _checked_count(count, tasks):
    count = max(1, tasks // 2) if count is None else count
    if not 1 <= count <= tasks:
        raise ValueError(
            f"count is {count} for {tasks} task vectors; give a number from 1 to "
            f"{tasks}."
        )
    return count
