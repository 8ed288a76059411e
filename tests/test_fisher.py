"""Fisher: closed forms of softmax regression and of linear-Gaussian models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import merge, tree

FEATURES, CLASSES = 3, 4


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def mlp(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


PARAMS = {"w": normal(1, FEATURES, CLASSES), "b": normal(2, CLASSES)}
MLP = {"w1": normal(3, FEATURES, 5), "w2": normal(4, 5, CLASSES)}


def batches(count, size, seed=0):
    """`count` samples in batches; the last is padded with absurd ones."""
    x = normal(seed, count, FEATURES)
    padded = np.concatenate([x, np.full((-count % size, FEATURES), 1e3)])
    mask = np.arange(len(padded)) < count
    rows = range(0, len(padded), size)
    return x, [
        {"image": padded[i : i + size], "mask": mask[i : i + size]} for i in rows
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_fisher_of_softmax_regression_is_the_closed_form(chunk):
    x, data = batches(7, 4)
    p = softmax(x @ PARAMS["w"] + PARAMS["b"])
    variance = p * (1 - p)  # E_y (δ_yk - p_k)²
    found = merge.fisher_diagonal(linear, PARAMS, data, chunk=chunk)
    expected = {"w": (x**2).T @ variance / 7, "b": variance.mean(0)}
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


def test_fisher_is_the_expectation_over_labels_of_squared_gradients():
    x, data = batches(5, 3)
    expected = {name: np.zeros_like(leaf) for name, leaf in MLP.items()}

    def log_p(params, row):
        return jax.nn.log_softmax(mlp(params, row[None]))[0]

    jacobian = jax.jit(jax.jacrev(log_p))
    for row in x:
        p, gradients = np.exp(log_p(MLP, row)), jacobian(MLP, row)
        for c in range(CLASSES):
            for name in MLP:
                expected[name] += p[c] * np.square(gradients[name][c]) / len(x)
    found = merge.fisher_diagonal(mlp, MLP, data)
    for name in MLP:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10)


def test_batch_squared_is_what_public_tables_used():
    x, data = batches(5, 3)
    expected = np.zeros_like(PARAMS["w"])
    for rows in (x[:3], x[3:]):
        p = softmax(rows @ PARAMS["w"] + PARAMS["b"])
        # ∂/∂z_k Σ_c √p_c log p_c = √p_k - p_k Σ_c √p_c
        slope = np.sqrt(p) - p * np.sqrt(p).sum(1, keepdims=True)
        expected += (rows.T @ slope) ** 2 / 5
    found = merge.fisher_diagonal(linear, PARAMS, data, estimator="batch_squared")
    np.testing.assert_allclose(found["w"], expected, rtol=1e-10)


def test_only_the_wanted_part_is_differentiated():
    _, data = batches(5, 3)
    for estimator in ("per_example", "batch_squared"):
        whole = merge.fisher_diagonal(mlp, MLP, data, estimator=estimator)
        part = merge.fisher_diagonal(
            mlp, MLP, data, estimator=estimator, part={"w2": 0 * MLP["w2"]}
        )
        assert set(part) == {"w2"}
        np.testing.assert_allclose(part["w2"], whole["w2"], rtol=1e-12)


def test_drawn_labels_estimate_the_expectation_whatever_the_batches():
    _, data = batches(6, 4)
    exact = merge.fisher_diagonal(mlp, MLP, data)
    key = jax.random.key(0)
    many = merge.fisher_diagonal(mlp, MLP, data, samples=20_000, key=key, chunk=6)
    few = merge.fisher_diagonal(mlp, MLP, data, samples=3, key=key)
    regrouped = merge.fisher_diagonal(
        mlp, MLP, batches(6, 3)[1], samples=3, key=key, chunk=2
    )
    for name in MLP:
        scale = exact[name].max()
        np.testing.assert_allclose(many[name], exact[name], atol=0.02 * scale)
        assert np.abs(few[name] - exact[name]).max() > 0.05 * scale
        np.testing.assert_allclose(few[name], regrouped[name], rtol=1e-12)


def normalising(params, x):
    hidden = x @ params["w"]
    return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


@pytest.mark.parametrize("estimator", ["per_example", "batch_squared"])
def test_padding_may_be_what_the_network_cannot_take(estimator):
    x = normal(0, 3, FEATURES)
    rows = np.stack([np.zeros(FEATURES), x[0], np.full(FEATURES, np.nan), *x[1:]])
    padding = np.array([1, 0, 1, 0, 0])
    padded = [
        {"image": rows, "mask": 1 - padding},
        {"image": np.zeros((2, FEATURES)), "mask": np.zeros(2, int)},
    ]
    real = [{"image": x, "mask": np.ones(3, bool)}]
    found, expected = (
        merge.fisher_diagonal(normalising, PARAMS, data, estimator=estimator)["w"]
        for data in (padded, real)
    )
    assert np.all(expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bfloat16_models_have_float32_fishers():
    _, data = batches(3, 3)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    found = merge.fisher_diagonal(linear, params, data)
    assert found["w"].dtype == jnp.float32 and np.all(found["w"] > 0)


def test_merge_of_linear_gaussian_models_is_the_joint_posterior_mode():
    """With orthogonal inputs the Fisher matrix of least squares is diagonal."""
    designs = [
        np.linalg.qr(normal(i, 8, 3))[0] * np.array([[0.5, 1, 3]]) for i in range(3)
    ]
    targets = [normal((7, i), 8) for i in range(3)]
    theta_0 = normal(9, 3)

    def least_squares(x, y):
        return np.linalg.lstsq(x, y, rcond=None)[0]

    models = [least_squares(x, y) for x, y in zip(designs, targets, strict=True)]
    merged = merge.fisher(
        {"w": theta_0},
        [{"w": model - theta_0} for model in models],
        [{"w": np.diag(x.T @ x)} for x in designs],
    )
    joint = least_squares(np.concatenate(designs), np.concatenate(targets))
    np.testing.assert_allclose(merged["w"], joint, rtol=1e-10)
    assert np.abs(joint - models[0]).max() > 0.1


def fishers(seed):
    """Two Fishers of unequal size, as `[task, entry]`; entry 0 of both is zero."""
    values = normal(seed, 2, 6) ** 2 * np.array([[1.0], [50.0]])
    values[:, 0] = 0
    return values


def as_tree(vector):
    return {"a": vector[:2], "b": {"c": vector[2:].reshape(2, 2)}}


def join(merged):
    return np.concatenate([merged["a"], np.ravel(merged["b"]["c"])])


@pytest.mark.parametrize("weights", [1.0, [0.3, 2.0]])
@pytest.mark.parametrize(
    ("normalize", "floor"), [(False, 0.0), (True, 0.0), (False, 1e-6), (True, 1e-6)]
)
def test_merge_is_the_weighted_mean_of_every_entry(weights, normalize, floor):
    theta_0, taus, f = normal(0, 6), normal(1, 2, 6), fishers(2)
    plain = np.broadcast_to(weights, 2)[:, None]
    precisions = plain * (f + floor)
    if normalize:
        precisions = precisions / (np.linalg.norm(f, axis=1, keepdims=True) + floor)
    if not floor:
        precisions[:, 0] = plain[:, 0]
    expected = (precisions * (theta_0 + taus)).sum(0) / precisions.sum(0)
    merged = merge.fisher(
        as_tree(theta_0),
        [as_tree(tau) for tau in taus],
        [as_tree(row) for row in f],
        **dict(weights=weights, normalize=normalize, floor=floor),
    )
    np.testing.assert_allclose(join(merged), expected, rtol=1e-10)


def test_weights_may_depend_on_the_path():
    theta_0, taus, f = normal(0, 6), normal(1, 2, 6), fishers(2)
    args = as_tree(theta_0), list(map(as_tree, taus)), list(map(as_tree, f))
    merged = merge.fisher(*args, weights=lambda path: [1, 0] if path == "a" else [0, 1])
    np.testing.assert_allclose(merged["a"], (theta_0 + taus[0])[:2])
    np.testing.assert_allclose(join(merged)[2:], (theta_0 + taus[1])[2:])


def test_a_leaf_that_a_fisher_lacks_counts_as_zero():
    theta_0, taus, f = normal(0, 6), normal(1, 2, 6), fishers(2)
    args = as_tree(theta_0), list(map(as_tree, taus))
    lacking = [{"a": f[0, :2]}, {"b": as_tree(f[1])["b"]}]
    full = [tree.fill(row, as_tree(f[0])) for row in lacking]
    merged, expected = merge.fisher(*args, lacking), merge.fisher(*args, full)
    np.testing.assert_array_equal(join(merged), join(expected))
    np.testing.assert_allclose(merged["b"]["c"], (theta_0 + taus[1])[2:].reshape(2, 2))


def test_gradients_are_finite_where_no_model_has_information():
    def total(f):
        merged = merge.fisher({"w": jnp.zeros(2)}, TAUS, f, normalize=True)
        return jnp.sum(merged["w"])

    gradients = jax.grad(total)([{"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


TAUS = [{"w": np.ones(2)}, {"w": np.zeros(2)}]


def test_wrong_number_of_weights_is_an_error():
    with pytest.raises(ValueError, match=r"weights has shape \[3\]"):
        merge.fisher({"w": np.zeros(2)}, TAUS, TAUS, weights=[0.1, 0.2, 0.3])


DATA = [{"image": np.ones((2, FEATURES)), "mask": np.array([True, False])}]
EMPTY = [{**DATA[0], "mask": np.zeros(2, bool)}]


@pytest.mark.parametrize(
    ("f", "message"),
    [
        ([{"w": np.ones(2)}], "1 Fishers for 2 task vectors"),
        ([{"w": np.ones(2)}, {"w": np.ones(3)}], "Fisher 1 does not fit"),
        ([{"w": np.ones(2)}, {"w": np.full(2, np.nan)}], "Fisher 1 has NaN"),
    ],
)
def test_fishers_that_do_not_fit_are_an_error(f, message):
    with pytest.raises(ValueError, match=message):
        merge.fisher({"w": np.zeros(2)}, TAUS, f)


@pytest.mark.parametrize("estimator", ["per_example", "batch_squared"])
def test_without_a_mask_every_row_counts(estimator):
    x = normal(0, 3, FEATURES)
    whole, bare = (
        merge.fisher_diagonal(linear, PARAMS, [batch], estimator=estimator)["w"]
        for batch in ({"image": x, "mask": np.ones(3, bool)}, {"image": x})
    )
    np.testing.assert_array_equal(whole, bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(estimator="empirical"),
            "unknown estimator .* per_example, batch_squared",
        ),
        (dict(samples=2), "needs a key"),
        (
            dict(samples=2, key=jax.random.key(0), estimator="batch_squared"),
            "found estimator 'batch_squared'",
        ),
        (dict(chunk=0), "chunk is 0"),
        (dict(batches=EMPTY), "no real sample"),
        (
            dict(batches=[{**DATA[0], "mask": np.ones(3, bool)}]),
            r"mask of a batch has shape \[3\]; expected \[2\]",
        ),
        (dict(part={"x": np.ones(2)}), r"\+ x \[2\]"),
        (dict(apply_fn=lambda params, x: x @ params["w"][:, 0]), "needs logits"),
    ],
)
def test_wrong_options_are_an_error(options, message):
    args = dict(apply_fn=linear, params=PARAMS, batches=DATA) | options
    with pytest.raises(ValueError, match=message):
        merge.fisher_diagonal(**args)
