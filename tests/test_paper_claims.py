"""What the papers claim of numbers, where no large model is needed to see it.

Other claims are tested beside the functions that they are about: linear interpolation
in tangent space (τJp paper, theorem 1) in `test_tangent`, the mean of means of equal
clusters (bases paper) in `test_bases`, bounds of loss gaps (bases paper) in
`test_bounds`, and what both AWD objectives do to cosines (AWD paper) in `test_awd`.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import normal

from jaxarith import evaluate, merge, tangent, task_vectors, tau_jp, tree
from jaxarith.evaluate import landscape

SAMPLES, FEATURES, HIDDEN, CLASSES = 10, 8, 9, 3
# Fewer outputs of both tasks together than parameters: vectors can avoid each other.
PARAMS_0 = {"a": normal(0, FEATURES, HIDDEN), "b": normal(1, HIDDEN, CLASSES)}


@pytest.fixture(autouse=True)
def float64(x64):
    yield


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def batch(seed):
    """Inputs with soft labels, so that the loss has a minimum."""
    label = np.exp(normal(seed + 10, SAMPLES, CLASSES))
    return {
        "image": normal(seed, SAMPLES, FEATURES),
        "label": label / label.sum(1, keepdims=True),
        "mask": np.ones(SAMPLES, bool),
    }


DATA = [batch(2), batch(3)]


def losses(data, taus, coefs, linearized=True):
    return landscape.losses(
        *(mlp, optax.softmax_cross_entropy, PARAMS_0, taus, [data], coefs),
        linearized=linearized,
    )


def entropy(data):
    """The smallest cross-entropy that there is."""
    return -np.sum(data["label"] * np.log(data["label"]), axis=1).mean()


def jacobian(data):
    start, unravel = jax.flatten_util.ravel_pytree(PARAMS_0)
    found = jax.jacobian(lambda flat: mlp(unravel(flat), data["image"]).ravel())(start)
    return np.asarray(found), unravel


@pytest.fixture(scope="module")
def optimal():
    """For both tasks, a vector that minimises its loss and has no τJp on the other."""
    with jax.enable_x64(True):
        jacobians, (unravel, _) = zip(*map(jacobian, DATA), strict=True)
        taus = []
        for own, other, data in zip(jacobians, jacobians[::-1], DATA, strict=True):
            # Directions that do not move the outputs of the other task.
            free = np.linalg.svd(other)[2][len(other) :].T
            wanted = np.log(data["label"]) - np.asarray(mlp(PARAMS_0, data["image"]))
            moves, *_ = np.linalg.lstsq(own @ free, wanted.ravel())
            taus.append(jax.tree.map(np.asarray, unravel(free @ moves)))
        return taus


def test_the_loss_of_the_linearised_model_is_convex_in_the_coefficients():
    """τJp paper, theorem 2, with the cross-entropy. That of the network is not."""
    taus = [jax.tree.map(lambda x, s=s: normal(s, *x.shape), PARAMS_0) for s in (4, 5)]
    ends = normal(6, 2, 50, len(taus), scale=3.0)
    triples = np.stack([ends[0], ends.mean(0), ends[1]])
    for linearized, convex in ((True, True), (False, False)):
        first, middle, last = losses(DATA[0], taus, triples, linearized)
        assert np.all(middle <= (first + last) / 2 + 1e-9) == convex


def test_without_tau_jp_all_coefficients_are_best_at_one(optimal):
    """τJp paper, appendix A: each is at its own minimum, none disturbs another."""
    datasets = [[data] for data in DATA]
    measured = tau_jp.matrix(mlp, PARAMS_0, optimal, datasets)
    np.testing.assert_allclose(measured[~np.eye(2, dtype=bool)], 0, atol=1e-10)
    assert measured.diagonal().min() > 0.1
    coefs = np.linspace(0, 2, 9)
    plane = np.stack(np.meshgrid(coefs, coefs, indexing="ij"), axis=-1)
    for axis, data in enumerate(DATA):
        found = np.moveaxis(losses(data, optimal, plane), axis, 0)
        # It depends on its own coefficient alone, and is smallest where that is 1.
        np.testing.assert_allclose(found, found[:, :1] + 0 * found, rtol=1e-9)
        assert coefs[found[:, 0].argmin()] == 1
        assert found[4, 4] == pytest.approx(entropy(data), rel=1e-9)
        # The network that has the same τJp, zero, does not keep the promise.
        assert losses(data, optimal, [1, 1], linearized=False) > entropy(data) + 0.01


def test_without_tau_jp_weights_are_disentangled(optimal):
    """τJp paper, Eq. 1 and 2."""
    at = [evaluate.tangent(mlp, PARAMS_0, optimal, [data]) for data in DATA]
    predict = [lambda outputs: outputs.argmax(-1)] * 2
    assert not evaluate.disentanglement_error(at, predict, [-1.0, 0.3, 1.0, 2.0]).any()


def test_a_negated_optimum_forgets_more_and_more_without_tau_jp_and_nothing_else(
    optimal,
):
    """τJp paper, appendix A: there is no best coefficient of negation."""
    coefs = -np.arange(0, 20.0)[:, None] * [[1, 0]]
    forgotten, kept = (losses(data, optimal, coefs) for data in DATA)
    assert (np.diff(forgotten) > 0).all()
    np.testing.assert_allclose(kept, kept[0], rtol=1e-9)


def test_no_tau_jp_means_no_cosine_but_no_cosine_does_not_mean_no_tau_jp(optimal):
    """τJp paper, Eq. 13: gradient descent in tangent space gives J^T times errors."""
    model, data = tangent.linearize(mlp, jax.tree.map(jnp.asarray, PARAMS_0)), DATA[1]

    def loss(params):
        outputs = model(params, data["image"])
        return optax.softmax_cross_entropy(outputs, data["label"]).mean()

    params, gradient = PARAMS_0, jax.jit(jax.grad(loss))
    for _ in range(5):
        params = task_vectors.apply(params, gradient(params), -0.1)
    trained = task_vectors.difference(params, PARAMS_0)

    def cosine_and_tau_jp(tau):
        moved = tangent.jvp(mlp, PARAMS_0, tau, data["image"])[1]
        cosine = task_vectors.cosine_matrix([tau, trained])[0, 1]
        return float(cosine), float(tau_jp.penalty(moved))

    np.testing.assert_allclose(cosine_and_tau_jp(optimal[0]), 0, atol=1e-10)
    other = jax.tree.map(lambda x: normal(7, *x.shape), PARAMS_0)
    (_, product), (_, square) = np.asarray(tree.gram([other, trained]))
    cosine, measure = cosine_and_tau_jp(
        task_vectors.apply(other, trained, -product / square)
    )
    assert abs(cosine) < 1e-12 and measure > 0.1


def test_half_of_two_vectors_is_the_average_and_in_tangent_space_the_ensemble():
    """Editing paper, appendix A: weights always, outputs in the NTK regime."""
    start = jax.tree.map(jnp.asarray, PARAMS_0)
    taus = [jax.tree.map(lambda x, s=s: normal(s, *x.shape), start) for s in (8, 9)]
    tuned = [task_vectors.apply(start, tau) for tau in taus]
    added = merge.task_arithmetic(start, taus, coef=0.5)
    for name, leaf in merge.average(start, taus).items():
        mean = (tuned[0][name] + tuned[1][name]) / 2
        np.testing.assert_allclose(added[name], mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(leaf, mean, rtol=1e-12, atol=1e-12)
    linear = tangent.linearize(mlp, start)
    for model, same in ((linear, True), (mlp, False)):
        merged, *single = (model(p, DATA[0]["image"]) for p in (added, *tuned))
        assert np.allclose(merged, np.mean(single, axis=0), atol=1e-10) == same


def test_cosines_of_random_vectors_vanish_with_their_number_of_entries():
    """Bases paper, section 4.1: their mean magnitude, and its variance."""
    pairs = np.triu_indices(8, 1)
    for entries in (100, 1600):
        like, found = {"w": jnp.ones(entries)}, []
        for keys in jax.random.split(jax.random.key(entries), (60, 8)):
            taus = [task_vectors.random_like(key, like) for key in keys]
            found.extend(np.abs(task_vectors.cosine_matrix(taus))[pairs])
        expected = np.sqrt(2 / (np.pi * entries))
        assert np.mean(found) == pytest.approx(expected, rel=0.05)
        assert np.var(found) == pytest.approx((1 - 2 / np.pi) / entries, rel=0.15)
