r"""Fewer vectors that task vectors are linear combinations of: PCA, and an autoencoder.

Zeng, He, You, Hao, Tsai, Yamada, Zhao. Efficient Model Editing with Task Vector Bases:
A Theoretical Framework and Scalable Approach. arXiv:2502.01015. The authors' current
code (github.com/uiuctml/TaskVectorBasis) has these bases in place of the clusters of
the first version.

With the T task vectors as the columns of a matrix V and an encoder B, `[T, M]`, the M
basis vectors are V B. With a decoder W, `[M, T]`, the task vectors are recovered as

.. math:: \hat V = V B W \quad (+\ \bar\tau \text{ for PCA}).

B and W need the Gram matrix :math:`G = V^\top V` alone. It takes one pass over the task
vectors, and the basis vectors take a second.

Addition. The authors' code adds the basis vectors, θ0 + α Σ_m b_m, and leaves the mean
of PCA out: what it adds then depends on the signs of eigenvectors, which are arbitrary.
Ours adds what `recover` gives. With PCA that is the sum of the task vectors themselves,
for every M: the recovered vectors differ from them by vectors that sum to zero.
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
    """Basis vectors, and how task vectors are made of them.

    Attributes:
      basis: the M basis vectors, in float32 or better.
      coefficients: the decoder W, `[M, T]`.
      mean: the mean of the task vectors, one more vector to store; None without it.
    """

    basis: list[Tree]
    coefficients: jax.Array
    mean: Tree | None


class Factors(NamedTuple):
    """Bases as numbers alone.

    Attributes:
      encoder: B, `[T, M]`. Basis vector m is Σ_i B[i, m] τ_i.
      decoder: W, `[M, T]`. Task vector i is about Σ_m W[m, i] b_m, plus the mean for
        PCA.
    """

    encoder: jax.Array
    decoder: jax.Array


def pca(taus: Taus, count: int | None = None) -> LinearBases:
    """The principal components of task vectors.

    Args:
      taus: T task vectors. A leaf that one lacks counts as zero.
      count: M, the number of components, at most T. None takes half of T, as in the
        authors' code. With T - 1 every task vector is recovered exactly.

    Returns:
      M orthogonal basis vectors, the longest first and of arbitrary signs, and the
      mean of the task vectors: M + 1 vectors to store.

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
    """Basis vectors that are weighted means of task vectors, and recover them best.

    The training is on T × T matrices and does not see the task vectors. The defaults
    are those of the authors' `scripts/build_ae_basis.py`.

    Args:
      taus: T task vectors. A leaf that one lacks counts as zero.
      count: M, the number of basis vectors, at most T. None takes half of T.
      key: random key of the encoder's start.
      steps, learning_rate, weight_decay: the steps of Adam. As in PyTorch's Adam, the
        decay is part of the gradient.
      temperature: the encoder is a softmax of its parameters divided by this.

    Returns:
      The basis vectors, without a mean.

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
    """The approximate vectors of some tasks.

    Args:
      bases: from `pca` or `autoencoder`.
      tasks: their indices.

    Raises:
      ValueError: there is no such task.

    Example:
      >>> bases = LinearBases([{"w": jnp.ones(2)}], jnp.array([[1.0, 3.0]]), None)
      >>> print(recover(bases, [1])[0]["w"])
      [3. 3.]
    """
    count = bases.coefficients.shape[1]
    if unknown := [i for i in tasks if not 0 <= i < count]:
        raise ValueError(
            f"tasks {unknown} have no coefficients; the bases are those of {count} "
            f"tasks, 0 to {count - 1}."
        )
    if not len(tasks):
        return []
    weights, vectors = bases.coefficients[:, np.asarray(tasks)], list(bases.basis)
    if bases.mean is not None:
        weights = jnp.concatenate([weights, jnp.ones((1, len(tasks)))])
        vectors.append(bases.mean)
    return combined(vectors, weights)


def combined(vectors: Sequence[Tree], weights: Array) -> list[Tree]:
    """Linear combinations of vectors, with a leaf of all of them at a time.

    Args:
      vectors: K vectors. A leaf that one lacks counts as zero.
      weights: `[K, n]`.

    Returns:
      n vectors in float32 or better, in the structure of the first of the vectors that
      has all leaves; nested dicts where none has.

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
    r"""The factors of PCA, by the eigenvectors of the centred Gram matrix.

    With the centred vectors :math:`X = V - \bar\tau 1^\top = U S Q^\top`, the basis is
    :math:`X Q = U S` and the decoder :math:`Q^\top`. Nothing is divided by a singular
    value, so that small ones do no harm.

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
    chosen = vectors[:, ::-1][:, :count]  # the largest eigenvalues are the last
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
    r"""The factors of the autoencoder, :math:`B = \mathrm{softmax}(A / t)` and W.

    A, whose softmax is over the tasks, starts from a normal distribution and W from
    zero. Adam decreases the mean squared error of the recovered vectors,
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
    r"""The error of all task vectors, :math:`\|V R - V\|_F^2`.

    Args:
      gram: inner products of the task vectors, `[T, T]`.
      rebuilt: R, `[T, T]`, whose column i has the weights of task vectors that vector i
        is recovered as. It is B W, plus 1 / T in every entry with the mean of PCA.

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
        raise ValueError(f"a Gram matrix of shape {list(gram.shape)}; expected [T, T].")
    return gram


def _checked_count(count, tasks):
    count = max(1, tasks // 2) if count is None else count
    if not 1 <= count <= tasks:
        raise ValueError(
            f"{count} basis vectors of {tasks} task vectors; give 1 to {tasks}."
        )
    return count
